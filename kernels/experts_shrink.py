"""S = scale · (mask ∘ X) A_eᵀ for the sorted rows of a mixture, each with its expert's A.

X [T, K] of tokens, gathered in the load, or [P, K] of sorted rows; A [E, r, K]; S [P, r], in sorted
rows. dS = scale · dY B_e is the same with A = B_eᵀ. A program takes rows of one tile of the route
(:mod:`.experts_route`), so of one expert, and in a batch of several adapters of one adapter, whose
address it looks up. For few rows K is split: fp32 partials, then a sum in fixed order. A may have
its own dtype and any strides (those of PEFT's B are (1, r·E, E)), and is cast to X's in the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .experts_gates import pick
from .experts_low_rank import check_factors, factor_of, integers
from .experts_route import Route, checked_rows, source_rows
from .launching import planned
from .reduce import plan_sum
from .shrink import LAUNCH_RANK, accumulate, steps


@dataclass(frozen=True)
class ExpertsShrinkConfig:
    """Tiles of X [block_m, block_k], block_m at most the route's; K in split_k parts."""

    block_m: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_k=self.split_k)


def default_config(
    P: int, K: int, r: int, groups: int, block_m: int, arch: Arch, itemsize: int = 2
) -> ExpertsShrinkConfig:
    """A config with enough programs to fill the device, for a route with tiles of block_m rows.

    Blocks with many rows read A seldom. About half a block of each group is taken to be empty.
    """
    held = min(LAUNCH_RANK, padded(r))

    def programs() -> int:
        return cdiv(P, block_m) + min(P, groups) // 2

    most = 64 if held <= 64 or arch.warpgroups else 32
    while block_m > 16 and (block_m > most or programs() < arch.sms * 3 // 4):
        block_m //= 2
    split = max(1, min(arch.sms // max(1, programs()), K // 512))
    block_k, num_stages = steps(block_m, held, programs() * split, arch, itemsize)
    return ExpertsShrinkConfig(
        block_m=block_m,
        block_k=block_k,
        split_k=split,
        num_warps=8 if held > 64 or block_m * block_k * itemsize >= 16384 else 4,
        num_stages=num_stages,
    )


@triton.jit(do_not_specialize=["P", "k"])
def _experts_shrink_kernel(
    x, As, words, out, pairs, offsets, tile_group, tile_start,
    ranks, scales, e_strides, r_strides, k_strides,
    P, k, K, K_PART, x_stride, width, WORDS,
    ADAPTERS: tl.constexpr, GATHER: tl.constexpr, PIECES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of rows of a tile of the route, in PIECES blocks, a part of K, a chunk of ranks."""
    tile = tl.program_id(0) // PIECES
    part = tl.program_id(1)
    r0 = tl.program_id(2) * BLOCK_R
    group = tl.load(tile_group + tile)
    start = tl.load(tile_start + tile)
    end = start
    if group >= 0:
        end = tl.minimum(tl.load(offsets + group + 1), start + PIECES * BLOCK_M)
    start += tl.program_id(0) % PIECES * BLOCK_M
    if start < end:
        expert = (group // ADAPTERS).to(tl.int64)
        adapter = group % ADAPTERS
        a, rank, a_e, a_r, a_k = factor_of(
            adapter, As, ranks, e_strides, r_strides, k_strides, ALIGNED, False
        )
        scale = pick(scales, adapter)
        a += expert * a_e + r0.to(tl.int64) * a_r
        row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < end  # [BLOCK_M]
        source = source_rows(pairs, tl.minimum(row, end - 1), k, GATHER)  # [BLOCK_M]
        first = tl.multiple_of(part * K_PART, BLOCK_K)
        last = tl.minimum(first + K_PART, K)
        if ADAPTERS > 1:
            last = tl.where(r0 < rank, last, first)  # an adapter without weights has rank 0
        acc = accumulate(
            x + source[:, None] * x_stride, (a,), (words,), (rank - r0,), (a_r,), (a_k,),
            row, row_ok, first, last, WORDS, 1, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )[0]  # fmt: skip
        r = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        at = part.to(tl.int64) * P + row  # [BLOCK_M]
        tl.store(
            out + at[:, None] * width + r[None, :],
            cast(acc * scale, out.dtype.element_ty),
            mask=row_ok[:, None] & (r < width)[None, :],
        )


def plan_shrink(
    x: torch.Tensor,
    route: Route,
    a: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    gather: bool,
    words: torch.Tensor | None,
    out: torch.Tensor,
    config: ExpertsShrinkConfig,
) -> list[Launch]:
    """Launches that fill ``out`` [P, max r] (contiguous); the arguments are checked already."""
    K, (P, width) = x.shape[1], out.shape
    block_m = min(config.block_m, route.block_m)
    pieces = route.block_m // block_m
    # parts are whole tiles, so that no mask word is split
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split = cdiv(K, k_part)
    block_r = min(LAUNCH_RANK, padded(width))
    target = out if split == 1 else out.new_empty((split, P, width), dtype=torch.float32)
    some = next(t for t in a if t is not None)
    there = [some if t is None else t for t in a]
    ranks = [0 if t is None else t.shape[1] for t in a]
    ranks_of, *strides = integers(there, ranks)
    unit = len(a) > 1 and strides[2] is None
    args = (
        x, tuple(there), words, target, route.pairs, route.offsets, route.tile_group,
        route.tile_start, ranks_of, tuple(map(float, scales)), *strides,
        P, route.k, K, k_part, row_stride(x), width, cdiv(K, 32),
    )  # fmt: skip
    meta = dict(
        ADAPTERS=len(a), GATHER=gather, PIECES=pieces,
        ALIGNED=unit and aligned(there), BLOCK_M=block_m, BLOCK_K=config.block_k, BLOCK_R=block_r,
        PRECISION=precision(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (route.tiles * pieces, split, cdiv(width, block_r))
    launches = [Launch(_experts_shrink_kernel, grid, args, meta)]
    return launches if split == 1 else [*launches, plan_sum([(target, out)])]


def aligned(factors: Sequence[torch.Tensor]) -> bool:
    """True if every row of every factor starts on 16 bytes."""
    return all(
        (t.is_meta or t.data_ptr() % 16 == 0)
        and all(step * t.element_size() % 16 == 0 for step in t.stride()[:2])
        for t in factors
    )


@planned("scale")
def shrink(
    x: torch.Tensor,
    route: Route,
    a: Sequence[torch.Tensor | None],
    scale: float | Sequence[float] = 1.0,
    *,
    gather: bool,
    bits: torch.Tensor | None = None,
    config: ExpertsShrinkConfig | None = None,
) -> torch.Tensor:
    """S [P, max r_i] in x's dtype: scale_i · (mask ∘ x) A_i,eᵀ of each sorted row, e its expert.

    x fp16/bf16/fp32, any row stride, [T, K] with ``gather`` and [P, K] of sorted rows without; a: a
    tensor [E, r_i, K] for each of the route's adapters, fp32 or x's dtype, any strides, r_i from 1
    to 256, at most 64 of them, None for one without weights; bits: packed keep masks of the sorted
    rows, int32 [P, ceil(K / 32)]; scale_i must include 1 / (1 - p). S is zero past the rank of a
    row's adapter. Rows that are in no group of the route are not written. Errors: TypeError or
    ValueError naming the argument, before any launch.
    """
    x = checked_rows("x", x, route, gather)
    K = x.shape[1]
    factors = check_factors("a", a, route.adapters, route.experts, 1, K, x.dtype)
    scales = checks.per_adapter("scale", scale, route.adapters)
    words = checks.words("bits", bits, route.P, K)
    checks.device(x=x, a=factors, bits=words, pairs=route.pairs)
    width = max(t.shape[1] for t in factors if t is not None)
    out = x.new_empty((route.P, width))
    if route.P == 0:
        return out
    if K == 0:
        return out.zero_()
    config = config or default_config(
        route.P, K, width, route.groups, route.block_m, arch_of(x.device), x.element_size()
    )
    for launch in plan_shrink(x, route, factors, scales, gather, words, out, config):
        launch.run()
    return out
