"""The part experts: a mixture's experts with adapters, a training step and decoding.

It compares transformers' frozen experts (grouped products), HF PEFT on them, which makes W + s B A
of all experts, and peftkern's ways. Decoding runs in a CUDA graph. Calls take turns over several
routings, so that the experts of one are not in the L2 cache from the call before.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import experts_floor
from ..kernels.experts import LAYERS
from .blocks import share
from .device import Device, randn
from .experts_exact import Exact
from .mixtures import Sizes, adapted, experts, factors
from .numerics import BLOCK_FACTOR, LIMITS
from .providers import AUTO, OURS, PEFT_BF16, PEFT_FP32, PLAIN, auto_is_its_own, peftkern_mode
from .report import TRITON
from .store import Watch
from .timing import Timed, interleave

BF16 = torch.bfloat16
MOST_ROUTINGS = 8
LIMIT = LIMITS["bfloat16"] * BLOCK_FACTOR["mlp"]  # it rounds between two linears too
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    OURS["torch"]: partial(peftkern_mode, "torch"),
    TRITON: partial(peftkern_mode, "triton"),
    AUTO: partial(peftkern_mode, "auto"),
}


@dataclass(frozen=True)
class ExpertsCase:
    """T tokens through the experts of a layer, in bf16; peftkern's adapters are float32."""

    layer: str  # of benchmarks.kernels.experts.LAYERS
    T: int
    what: str = "train"  # or "decode": without gradients, in a graph
    r: int = 16
    sizes: Sizes | None = None  # in place of the layer's own

    @property
    def key(self) -> str:
        tail = "train" if self.what == "train" else "infer graph"
        return f"experts {self.layer} T={self.T} r={self.r} {tail}"

    @property
    def of(self) -> Sizes:
        if self.sizes is not None:
            return self.sizes
        _, k, E, D, inner = LAYERS[self.layer]
        return Sizes(k, E, D, inner, self.layer == "gpt-oss")

    def tiny(self) -> ExpertsCase:
        sizes = Sizes(2, 4, 16, 24, self.layer == "gpt-oss")
        return replace(self, T=min(self.T, 9), r=4, sizes=sizes)


def cases() -> list[ExpertsCase]:
    return [
        ExpertsCase("qwen3", 8192),
        ExpertsCase("qwen3", 1, "decode"),
        ExpertsCase("gpt-oss", 8192),
        ExpertsCase("gpt-oss", 1, "decode"),
        ExpertsCase("qwen3", 8, "decode"),
        ExpertsCase("gpt-oss", 8, "decode"),
        ExpertsCase("qwen3", 2048),
    ]


def floor(case: ExpertsCase, ceilings: dict[str, float]) -> dict[str, float]:
    """{"us", "bytes", "flops"} of the natural passes (:mod:`benchmarks.cost.experts_floor`)."""
    s = case.of
    m = experts_floor.Mixture(
        case.T, s.k, s.E, s.D, s.I, case.r, s.gpt_oss, torch.float32
    )  # fmt: skip
    passes = experts_floor.forward(m)
    passes += experts_floor.backward(m) if case.what == "train" else []
    seconds = sum(
        max(t.bytes / (ceilings["copy_tb_s"] * 1e12), t.flops / (ceilings["bf16_tflop_s"] * 1e12))
        for t in passes
    )
    moved, flops = (float(sum(getattr(t, n) for t in passes)) for n in ("bytes", "flops"))
    return {"us": seconds * 1e6, "bytes": moved, "flops": flops}


class Frame(nn.Module):
    """Holds the experts under a name, for the libraries to find."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.experts = inner


@dataclass
class Routed:
    """One call's tokens, the index [T, k] of their experts, its weights, and dOut."""

    x: Tensor
    index: Tensor
    weights: Tensor
    dout: Tensor


@dataclass
class Provider:
    """Experts with the adapters' tensors, each parameter's (A, B)."""

    model: Frame
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def forward(self, on: Routed) -> Tensor:
        found: Tensor = self.model.experts(on.x, on.index, on.weights)
        return found

    def step(self, on: Routed) -> tuple[Tensor, ...]:
        """(Out, dX, dw, dA and dB of each parameter)."""
        wanted = [on.x, on.weights, *(t for pair in self.adapters.values() for t in pair)]
        y = self.forward(on)
        return y.detach(), *torch.autograd.grad(y, wanted, on.dout)


def base(case: ExpertsCase, device: Device) -> Frame:
    """The frozen experts with drawn weights, whose outputs are about as large as their inputs."""
    s = case.of
    model = experts(s, BF16, device.torch)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fan = s.I if name == "down_proj" else s.D
            weight.normal_(std=0.1 if name.endswith("bias") else fan**-0.5)
    return Frame(model)


def routings(case: ExpertsCase, device: Device, count: int) -> list[Routed]:
    s, train = case.of, case.what == "train"
    torch.manual_seed(7)
    found = []
    for _ in range(count):
        x = randn(device, case.T, s.D, dtype=BF16)
        logits = torch.randn(case.T, s.E, device=device.torch)
        top, index = logits.topk(s.k, 1)
        weights = top.softmax(1).to(BF16)
        dout = randn(device, case.T, s.D, dtype=BF16)
        found.append(Routed(x.requires_grad_(train), index, weights.requires_grad_(train), dout))
    return found


