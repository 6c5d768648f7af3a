"""The part quantised: LoRA on a quantised base, and dequantising alone.

It compares the frozen bf16 linear, bitsandbytes' own product where it has one, HF PEFT on the
base's own layer, peftkern on bf16, and peftkern on the base. Decoding runs in CUDA graphs. Calls
take turns over several weights, so that those of one are not in the L2 cache from the call before.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peftkern.ops.bases import formats
from peftkern.ops.bases.weight import Packed

from .cases import LLAMA_8B
from .device import Device, randn
from .numerics import LIMITS, relative
from .packed import BASES, base_linear, owned_is_read, packed_bytes, without_data
from .providers import ALPHA, PEFT_FP32, PLAIN, peftkern_mode
from .report import BNB, OWNER, TRITON
from .store import Watch
from .timing import Timed, interleave

BF16 = torch.bfloat16
MOST_COPIES = 8
ON_BF16 = "peftkern triton on bf16"
ALONE = "bitsandbytes, base alone"
LIMIT = LIMITS["bfloat16"]


@dataclass(frozen=True)
class QuantisedCase:
    """M rows through a projection of Llama-8B on a base, in bf16 with float32 adapters."""

    base: str
    M: int
    what: str = "decode"  # without gradients, in a graph; "train"; "dequantise": W alone
    proj: str = "q_proj"
    r: int = 16
    shape: tuple[int, int] | None = None  # (K, N) in place of the projection's

    @property
    def key(self) -> str:
        name = f"quantised {self.base} {self.proj} 8B"
        if self.what == "dequantise":
            return f"{name} dequantise"
        return f"{name} M={self.M} r={self.r} {'train' if self.what == 'train' else 'infer graph'}"

    @property
    def of(self) -> tuple[int, int]:
        return self.shape or LLAMA_8B.linears()[self.proj]

    def tiny(self) -> QuantisedCase:
        return replace(self, M=min(self.M, 5), r=4, shape=(128, 64))


def cases() -> list[QuantisedCase]:
    """One row on each base, then several rows, W alone and training."""
    found = [QuantisedCase(base, 1) for base in BASES]
    for base in BASES:
        found.append(QuantisedCase(base, 8192, "dequantise"))
        found.append(QuantisedCase(base, 16))
    found += [QuantisedCase(base, 8192, "train") for base in BASES]
    found += [QuantisedCase(base, 64) for base in BASES]
    found += [
        QuantisedCase("nf4", m, "decode", p) for p in ("gate_proj", "down_proj") for m in (1, 16)
    ]
    return found


def floor(case: QuantisedCase, packed: int, ceilings: dict[str, float]) -> dict[str, float]:
    """{"us", "bytes", "flops"}: W packed once a direction, X and Y, A and B each once.

    ``packed`` is the bytes of the packed weight. W alone is read once, and written dense.
    """
    (K, N), M, r = case.of, case.M, case.r
    if case.what == "dequantise":
        moved, flops = packed + 2 * N * K, 0.0
    else:
        directions = 2 if case.what == "train" else 1
        one = packed + 2 * M * (K + N) + 4 * r * (K + N)
        moved = directions * one + (2 * M * K + 4 * r * (K + N)) * (directions - 1)
        flops = directions * 2.0 * M * K * N + (6 * directions - 4) * M * r * (K + N)
    seconds = max(moved / (ceilings["copy_tb_s"] * 1e12), flops / (ceilings["bf16_tflop_s"] * 1e12))
    return {"us": seconds * 1e6, "bytes": float(moved), "flops": flops}


@dataclass
class Provider:
    """A way to compute Y of X with weight ``i``, and its adapters' A and B of each weight."""

    call: Callable[[int, Tensor], Tensor]
    adapters: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext


class _Frame(nn.Module):
    """Holds a linear for each weight under a name, for the libraries to find."""

    def __init__(self, layers: list[nn.Module], four_bit: bool) -> None:
        super().__init__()
        self.is_loaded_in_4bit = four_bit  # HF PEFT asks the model
        self.names = [f"l{i}" for i in range(len(layers))]
        for name, layer in zip(self.names, layers, strict=True):
            setattr(self, name, layer)

    def call(self, i: int, x: Tensor) -> Tensor:
        found: Tensor = getattr(self, f"l{i}")(x)
        return found


