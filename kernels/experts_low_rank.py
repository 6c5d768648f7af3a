"""S Bᵀ of a tile of sorted rows, whose expert and adapter choose B.

S [P, r] by sorted row; B [E, N, r_i] of each adapter, of any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from . import checks
from .common import cast, device_function, dot, keep_tile


def integers(bs: Sequence[torch.Tensor], ranks: Sequence[int]) -> tuple[Any, ...]:
    """Ranks and strides as :func:`factor_of` takes them."""
    strides = [tuple(b.stride(i) for b in bs) for i in range(3)]
    if len(bs) < 2:
        return tuple(ranks), *strides
    e, n, r = (tuple(16 * v for v in values) for values in strides)
    ones = (16,) * len(bs)
    return tuple(16 * v for v in ranks), e, None if n == ones else n, None if r == ones else r


def aligned(bs: Sequence[torch.Tensor], ranks: Sequence[int]) -> bool:
    """True when tiles of every B and of S can be read 16 bytes at a time.

    All have unit stride in one dimension, the same in all.
    """

    def along(b: torch.Tensor, inner: int) -> bool:
        outer = (stride for i, stride in enumerate(b.stride()) if i != inner)
        return b.stride(inner) == 1 and all(n * b.element_size() % 16 == 0 for n in outer)

    whole = all(b.data_ptr() % 16 == 0 for b in bs) and all(r % 8 == 0 for r in ranks)
    return whole and any(all(along(b, inner) for b in bs) for inner in (1, 2))


@device_function
def factor_of(
    adapter, bs, ranks, e_strides, n_strides, r_strides,
    ALIGNED: tl.constexpr, WHOLE_RANKS: tl.constexpr,
):  # fmt: skip
    """(B of one adapter, its rank, its strides), with strides as int64 or known.

    With several adapters the integers of tuples come multiplied by 16, so that their values never
    specialise the kernel, and strides that are all 1 come as None. What is known of the values is
    said here: of what a function returns, a hint is lost. WHOLE_RANKS: ranks are multiples of 8.
    """
    if len(bs) == 1:
        b, rank = bs[0], ranks[0]
        e_step, n_step, r_step = e_strides[0], n_strides[0], r_strides[0]
    else:
        zero = adapter.to(tl.int64) * 0
        at, rank, e_step, n_step, r_step = zero, adapter * 0, zero, zero, zero
        for i in tl.static_range(len(bs)):
            here = adapter == i
            at = tl.where(here, bs[i].to(tl.int64), at)
            rank = tl.where(here, ranks[i] >> 4, rank)
            e_step = tl.where(here, zero + (e_strides[i] >> 4), e_step)
            if n_strides is not None:
                n_step = tl.where(here, zero + (n_strides[i] >> 4), n_step)
            if r_strides is not None:
                r_step = tl.where(here, zero + (r_strides[i] >> 4), r_step)
        b = at.to(bs[0].dtype)
        if ALIGNED:  # then 16 bytes are read at a time
            whole: tl.constexpr = 128 // bs[0].dtype.element_ty.primitive_bitwidth
            b = tl.multiple_of(b, 16)
            if WHOLE_RANKS:
                rank = tl.multiple_of(rank, 8)
            e_step = tl.multiple_of(e_step, whole)
            if n_strides is not None:
                n_step = tl.multiple_of(n_step, whole)
            if r_strides is not None:
                r_step = tl.multiple_of(r_step, whole)
        if n_strides is None:
            n_step = 1
        if r_strides is None:
            r_step = 1
    return b, rank, e_step, n_step, r_step


@device_function
def add_update(
    acc, s, bs, words, ranks, e_strides, n_strides, r_strides, s_stride, expert, adapter,
    row, col, row_ok, col_ok, n0, WORDS, RANK_END,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + mask * (S Bᵀ), with B of one expert and one adapter."""
    b, rank, e_step, n_step, r_step = factor_of(
        adapter, bs, ranks, e_strides, n_strides, r_strides, ALIGNED, True
    )
    end = RANK_END if len(bs) == 1 else rank
    s_row = s + row.to(tl.int64)[:, None] * s_stride  # [BLOCK_M, 1]
    b_col = b + expert.to(tl.int64) * e_step + col.to(tl.int64)[None, :] * n_step  # [1, BLOCK_N]
    part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if words is not None else acc
    for r0 in tl.range(0, end, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        r_ok = r < rank  # [BLOCK_R]
        left = tl.load(
            s_row + r[None, :], mask=row_ok[:, None] & r_ok[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_R]
        right = tl.load(
            b_col + r.to(tl.int64)[:, None] * r_step,
            mask=r_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        part = dot(left, cast(right, left.dtype), part, PRECISION)
    if words is not None:
        keep = keep_tile(words, row, row_ok, n0, WORDS, BLOCK_M, BLOCK_N)
        part = acc + tl.where(keep, part, 0.0)
    return part


# ------------------------------------------------------------------------------------------ checks


def check_factors(
    name: str,
    ts: Sequence[torch.Tensor | None],
    count: int,
    experts: int,
    axis: int,
    size: int,
    dtype: torch.dtype,
    *,
    may_be_none: bool = False,
) -> list[torch.Tensor | None]:
    """A [E, r_i, K] or B [E, N, r_i] of each of ``count`` adapters, checked; None without weights.

    The ranks are on ``axis``, and ``size`` is K or N. Each is fp32 or ``dtype``; if these are
    mixed, all are returned as fp32, because a launch has one signature. ``may_be_none``: no adapter
    needs to have weights.
    """
    given, of = list(ts), "[E, r, K]" if axis == 1 else "[E, N, r]"
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries; allowed: {count}, one for each adapter")
    if count > checks.MAX_ADAPTERS:
        raise ValueError(f"{name} has {count} entries; allowed: at most {checks.MAX_ADAPTERS}")
    if not may_be_none and all(t is None for t in given):
        raise ValueError(f"{name} has no tensor; allowed: {of} for one adapter or more")
    for i, t in enumerate(given):
        if t is None:
            continue
        if t.dim() != 3:
            raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}; allowed: {of}")
        r = t.shape[axis]
        checks.rank(f"{name}[{i}]", r)
        want = (experts, r, size) if axis == 1 else (experts, size, r)
        checks.shape(f"{name}[{i}]", t, want, f"{of} for these experts")
        checks.adapter_dtype(f"{name}[{i}]", t, dtype)
    if len({t.dtype for t in given if t is not None}) > 1:
        return [None if t is None else t.float() for t in given]
    return given
