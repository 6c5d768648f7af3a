"""The providers: the plain frozen block, HF PEFT in its forms, peftkern's backends, and peers.

Every provider gets a block that shares the frozen weights and holds equal A and B, so that all
compute one function. The values of A and B are exact in bf16: PEFT's default keeps them in fp32,
and no provider should gain from rounding them.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks as gpu_blocks
from .cases import Case
from .device import Device

PLAIN = "plain frozen"
PEFT_BF16, PEFT_FP32, PEFT_COMPILED = "PEFT bf16", "PEFT default (fp32)", "PEFT compiled"
PRODUCTS = ("hybrid", "joined", "fused")  # the products of the Triton backend
OURS = {name: f"peftkern {name}" for name in ("torch", *PRODUCTS)}
AUTO = "peftkern auto"
PEERS = ("unsloth", "vllm", "liger_kernel", "lorafusion")
ALPHA = 2  # lora_alpha / r


@dataclass
class Provider:
    """One way to compute a block; ``calls[i]`` takes X to the outputs on weight copy i."""

    name: str
    calls: list[Callable[[Tensor], tuple[Tensor, ...]]]
    adapters: list[dict[str, tuple[Tensor, Tensor]]]  # of each copy: {projection: (A, B)}
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    modules: list[nn.Module] = field(default_factory=list)
    dropout_off: bool = False  # True: it has no dropout, so compare it only with p = 0


@contextlib.contextmanager
def peftkern_mode(backend: str, product: str | None = None) -> Iterator[None]:
    """Run peftkern with ``backend``, and the Triton backend with ``product``, within the block."""
    from peftkern.ops import backend as ops_backend

    if product is None:
        with ops_backend.use_backend(backend):
            yield
        return
    from peftkern.ops import triton_backend

    before, triton_backend.product = triton_backend.product, product
    try:
        with ops_backend.use_backend(backend):
            yield
    finally:
        triton_backend.product = before


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    OURS["torch"]: lambda: peftkern_mode("torch"),
    **{OURS[name]: partial(peftkern_mode, "triton", name) for name in PRODUCTS},
    AUTO: lambda: peftkern_mode("auto"),
}


def auto_is_its_own() -> bool:
    """True when ``auto`` decides anything; without a CUDA device it is the torch backend.

    Its races run in the check before the timing, so that no race is timed.
    """
    from peftkern.ops import backend as ops_backend
    from peftkern.ops import torch_backend

    with ops_backend.use_backend("auto"):
        return ops_backend.active is not torch_backend


def draw_adapters(case: Case, device: Device, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{projection: (A [r, K], B [N, r])}, fp32 tensors with bf16's values.

    The low-rank part is about as large as the base's output, so that an error in it shows in Y.
    """
    torch.manual_seed(seed)
    found = {}
    for name, (K, N) in case.shapes.items():
        A = torch.empty((case.r, K), device=device.torch).uniform_(-(K**-0.5), K**-0.5)
        B = torch.empty((N, case.r), device=device.torch).normal_(std=case.r**-0.5)
        found[name] = (A.bfloat16().float(), B.bfloat16().float())
    return found


