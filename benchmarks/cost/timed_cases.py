"""The cases of the model of time: their launches, and the rows of ``benchmarks.gpu`` beside them.

A new case is one function here that gives a :class:`Case`, and its name in :data:`CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.kernels import prefix_decode
from peftkern.kernels.common import Arch

from ..gpu import experts as gpu_experts
from ..gpu import report as gpu_report
from ..gpu.providers import OURS, PEFT_BF16, PEFT_FP32, PLAIN
from ..gpu.report import LOOP
from ..kernels.entry import meta
from ..kernels.traffic import Traffic
from . import cases as cost_cases
from . import experts as cost_experts
from . import experts_floor
from . import floor as cost_floor
from . import fp8 as cost_fp8
from .cases import BF16, FP32, PROVIDERS, Provider, Shape
from .count import Counter, as_cuda
from .gpus import GPUS, Gpu
from .prefix import PrefixShape

SHAPE = Shape(8192, 4096, 4096, 16)
DECODED = PrefixShape(8, 512, 128)  # T is the number of own keys
FLOOR = "floor"
# the names of cost's providers in results of ``benchmarks.gpu``, whose adapters are float32
MEASURED = {
    "plain frozen": PLAIN,
    "HF PEFT bf16": PEFT_BF16,
    "HF PEFT default": PEFT_FP32,
} | {f"triton {name} fp32": OURS[name] for name in ("hybrid", "joined", "fused")}
_TRAINED = (FLOOR, "plain frozen", "HF PEFT bf16", "HF PEFT default", "triton joined",
            "triton joined fp32", "triton fused fp32", "triton hybrid fp32")  # fmt: skip

_TITLES = {
    "linear": "LoRA linear, K=N=4096, r=16",
    "qkv": "q, k, v of one X, K=4096, N=4096, 1024, 1024, r=16",
    "mlp": "Llama-8B MLP, 3 adapters, r=16",
    "layer": "Llama-8B layer, 7 adapters, r=16",
}

Phases = dict[str, list[Traffic]]


class Case(NamedTuple):
    """A table of the model: {provider: {phase: launches}}, against the provider ``base``.

    ``row`` is the key of its row in results of ``benchmarks.gpu``, ``measured`` the names of its
    providers there; ``graph`` tells that the row was measured without the host.
    """

    title: str
    providers: dict[str, Phases]
    base: str
    row: str
    measured: dict[str, str] = MEASURED
    graph: bool = False


def _trained(case: str, p: float, row: str) -> Callable[[Gpu], Case]:
    """A case of ``benchmarks.cost``, forward and backward, with dropout ``p``."""

    def make(gpu: Gpu) -> Case:
        found = {}
        for who in PROVIDERS:
            if who.name in _TRAINED:
                count = cost_cases.measure(who, case, SHAPE, p, Arch(*gpu.arch))
                found[who.name] = {"fwd": count.forward, "bwd": count.backward}
        title = f"{_TITLES[case]}, forward and backward, M={SHAPE.M}, dropout {p:g}"
        return Case(title, found, "plain frozen", f"{row} 8B M={SHAPE.M} r=16 p={p:g} train")

    return make


# GPUs on which torch multiplies with block scales, and the ways there to quantise X and dY
FP8_GPUS = tuple(name for name, gpu in GPUS.items() if gpu.arch[1] == cost_fp8.CAPABILITY)
FP8 = "fp8 base, quantised in the kernels' passes"
_FP8 = (
    Provider("plain frozen", "plain"),
    Provider("bf16 base, triton joined fp32", "joined", FP32),
    Provider(FP8, "joined", FP32, cost_fp8.FUSED),
    Provider("fp8 base, quantised in a pass each", "joined", FP32, cost_fp8.PASS),
    Provider("fp8 base, quantised by torch's operations", "joined", FP32, cost_fp8.TORCH),
)  # fmt: skip


def _fp8_layer(p: float) -> Callable[[Gpu], Case]:
    """A Llama-8B layer on an fp8 base, beside the frozen bf16 one."""

    def make(gpu: Gpu) -> Case:
        found = {}
        for who in _FP8:
            count = cost_cases.measure(who, "layer", SHAPE, p, Arch(*gpu.arch))
            found[who.name] = {"fwd": count.forward, "bwd": count.backward}
        title = f"{_TITLES['layer']} on an fp8 base, M={SHAPE.M}, dropout {p:g}"
        return Case(title, found, "plain frozen", f"layer fp8 8B M={SHAPE.M} r=16 p={p:g} train")

    return make


def _without_gradients(call: Callable[[], Any]) -> Phases:
    with as_cuda(), torch.no_grad(), Counter() as counter:
        call()
    return {"fwd": counter.launches}


def _one_row(gpu: Gpu) -> Case:
    shape = SHAPE._replace(M=1)
    group = cost_floor.Group(1, shape.K, (shape.N,), shape.r)
    found: dict[str, Phases] = {FLOOR: {"fwd": [cost_floor.forward(group)]}}
    names = ("plain frozen", "HF PEFT bf16", "HF PEFT default", "triton joined",
             "triton joined fp32")  # fmt: skip
    for who in (who for who in PROVIDERS if who.name in names):
        # without gradients one row takes the kernel of its own, whatever the product
        name = who.name.replace("triton joined", "peftkern")
        found[name] = cost_cases.inferred(who, shape, Arch(*gpu.arch))
    measured = MEASURED | {"peftkern fp32": OURS["joined"]}
    row = "q_proj 8B M=1 r=16 p=0 infer graph"
    return Case("One row, K=N=4096, r=16", found, "plain frozen", row, measured, graph=True)


def _loop(x: Tensor, w: Tensor, count: int, r: int) -> None:
    """HF PEFT's way of a mixed batch: each adapter in turn, on the rows that name it."""
    y, rows = x @ w.t(), meta(x.shape[0] // count, dtype=torch.int64)
    for _ in range(count):
        a, b = meta(r, x.shape[1]), meta(y.shape[1], r)
        y[rows] += (x[rows] @ a.t()) @ b.t() * 2.0


def _mixed(gpu: Gpu) -> Case:
    """16 samples of one row and 8 adapters: two samples of each at worst."""
    from peftkern.ops import triton_backend
    from peftkern.ops.lora_mixed import Adapter, SampleIndex

    M, count, (_, K, N, r) = 16, 8, SHAPE
    x, w = meta(M, K), meta(N, K)
    plain = _without_gradients(lambda: x @ w.t())
    (product,) = plain["fwd"]
    floor = product._replace(
        name=FLOOR,
        read=product.read + count * 2 * r * (K + N),
        flops=product.flops + 2 * M * r * (K + N),
    )
    found: dict[str, Phases] = {FLOOR: {"fwd": [floor]}, "plain frozen": plain}
    found[LOOP] = _without_gradients(lambda: _loop(x, w, count, r))
    for name, dtype in (("peftkern", BF16), ("peftkern fp32", FP32)):
        adapters = [
            Adapter(meta(r, K, dtype=dtype), meta(N, r, dtype=dtype), 2.0) for _ in range(count)
        ]
        samples = SampleIndex([i % count for i in range(M)], count)

        def call(adapters: list[Adapter] = adapters, samples: SampleIndex = samples) -> Tensor:
            return triton_backend.mixed(x, w, None, adapters, samples)

        with cost_cases.backend("joined", Arch(*gpu.arch)):
            found[name] = _without_gradients(call)
    row = "mixed q_proj 8B M=16 T=1 r=16 adapters=8"
    title = "A mixed batch, M=16, 8 adapters, K=N=4096, r=16"
    measured = {"plain frozen": PLAIN, LOOP: LOOP, "peftkern": gpu_report.MIXED}
    return Case(title, found, "plain frozen", row, measured, graph=True)


def _prefix_decode(gpu: Gpu) -> Case:
    B, S, P, H, H_kv, D = DECODED
    q, k, v = (meta(B, n, h, D).transpose(1, 2) for n, h in ((1, H), (S, H_kv), (S, H_kv)))
    prefix = [meta(H_kv, P, D) for _ in range(2)]
    size = 2 * D  # bytes of a row
    out, own, shared = B * H * size, 2 * B * H_kv * S * size, 2 * H_kv * P * size
    flops = 4 * B * H * D * (S + P)

    def attention(name: str, keys: int) -> Traffic:
        return Traffic(name, 1, out + keys, out, flops, "matrix")

    # as with a cache: the new row is concatenated to all keys and values, which are then read
    joined = own + B * shared
    copy = Traffic("cat", 1, joined // 2, joined // 2)
    found: dict[str, Phases] = {
        FLOOR: {"fwd": [attention(FLOOR, own + shared)]},
        "plain frozen": {"fwd": [attention("attention", own)._replace(flops=4 * B * H * D * S)]},
        "HF PEFT bf16": {"fwd": [copy, copy, attention("attention", joined)]},
    }
    with cost_cases.backend("joined", Arch(*gpu.arch)):
        found["peftkern"] = _without_gradients(lambda: prefix_decode.decode(q, k, v, *prefix))
    measured = {"plain frozen": PLAIN, "HF PEFT bf16": PEFT_BF16, "peftkern": gpu_report.PREFIX}
    title = f"A prefix, one token, B={B} P={P} S={S}, {H}/{H_kv} heads of {D}, a layer"
    row = f"prefix decode B={B} T=1 S={S} P={P} {H}/{H_kv}x{D}"
    return Case(title, found, "plain frozen", row, measured, graph=True)


_MIXED_MEASURED = {
    "plain frozen": PLAIN, "HF PEFT bf16": PEFT_BF16, "HF PEFT default": PEFT_FP32,
    "torch grouped fp32": OURS["torch"], "triton fp32": gpu_report.TRITON,
}  # fmt: skip


def _experts(case: str) -> Callable[[Gpu], Case]:
    """A step of a mixture's experts as ``benchmarks.cost`` counts it."""

    def make(gpu: Gpu) -> Case:
        found: dict[str, Phases] = {}
        for who in cost_experts.PROVIDERS:
            if who.name != "floor fp32":
                count = cost_experts.measure(who, case, Arch(*gpu.arch))
                found[who.name] = {"fwd": count.forward, "bwd": count.backward}
        row = gpu_experts.ExpertsCase(cost_experts.CASES[case], 8192).key
        title = f"{cost_experts.TITLES[case]}, forward and backward"
        return Case(title, found, "plain frozen", row, _MIXED_MEASURED)

    return make


def _experts_decode(gpu: Gpu) -> Case:
    """One token through a Qwen3-30B-A3B layer's experts, without gradients."""
    case, arch = "experts qwen3", Arch(*gpu.arch)
    found: dict[str, Phases] = {
        FLOOR: {"fwd": experts_floor.forward(cost_experts.mixture(case, BF16, T=1))}
    }
    for who in cost_experts.PROVIDERS:
        if who.kind not in ("floor", "split", "torch"):
            found[who.name] = {"fwd": cost_experts.inferred(who, case, 1, arch)}
    row = gpu_experts.ExpertsCase("qwen3", 1, "decode").key
    title = "One token through the experts of a Qwen3-30B-A3B layer, r=16"
    return Case(title, found, "plain frozen", row, _MIXED_MEASURED, graph=True)


CASES: dict[str, Callable[[Gpu], Case]] = {
    "linear": _trained("linear", 0.0, "q_proj"),
    "linear p=0.1": _trained("linear", 0.1, "q_proj"),
    "group": _trained("qkv", 0.0, "qkv"),
    "group p=0.1": _trained("qkv", 0.1, "qkv"),
    "decode": _one_row,
    "mixed": _mixed,
    "prefix decode": _prefix_decode,
    "mlp": _trained("mlp", 0.0, "mlp"),
    "mlp p=0.1": _trained("mlp", 0.1, "mlp"),
    "layer": _trained("layer", 0.0, "layer"),
    "layer p=0.1": _trained("layer", 0.1, "layer"),
    "layer fp8": _fp8_layer(0.0),
    "layer fp8 p=0.1": _fp8_layer(0.1),
    "experts qwen3": _experts("experts qwen3"),
    "experts gpt-oss": _experts("experts gpt-oss"),
    "experts decode": _experts_decode,
}


def kinds() -> Iterator[str]:
    """The names of the cases as the command takes them, without their dropout."""
    yield from dict.fromkeys(name.split(" p=")[0] for name in CASES)