def _adapted(library: str, layers: list[nn.Module], case: QuantisedCase, drawn: Any) -> Provider:
    lib = importlib.import_module(library)
    frame = _Frame(layers, case.base == "nf4" and type(layers[0]) is not nn.Linear)
    config = lib.LoraConfig(r=case.r, lora_alpha=ALPHA * case.r, target_modules=frame.names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lib.get_peft_model(frame, config)
    frame.train(case.what == "train")
    adapters = []
    with torch.no_grad():
        for name, (A, B) in zip(frame.names, drawn, strict=True):
            layer = getattr(frame, name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.copy_(A), b.copy_(B)
            adapters.append((a, b))
    return Provider(frame.call, adapters)


def _draw(case: QuantisedCase, numbers: list[Tensor], device: Device) -> list[Any]:
    """(A, B) for each W, bf16 values; x Aᵀ Bᵀ is about as large as x Wᵀ."""
    K, N = case.of
    found = []
    for w in numbers:
        A = torch.empty((case.r, K), device=device.torch).uniform_(-(K**-0.5), K**-0.5)
        std = w.float().square().mean().sqrt().item() * math.sqrt(K / case.r)
        B = torch.empty((N, case.r), device=device.torch).normal_(std=std)
        found.append((A.bfloat16().float(), B.bfloat16().float()))
    return found


def _bitsandbytes(layers: list[nn.Module]) -> Provider:
    matmul: Any = importlib.import_module("bitsandbytes").matmul_4bit
    held = [(layer.weight.t(), layer.weight.quant_state) for layer in layers]
    return Provider(lambda i, x: matmul(x, held[i][0], quant_state=held[i][1]))


def makers(
    case: QuantisedCase, dense: list[Tensor], numbers: list[Tensor], device: Device
) -> dict[str, Callable[[], Provider]]:
    """{name: what makes the provider}; ``numbers`` are the base's, which the bf16 ones multiply."""
    drawn = _draw(case, numbers, device)

    def bases() -> list[nn.Module]:
        torch.manual_seed(3)  # MXFP4 draws its numbers
        return [base_linear(case.base, w) for w in dense]

    def plain() -> list[nn.Module]:
        K, N = case.of
        found = [nn.Linear(K, N, bias=False, device="meta") for _ in numbers]
        for layer, w in zip(found, numbers, strict=True):
            layer.weight = nn.Parameter(w, requires_grad=False)
        return [*found]

    triton = partial(peftkern_mode, "triton")
    found: dict[str, Callable[[], Provider]] = {
        PLAIN: lambda: Provider(lambda i, x: linear(x, numbers[i])),
        PEFT_FP32: lambda: _adapted("peft", bases(), case, drawn),
        ON_BF16: lambda: replace(_adapted("peftkern", plain(), case, drawn), mode=triton),
        TRITON: lambda: replace(_adapted("peftkern", bases(), case, drawn), mode=triton),
    }
    if case.base == "nf4":
        found[ALONE] = lambda: _bitsandbytes(bases())
    return found


def packed_of(layer: nn.Module) -> Packed:
    """What a linear of :func:`.packed.base_linear` holds.

    Raises:
        RuntimeError: it cannot be read.
    """
    found = formats.read(layer)
    if isinstance(found, str):
        raise RuntimeError(f"a {type(layer).__name__} cannot be read: {found}")
    return found.packed


def dequantisers(case: QuantisedCase, held: list[Packed]) -> dict[str, Callable[[], Provider]]:
    """{name: what makes W [N, K] in bf16}; the owner of nf4 is bitsandbytes' own kernel."""
    from peftkern.kernels.dequantise import dequantise

    def ours(i: int, x: Tensor) -> Tensor:
        made: Tensor = dequantise(held[i].for_kernels(BF16), BF16)
        return made

    owner = BNB if case.base == "nf4" else OWNER
    return {
        TRITON: lambda: Provider(ours),
        owner: lambda: Provider(lambda i, x: held[i].dense(BF16)),
    }


def _step(provider: Provider, i: int, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """(Y, dX, dA, dB), the last two with adapters alone."""
    y = provider.call(i, x)
    wanted = [x, *(provider.adapters[i] if provider.adapters else ())]
    return y.detach(), *torch.autograd.grad(y, wanted, dy)


def _check(case: QuantisedCase, provider: Provider, w: Tensor, x: Tensor, dy: Tensor) -> Any:
    """{"errors", "ok", ...} of weight 0 against float64 of W in bf16."""
    if case.what == "dequantise":
        made = provider.call(0, x)
        return {"errors": {"w": relative(made, w.double())}, "ok": torch.equal(made, w),
                "checked": "bit for bit", "limit": 0.0}  # fmt: skip
    wide, W = x.detach().double(), w.double()
    exact = {"y": wide @ W.T}
    found: dict[str, Tensor]
    if case.what == "train":
        names = ("y", "dx", "da", "db")
        found = dict(zip(names, _step(provider, 0, x, dy), strict=False))
        exact["dx"] = dy.double() @ W
    else:
        with torch.no_grad():
            found = {"y": provider.call(0, x)}
    if provider.adapters:
        A, B = (t.detach().double() for t in provider.adapters[0])
        s = ALPHA * (wide @ A.T)
        exact["y"] = exact["y"] + s @ B.T
        if case.what == "train":
            ds = ALPHA * (dy.double() @ B)
            exact |= {"dx": exact["dx"] + ds @ A, "da": ds.T @ wide, "db": dy.double().T @ s}
    errors = {name: relative(t, exact[name]) for name, t in found.items()}
    ok = all(e <= LIMIT for e in errors.values())  # NaN is not
    return {"errors": errors, "ok": ok, "checked": "float64", "limit": LIMIT}


def _work(case: QuantisedCase, p: Provider, x: Tensor, dy: Tensor, n: int, device: Device) -> Timed:
    def train() -> None:
        for i in range(n):
            _step(p, i, x, dy)

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return [p.call(i, x) for i in range(n)]

    with p.mode():
        run = train if case.what == "train" else infer
        run()
        return Timed(run if case.what == "train" else device.capture(run), n, p.mode)


def measure(
    case: QuantisedCase, device: Device, ceilings: dict[str, float], *, seconds: float, watch: Watch
) -> dict[str, Any]:
    """The row of a case.

    Raises:
        Broken: the device is unusable after a provider ran.
    """
    began, key = time.monotonic(), case.key
    case = case.tiny() if device.dry else case
    row: dict[str, Any] = {
        "key": key, "part": "quantised", "case": asdict(case), "providers": {}, "missing": {},
    }  # fmt: skip
    with owned_is_read():
        try:
            _measure(case, row, device, ceilings, seconds, watch)
        except ImportError as e:
            row["missing"] = {case.base: f"{type(e).__name__}: {str(e)[:200]}"}
    row["seconds"] = round(time.monotonic() - began, 2)
    gc.collect()
    device.empty()
    return row


def _measure(
    case: QuantisedCase, row: dict[str, Any], device: Device, ceilings: Any, seconds: float,
    watch: Watch,
) -> None:  # fmt: skip
    (K, N), train = case.of, case.what == "train"
    torch.manual_seed(5)
    dense = [randn(device, N, K, dtype=BF16, scale=K**-0.5)]
    size = packed_bytes(without_data(case.base, N, K))
    row["floor"] = floor(case, size, ceilings)
    copies = 1 if device.dry else min(MOST_COPIES, math.ceil(3 * device.l2 / size))
    row["copies"] = copies
    dense += [randn(device, N, K, dtype=BF16, scale=K**-0.5) for _ in range(copies - 1)]
    torch.manual_seed(3)
    held = [packed_of(base_linear(case.base, w)) for w in dense]
    numbers = [p.dense(BF16) for p in held]
    x, dy = (randn(device, case.M, n, dtype=BF16) for n in (K, N))
    x.requires_grad_(train)
    if case.what == "dequantise":
        make = dequantisers(case, held)
    else:
        make = makers(case, dense, numbers, device)
    works: dict[str, Timed] = {}

    def attempt(name: str, maker: Callable[[], Provider], entry: dict[str, Any]) -> None:
        provider = maker()
        with provider.mode():
            entry.update(_check(case, provider, numbers[0], x, dy))
        if entry["ok"]:
            works[name] = _work(case, provider, x, dy, copies, device)

    watch.each(row, make, device, attempt)
    if works:
        for name, q in interleave(works, device, seconds).items():
            row["providers"][name]["us"] = q


def warm(case: QuantisedCase, device: Device) -> None:
    """Compile the kernels of a case by one call of peftkern on the base."""
    case = case.tiny() if device.dry else case
    (K, N), train = case.of, case.what == "train"
    dense = [randn(device, N, K, dtype=BF16, scale=K**-0.5)]
    with owned_is_read():
        held = [packed_of(base_linear(case.base, dense[0]))]
        x, dy = (randn(device, case.M, n, dtype=BF16) for n in (K, N))
        x.requires_grad_(train)
        if case.what == "dequantise":
            make = dequantisers(case, held)
        else:
            make = makers(case, dense, [held[0].dense(BF16)], device)
        provider = make[TRITON]()
        with provider.mode():
            if train:
                _step(provider, 0, x, dy)
            else:
                with torch.no_grad():
                    provider.call(0, x)
    device.synchronize()
