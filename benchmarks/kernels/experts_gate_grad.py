"""The entry of the kernel for the gradients through a mixture's gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_gate_grad
from peftkern.kernels.common import Arch, Launch

from .entry import BF16, FP32, Case, KernelEntry, Operands, Timing, meta, named, tag
from .experts_gate import ALONE, GPT_OSS, QWEN3, Experts, small_route
from .experts_races import GATE_GRAD
from .traffic import Facts, Traffic, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    strips, groups, chunks = f["grid"]
    dh, b, s = f["dh"], f["b"], f["s"]
    streamed = chunks * (nbytes(dh) + nbytes(f["gu"]))
    rows = nbytes(f["weights"]) + nbytes(f["pairs"])  # each strip reads them, and S
    b = b if f["ds_parts"] is not None else None  # else another launch makes dS
    products = (b is not None) + (s is not None)
    return Traffic(
        "experts_gate_grad", 1,
        read=streamed + rows + nbytes(s) + nbytes(b),
        written=sum(nbytes(f[n]) for n in ("dgu", "h", "ds_parts", "db", "dw_parts")),
        flops=2 * dh.shape[0] * f["N"] * f["R"] * products,
        unit=unit_of(dh.dtype),
        requested=streamed + strips * (chunks * rows + nbytes(s)) + nbytes(b),
    )  # fmt: skip


def _sum(f: Facts) -> Traffic:
    read = nbytes(f["dw_parts"]) + nbytes(f["ds_parts"]) + nbytes(f["pairs"])
    return Traffic(
        "experts_gate_sum", 1, read, nbytes(f["dw"]) + nbytes(f["ds"]), requested=read
    )  # fmt: skip


def launches(
    shape: Experts, r: int, name: str, arch: Arch, *,
    sums: bool = True, dtype: torch.dtype = BF16, adapter: torch.dtype = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; r is 0 without an adapter."""
    P, K, N, E = shape.P, shape.I, shape.N, shape.E
    # as PEFT has it: expert e in columns e, e + E, ...
    b = meta(N, r * E, dtype=adapter).view(N, r, E).permute(2, 0, 1) if r else None
    s = meta(P, r, dtype=dtype) if r and sums else None
    out = experts_gate_grad.ExpertsGateGrads(
        meta(P, N, dtype=dtype), meta(P, K, dtype=dtype), meta(P, dtype=FP32),
        meta(P, r, dtype=dtype) if r else None,
        None if s is None else meta(E, N, r, dtype=FP32),
    )  # fmt: skip
    return experts_gate_grad.plan_gate_grad(
        meta(P, K, dtype=dtype), meta(P, N, dtype=dtype), shape.route(), name, shape.layout,
        meta(shape.T, shape.k, dtype=FP32), b, s, 1.0, shape.clamp, out,
        experts_gate_grad.default_config(r, shape.layout, arch, dtype.itemsize), arch,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for what, shape, r, name, dtype in (
        ("qwen3", QWEN3, 16, "silu", BF16), ("qwen3", QWEN3, 0, "silu", BF16),
        ("qwen3", QWEN3, 32, "silu", BF16), ("qwen3", QWEN3, 64, "silu", BF16),
        ("qwen3", QWEN3, 256, "silu", BF16), ("qwen3", QWEN3, 16, "silu", FP32),
        ("gpt-oss", GPT_OSS, 16, "silu", BF16), ("gpt-oss", GPT_OSS, 64, "silu", BF16),
        ("gpt-oss", GPT_OSS, 0, "silu", BF16), ("gpt-oss", GPT_OSS, 16, "silu", FP32),
        ("gelu_tanh", QWEN3, 16, "gelu_tanh", BF16), ("relu2 alone", ALONE, 16, "relu2", BF16),
    ):  # fmt: skip
        plan = launches(shape, r, name, arch, dtype=dtype)
        yield from named(f"experts_gate_grad {what} {tag(r, dtype=dtype)}", plan)
    plan = launches(QWEN3, 16, "silu", arch, sums=False)
    yield from named(f"experts_gate_grad qwen3 without S {tag(16)}", plan[:1])


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    small = small_route(o)
    last = int(small.offsets[-1])
    dh, gu, weights = o(small.P, o.K), o(small.P, 2 * o.K), o(o.M, small.k, dtype=FP32)
    for layout, r in (("halves", 5), ("interleaved", 5), ("halves", 150)):
        config = experts_gate_grad.ExpertsGateGradConfig(16, 32, 32, 4, 2)
        b, s = o(4, 2 * o.K, r, dtype=FP32), o(small.P, r)
        found = experts_gate_grad.gate_grad(
            dh, gu, small, "silu", layout, weights, b, s, 2.0, config=config
        )
        dgu, h, dw, ds, db = found
        rows = [t[:last] for t in (dgu, h, ds) if t is not None]
        yield f"experts_gate_grad {layout} r{r}", rows + [t for t in (dw, db) if t is not None]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    small, b = small_route(o), o(4, 2 * o.K, o.r, dtype=FP32)
    dh, gu, weights = o(small.P, o.K), o(small.P, 2 * o.K), o(o.M, small.k, dtype=FP32)
    s = o(small.P, o.r)
    yield lambda: experts_gate_grad.gate_grad(dh, gu, small, "silu", "halves", weights, b, s)


ENTRY = KernelEntry(
    traffic={"_experts_gate_grad_kernel": _traffic, "_experts_gate_sum_kernel": _sum},
    timing={"_experts_gate_sum_kernel": Timing(near=True)},
    cases=_cases,
    ops=GATE_GRAD,
    sanitize=_sanitize,
    counted=_counted,
)
