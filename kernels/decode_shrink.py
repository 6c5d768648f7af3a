"""S of few rows for :mod:`.decode`, :mod:`.decode_quantised`: scale_i * X A_iᵀ in parts over K.

A program has some ranks of one adapter and a stretch of K, so that A is read once, by many programs
at a time, and a group's adapters need one launch. The parts are fp32; the programs that read S add
them in index order (no atomics), which saves the launch that would do it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import Launch, cast, cdiv, dot, next_pow2, precision, row_stride

VECTOR_RANKS = 4  # ranks of a program for one row
VECTOR_COLUMNS = 1024  # columns of A that such a program loads at a time
ROWS_RANKS = 16  # the same for several rows: the smallest tile of a product
ROWS_COLUMNS = 128


@triton.jit(do_not_specialize=["M", "part_stride"])
def _decode_shrink_kernel(
    x, As, parts, scales, ranks, columns, firsts, a_strides,
    M, K, K_PART, x_stride, s_stride, part_stride,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # The programs of the next launch may start: they stream W, and wait for this grid's end
        # before they read S.
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.program_id(1) * K_PART
    end = tl.minimum(begin + K_PART, K)
    for i in tl.static_range(G):
        rank0 = (tl.program_id(0) - firsts[i]) * BLOCK_R
        if (rank0 >= 0) & (rank0 < ranks[i]):
            rank = rank0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
            rank_ok = rank < ranks[i]  # [BLOCK_R]
            a_row = As[i] + rank.to(tl.int64)[:, None] * a_strides[i]  # [BLOCK_R, 1]
            out = parts + tl.program_id(1).to(tl.int64) * part_stride + columns[i] + rank
            if BLOCK_M == 1:
                sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
                for k0 in range(begin, end, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                    k_ok = k < end  # [BLOCK_K]
                    xs = tl.load(x + k, mask=k_ok, other=0.0)  # [BLOCK_K]
                    a_tile = tl.load(
                        a_row + k[None, :], mask=rank_ok[:, None] & k_ok[None, :], other=0.0
                    )  # [BLOCK_R, BLOCK_K]
                    a_tile = cast(a_tile, xs.dtype).to(tl.float32)
                    sums += a_tile * xs.to(tl.float32)[None, :]
                tl.store(out, tl.sum(sums, 1) * scales[i], mask=rank_ok)
            else:
                m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
                m_ok = m < M  # [BLOCK_M]
                x_row = x + m.to(tl.int64)[:, None] * x_stride  # [BLOCK_M, 1]
                acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                for k0 in range(begin, end, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                    k_ok = k < end  # [BLOCK_K]
                    xs = tl.load(
                        x_row + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0
                    )  # [BLOCK_M, BLOCK_K]
                    a_tile = tl.load(
                        a_row + k[None, :], mask=rank_ok[:, None] & k_ok[None, :], other=0.0
                    )  # [BLOCK_R, BLOCK_K]
                    acc = dot(xs, tl.trans(cast(a_tile, xs.dtype)), acc, PRECISION)
                tl.store(
                    out[None, :] + m[:, None] * s_stride,
                    acc * scales[i],
                    mask=m_ok[:, None] & rank_ok[None, :],
                )


def plan_parts(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    scales: Sequence[float],
    split_k: int,
    early: bool,
) -> tuple[torch.Tensor, Launch]:
    """(S in parts, fp32 [parts, M, sum r], the launch that fills them); all checked already.

    A_i [r_i, K] has a unit stride along its rows. ``early``: the next launch in the stream may
    start while this one runs.
    """
    (M, K), ranks = x.shape, tuple(a.shape[0] for a in As)
    one = M == 1
    block_r = VECTOR_RANKS if one else ROWS_RANKS
    block_k = VECTOR_COLUMNS if one else ROWS_COLUMNS
    k_part = cdiv(cdiv(K, split_k), block_k) * block_k
    split = cdiv(K, k_part)
    chunks = [cdiv(r, block_r) for r in ranks]
    total = sum(ranks)
    parts = x.new_empty((split, M, total), dtype=torch.float32)
    args = (
        x, tuple(As), parts, tuple(float(c) for c in scales), ranks,
        tuple(sum(ranks[:i]) for i in range(len(ranks))),
        tuple(sum(chunks[:i]) for i in range(len(ranks))), tuple(a.stride(0) for a in As),
        M, K, k_part, row_stride(x), total, M * total,
    )  # fmt: skip
    meta = dict(
        G=len(ranks), BLOCK_M=1 if one else max(16, next_pow2(M)), BLOCK_K=block_k,
        BLOCK_R=block_r,
        PRECISION=precision(x.dtype), EARLY=early, num_warps=4,
        num_stages=1 if one else 3,  # for one row, both steps of its loop are asked for at once
    )  # fmt: skip
    return parts, Launch(_decode_shrink_kernel, (sum(chunks), split), args, meta)
