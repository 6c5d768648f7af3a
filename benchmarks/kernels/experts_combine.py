"""The entry of the kernel that sums the experts of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_combine
from peftkern.kernels.common import Arch

from .entry import BF16, FP32, Case, KernelEntry, Operands, meta, named
from .experts import LAYERS
from .traffic import Facts, Traffic, cdiv, nbytes


def _traffic(f: Facts) -> Traffic:
    out, y, weights = f["out"], f["y"], f["weights"]
    return Traffic(
        "experts combine", 1,
        read=nbytes(y) + nbytes(weights),
        written=nbytes(out),
        flops=2 * y.shape[0] * y.shape[1],
        unit="fp32",
        requested=nbytes(y) + nbytes(weights) * cdiv(f["N"], f["BLOCK_N"]),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    q = LAYERS["qwen3"]
    for dtype, weighted, k in ((BF16, FP32, 8), (BF16, None, 8), (BF16, BF16, 4), (FP32, FP32, 8)):
        y, out = meta(q.T * k, q.width, dtype=dtype), meta(q.T, q.width, dtype=dtype)
        weights = None if weighted is None else meta(q.T, k, dtype=weighted)
        name = f"{dtype} {weighted} k{k}".replace("torch.", "")
        launches = experts_combine.plan_combine(out, y, weights, k)
        yield from named(f"experts combine {name}", launches)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for k in (1, 2, 3, 12):
        y, weights = o(o.M * k, o.N), o(o.M, k, dtype=FP32)
        yield f"experts combine k={k}", [experts_combine.combine(y, weights)]
    yield "experts combine, plain sum", [experts_combine.combine(y, None, k=k, dtype=torch.float32)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    y, weights = o(4 * o.M, o.N), o(o.M, 4, dtype=FP32)
    yield lambda: experts_combine.combine(y, weights)


ENTRY = KernelEntry(
    traffic={"_experts_combine_kernel": _traffic},
    cases=_cases,
    sanitize=_sanitize,
    counted=_counted,
)
