"""The sum over the experts of each token, with its routing weights.

    Out[t] = Σ_j weights[t, j] · Y[t·k + j]

It is the end of a mixture's forward, and without weights that of the gradient of its tokens. Sums
are in fp32, in the order of j, so two runs agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Launch, cast, cdiv, next_pow2, row_stride
from .launching import planned

AHEAD = 16  # rows that are on their way at a time; most models have fewer experts for a token


@dataclass(frozen=True)
class ExpertsCombineConfig:
    """A program makes block_n columns of one token."""

    block_n: int = 1024
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        checks.blocks(self, block_n=self.block_n)


@triton.jit
def _experts_combine_kernel(
    out, y, weights, N, y_stride, weights_stride,
    k: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ok = col < N  # [BLOCK_N]
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for j0 in range(0, k, AHEAD):
        for i in tl.static_range(AHEAD):
            j = j0 + i
            row = tl.load(
                y + (token * k + j) * y_stride + col, mask=ok & (j < k), other=0.0
            )  # [BLOCK_N]
            if weights is None:
                acc += row.to(tl.float32)
            else:
                weight = tl.load(weights + token * weights_stride + j, mask=j < k, other=0.0)
                acc += row.to(tl.float32) * weight.to(tl.float32)
    tl.store(out + token * N + col, cast(acc, out.dtype.element_ty), mask=ok)


def plan_combine(
    out: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
    k: int,
    config: ExpertsCombineConfig | None = None,
) -> list[Launch]:
    """The launch that fills ``out`` [T, N] (contiguous); the arguments are checked already."""
    T, N = out.shape
    c = config or ExpertsCombineConfig(min(1024, max(16, next_pow2(N))))
    args = (
        out, y, weights, N, row_stride(y), 0 if weights is None else row_stride(weights),
    )  # fmt: skip
    meta = dict(
        k=k, AHEAD=min(k, AHEAD), BLOCK_N=c.block_n,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return [Launch(_experts_combine_kernel, (T, cdiv(N, c.block_n)), args, meta)]


@planned()
def combine(
    y: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    k: int | None = None,
    dtype: torch.dtype | None = None,
    config: ExpertsCombineConfig | None = None,
) -> torch.Tensor:
    """Out [T, N] in ``dtype`` (default y's), Out[t] = Σ_j weights[t, j] · Y[t·k + j].

    y [T·k, N] fp16/bf16/fp32 by pair, any row stride; weights [T, k] of any such dtype, or None for
    the plain sum, which takes ``k``. Errors: TypeError, ValueError, before any launch.
    """
    y = checks.rows("y", y)
    P, N = y.shape
    if weights is not None:
        weights = checks.rows("weights", weights)
        if k not in (None, weights.shape[1]):
            raise ValueError(f"k is {k}; allowed: {weights.shape[1]}, the columns of weights")
        k = weights.shape[1]
    if k is None or k < 1 or P % k:
        raise ValueError(f"k is {k}; allowed: a whole number that divides the {P} rows of y")
    T = P // k
    if weights is not None:
        checks.shape("weights", weights, (T, k), "y has T·k rows")
    if dtype not in (None, *checks.DTYPES):
        raise TypeError(f"dtype is {dtype}; allowed: float16, bfloat16, float32")
    checks.device(y=y, weights=weights)
    out = y.new_empty((T, N), dtype=dtype or y.dtype)
    if out.numel():
        for launch in plan_combine(out, y, weights, k, config):
            launch.run()
    return out
