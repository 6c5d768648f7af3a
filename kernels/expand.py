"""The low-rank part as a new matrix, to which the vendor's GEMM then adds (``addmm_``).

This is the hybrid order. Forward: S Bᵀ + bias. Backward: the sum over the group of
mask_i * (dS_i A_i). Both are one kernel:

    out [M, N] = sum_i mask_i * (L_i R_i) + bias + add        L_i [M, r_i], R_i [r_i, N]

R_i is read through strides, so it may be Bᵀ or A itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import (
    Launch,
    add_low_rank,
    cast,
    cdiv,
    next_pow2,
    padded,
    precision,
    rank_end,
    row_stride,
)  # fmt: skip
from .launching import planned


@dataclass(frozen=True)
class ExpandConfig:
    """Tile of the output [block_m, block_n]; larger ranks are summed in chunks of block_r."""

    block_m: int = 64
    block_n: int = 128
    block_r: int = 64
    num_warps: int = 8
    num_stages: int = 2

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_r=self.block_r)
        checks.blocks(self, low=32, block_n=self.block_n)  # whole mask words


@triton.jit(do_not_specialize=["M"])
def _expand_kernel(
    out, Ls, Rs, words, bias, add, ranks, l_strides, r_strides, n_strides,
    M, N, out_stride, add_stride, WORDS, RANK_END,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n0 = (pid % tiles_n) * BLOCK_N
    col = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_ok, col_ok = row < M, col < N  # [BLOCK_M], [BLOCK_N]
    row64 = row.to(tl.int64)  # [BLOCK_M]
    ok = row_ok[:, None] & col_ok[None, :]  # [BLOCK_M, BLOCK_N]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        acc += tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        acc += tl.load(add + row64[:, None] * add_stride + col[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
    acc = add_low_rank(
        acc, Ls, Rs, words, ranks, l_strides, r_strides, n_strides, row, col, row_ok, col_ok, n0,
        WORDS, RANK_END, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    tl.store(
        out + row64[:, None] * out_stride + col[None, :], cast(acc, out.dtype.element_ty), mask=ok
    )


def default_config(M: int, ranks: Sequence[int]) -> ExpandConfig:
    """A config with 64x128 tiles, shorter for few rows; chunks are not wider than the ranks.

    (Writes bound the time of this kernel.)
    """
    block_m = 64 if M > 32 else max(16, next_pow2(M))
    return ExpandConfig(
        block_m=block_m,
        num_warps=8 if block_m == 64 else 4,
        block_r=min(64, padded(max(ranks))),
    )


def plan_expand(
    out: torch.Tensor,
    Ls: Sequence[torch.Tensor],
    Rs: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    config: ExpandConfig,
) -> list[Launch]:
    """The launch that fills ``out`` [M, N]; the arguments are checked, Rs may have any strides."""
    M, N = out.shape
    ranks = [r.shape[0] for r in Rs]
    args = (
        out, tuple(Ls), tuple(Rs), tuple(words), bias, add, tuple(ranks),
        tuple(row_stride(v) for v in Ls),
        tuple(r.stride(0) for r in Rs), tuple(r.stride(1) for r in Rs),
        M, N, row_stride(out), 0 if add is None else row_stride(add), cdiv(N, 32),
        rank_end(ranks, config.block_r),
    )  # fmt: skip
    meta = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.block_r,
        PRECISION=precision(Ls[0].dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    return [Launch(_expand_kernel, grid, args, meta)]


@planned()
def expand(
    s: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    add: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: ExpandConfig | None = None,
) -> torch.Tensor:
    """S Bᵀ (+ bias) (+ add), a new tensor [M, N] in ``out_dtype`` (default S's).

    s [M, r] fp16/bf16/fp32, any row stride (a column slice of a group's S); b [N, r] fp32 or s's
    dtype, any strides; bias [N]; add [M, N], for example the output of a base layer whose weight
    the kernels cannot read. Errors: TypeError, ValueError.
    """
    s = checks.rows("s", s)
    M, r = s.shape
    checks.rank("s", r)
    if b.dim() != 2:
        raise ValueError(f"b has shape {tuple(b.shape)}; allowed: [N, r]")
    N = b.shape[0]
    checks.shape("b", b, (N, r), "s has r columns")
    checks.adapter_dtype("b", b, s.dtype)
    if bias is not None:
        checks.shape("bias", bias, (N,), "b has N rows")
        bias = bias.contiguous()
    if add is not None:
        checks.shape("add", add, (M, N), "[rows of s, rows of b]")
        add = checks.rows("add", add)
    checks.device(s=s, b=b, bias=bias, add=add)
    out = s.new_empty((M, N), dtype=out_dtype or s.dtype)
    if out.numel():
        for launch in plan_expand(
            out, [s], [b.T], [None], bias, add, config or default_config(M, [r])
        ):
            launch.run()
    return out


@planned()
def low_rank_grad_input(
    ds: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    add: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: ExpandConfig | None = None,
) -> torch.Tensor:
    """The sum over adapters of mask_i * (dS_i A_i) (+ add), a new tensor [M, K].

    It is in ``out_dtype`` (default dS's). The base part, the sum of dY_i W_i, can then be added to
    it, or is ``add`` [M, K], of any float dtype. ds[i] [M, r_i] fp16/bf16/fp32, any row stride;
    As[i] [r_i, K] fp32 or that dtype; bits as in :func:`shrink.shrink`. Errors: TypeError,
    ValueError.
    """
    ds, As = list(ds), list(As)
    checks.counts(ds=ds, As=As)
    first = checks.rows("ds[0]", ds[0])
    M, dtype = first.shape[0], first.dtype
    ds = checks.low_rank("ds", [first, *ds[1:]], M, dtype, "M rows as ds[0]")
    checks.matrix("As[0]", As[0])
    K, shapes = As[0].shape[1], [(d.shape[1], As[0].shape[1]) for d in ds]
    As = checks.adapters("As", As, shapes, "[columns of ds[{i}], K]", dtype)
    words = checks.masks(bits, len(As), M, K)
    if add is not None:
        checks.shape("add", add, (M, K), "[rows of ds, columns of As]")
        add = checks.rows("add", add)
    checks.device(ds=ds, As=As, bits=words, add=add)
    out = ds[0].new_empty((M, K), dtype=out_dtype or ds[0].dtype)
    if out.numel():
        config = config or default_config(M, [d.shape[1] for d in ds])
        for launch in plan_expand(out, ds, As, words, None, add, config):
            launch.run()
    return out