def adapt(library: str, block: nn.Module, case: Case, drawn: Any, fp32: bool) -> nn.Module:
    """A copy of the block with LoRA of ``library`` on its linears and the drawn A and B."""
    lib = importlib.import_module(library)
    config = lib.LoraConfig(
        r=case.r,
        lora_alpha=ALPHA * case.r,
        lora_dropout=case.p,
        target_modules=list(case.shapes),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(gpu_blocks.share(block), config, autocast_adapter_dtype=fp32)
    inner = model.base_model.model
    want = torch.float32 if fp32 else getattr(torch, case.dtype)
    with torch.no_grad():
        for name, layer in gpu_blocks.linears(inner, case).items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if A.dtype != want or B.dtype != want:
                raise RuntimeError(f"{library} made adapters of {A.dtype}, expected {want}")
            A.copy_(drawn[name][0])
            B.copy_(drawn[name][1])
    return inner.train(case.what == "train")


def weights_of(block: nn.Module, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """{projection: (A [r, K], B [N, r])} of an adapted block."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in gpu_blocks.linears(block, case).items()
    }


def _module_provider(name: str, modules: list[nn.Module], case: Case, **more: Any) -> Provider:
    return Provider(
        name, list(modules), [weights_of(m, case) for m in modules], modules=modules, **more
    )


def providers(
    case: Case, device: Device, copies: int, *, wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Provider], list[nn.Module], dict[str, str]]:
    """({name: provider}, plain blocks, {name: reason that it is missing}).

    Each provider has ``copies`` sets of weights, and there is one plain block for each.
    """
    plain = [gpu_blocks.build(case, device.torch, seed=i) for i in range(copies)]
    drawn = [draw_adapters(case, device, seed=100 + i) for i in range(copies)]
    found: dict[str, Provider] = {}
    missing: dict[str, str] = {}

    def add(name: str, make: Callable[[], Provider]) -> None:
        if not wanted(name):
            return
        try:
            found[name] = make()
        except Exception as e:  # a provider that cannot be built must not stop the others
            missing[name] = f"{type(e).__name__}: {str(e)[:200]}"

    def adapted(library: str, fp32: bool) -> list[nn.Module]:
        return [adapt(library, b, case, d, fp32) for b, d in zip(plain, drawn, strict=True)]

    add(PLAIN, lambda: Provider(PLAIN, list(plain), [{} for _ in plain], modules=plain))
    add(PEFT_BF16, lambda: _module_provider(PEFT_BF16, adapted("peft", False), case))
    add(PEFT_FP32, lambda: _module_provider(PEFT_FP32, adapted("peft", True), case))
    if case.compiled:
        add(PEFT_COMPILED, lambda: _compiled(case, device, adapted("peft", False)[:1]))
    ours: list[nn.Module] = []
    for name, mode in MODES.items():
        if name == AUTO and not auto_is_its_own():
            continue

        def make(name: str = name, mode: Any = mode) -> Provider:
            if not ours:
                ours.extend(adapted("peftkern", True))
            return _module_provider(name, ours, case, mode=mode)

        add(name, make)
    for peer in PEERS:
        add(peer, lambda peer=peer: _peer(peer, case, plain, drawn))
    return found, plain, missing


def _compiled(case: Case, device: Device, modules: list[nn.Module]) -> Provider:
    backend = "eager" if device.dry else "inductor"  # a dry run needs no C++ compiler
    compiled = [torch.compile(m, backend=backend, dynamic=False) for m in modules]
    provider = _module_provider(PEFT_COMPILED, modules, case)
    provider.calls = list(compiled)
    return provider


def _peer(name: str, case: Case, plain: list[nn.Module], drawn: Any) -> Provider:
    """A peer's LoRA linear.

    Only a peer that can be imported is measured, and only Unsloth's training linear can be called
    outside its own models.
    """
    importlib.import_module(name)
    if name != "unsloth":
        raise NotImplementedError("it imports, but has no LoRA linear that stands alone")
    if case.block != "linear" or case.what != "train":
        raise NotImplementedError("only its training linear is called here")
    lora = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    dtype = getattr(torch, case.dtype)
    calls, adapters = [], []
    for block, weights in zip(plain, drawn, strict=True):
        (proj, (A, B)) = next(iter(weights.items()))
        w = getattr(block, proj).weight
        A, B = (t.to(dtype).requires_grad_(True) for t in (A, B))

        def call(x: Tensor, w: Tensor = w, A: Tensor = A, B: Tensor = B) -> tuple[Tensor, ...]:
            return (lora.apply(x[None], w, None, A, B, float(ALPHA))[0],)

        calls.append(call)
        adapters.append({proj: (A, B)})
    return Provider(name, calls, adapters, dropout_off=True)