def _draw(provider: Provider, r: int) -> Provider:
    """The provider with drawn A and B, bf16 values and the same for every library."""
    torch.manual_seed(1)
    with torch.no_grad():
        for A, B in provider.adapters.values():
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty_like(A, dtype=torch.float32).uniform_(-bound, bound).bfloat16())
            B.copy_(torch.empty_like(B, dtype=torch.float32).normal_(std=r**-0.5).bfloat16())
    return provider


def makers(case: ExpertsCase, frozen: Frame) -> dict[str, Callable[[], Provider]]:
    """{name: what makes the provider}; peftkern's share one model."""
    shared: list[Provider] = []

    def of(library: str, fp32: bool) -> Provider:
        model = adapted(library, share(frozen), case.r, fp32)
        model.train(case.what == "train")
        return _draw(Provider(model, adapters=factors(model)), case.r)

    def ours(mode: Callable[[], AbstractContextManager[Any]]) -> Provider:
        if not shared:
            shared.append(of("peftkern", True))
        return replace(shared[0], mode=mode)

    found: dict[str, Callable[[], Provider]] = {
        PLAIN: lambda: Provider(frozen),
        PEFT_BF16: lambda: of("peft", False),
        PEFT_FP32: lambda: of("peft", True),
    }
    for name, mode in MODES.items():
        if name != AUTO or auto_is_its_own():
            found[name] = partial(ours, mode)
    return found


def _check(
    case: ExpertsCase, provider: Provider, on: Routed, device: Device, limit: float
) -> dict[str, Any]:
    """{"errors", "ok", "checked", bytes} of one call, with float64 of some tokens and experts."""
    exact = Exact(provider.model.experts, provider.adapters, case.of, on.x, on.index, on.weights)
    with provider.mode():
        if case.what != "train":
            with torch.no_grad():
                y = provider.forward(on)
            return _verdict(exact.errors(y), limit)
        provider.step(on)  # compiles, and decides where there is a race
        device.synchronize()
        device.poison(4 * on.x.numel() * case.of.k)
        before = device.allocated()
        device.watch_peak()
        y = provider.forward(on)
        kept = max(0, device.allocated() - before - y.nbytes)
        del y
        found = provider.step(on)
        device.synchronize()
        peak = device.peak() - before
        errors = exact.errors(*found, dout=on.dout)
    return {**_verdict(errors, limit), "kept_bytes": kept, "peak_bytes": peak}


def _verdict(errors: dict[str, float], limit: float) -> dict[str, Any]:
    ok = all(e <= limit for e in errors.values())  # NaN is not
    return {"errors": errors, "ok": ok, "checked": "float64, some tokens", "limit": limit}


def _work(case: ExpertsCase, provider: Provider, sets: list[Routed], device: Device) -> Timed:
    def train() -> None:
        for on in sets:
            provider.step(on)

    def decode() -> None:
        with torch.no_grad():
            for on in sets:
                provider.forward(on)

    run = train if case.what == "train" else decode
    with provider.mode():
        run()
        work = run if case.what == "train" else device.capture(run)
    return Timed(work, len(sets), provider.mode)


def _attempt(
    case: ExpertsCase, sets: Any, works: dict[str, Timed], device: Device, name: str,
    make: Callable[[], Provider], entry: dict[str, Any],
) -> None:  # fmt: skip
    provider = make()
    # HF PEFT rounds W + s B A to bf16, and the check is not about the rivals
    limit = LIMIT if name in MODES else 5 * LIMIT
    entry.update(_check(case, provider, sets[0], device, limit))
    if entry["ok"]:
        works[name] = _work(case, provider, sets, device)


def measure(
    case: ExpertsCase, device: Device, ceilings: dict[str, float], *, seconds: float, watch: Watch
) -> dict[str, Any]:
    """The row of a case.

    Raises:
        Broken: the device is unusable after a provider ran.
    """
    began, key = time.monotonic(), case.key
    case = case.tiny() if device.dry else case
    least = floor(case, ceilings)
    count = 1 if device.dry else min(MOST_ROUTINGS, math.ceil(3 * device.l2 / least["bytes"]))
    row: dict[str, Any] = {
        "key": key, "part": "experts", "case": asdict(case), "floor": least, "copies": count,
        "providers": {}, "missing": {},
    }  # fmt: skip
    frozen, sets = base(case, device), routings(case, device, count)
    works: dict[str, Timed] = {}
    watch.each(row, makers(case, frozen), device, partial(_attempt, case, sets, works, device))
    if works:
        for name, q in interleave(works, device, seconds).items():
            row["providers"][name]["us"] = q
    row["seconds"] = round(time.monotonic() - began, 2)
    del frozen, sets, works
    gc.collect()
    device.empty()
    return row


def warm(case: ExpertsCase, device: Device) -> None:
    """Compile the kernels of a case by one call of peftkern's Triton way."""
    case = case.tiny() if device.dry else case
    provider = makers(case, base(case, device))[TRITON]()
    (on,) = routings(case, device, 1)
    with provider.mode():
        if case.what == "train":
            provider.step(on)
        else:
            with torch.no_grad():
                provider.forward(on)
    device.synchronize()
