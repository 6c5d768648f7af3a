"""H of a mixture's gate, with the S of the adapter that reads it, in one pass over GU.

Rows are in the order of a :class:`.experts_route.Route`. GU is [P, 2·I] or [P, I], H [P, I] and
A [E, r, I]; :mod:`.experts_gates` has the gates. For a row of expert e

    H = gate(GU)        S = scale * (mask H) A_eᵀ

A program has rows of one tile of the route, so one expert's A, and a part of I. H is rounded before
S is made of it and is not read again. The sum over I is split over programs; a second kernel adds
their fp32 partials in fixed order (no atomics). Above RANKS ranks GU is read again for each further
RANKS of them.
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
    dot,
    keep_tile,
    next_pow2,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .experts_gates import (
    Clamp,
    check_gate,
    check_rows,
    constants,
    gated,
    inner_width,
    load_gate,
    pick,
)
from .experts_low_rank import check_factors
from .experts_route import Route
from .launching import planned
from .reduce import plan_sum

RANKS = 128  # that a program makes of S


@dataclass(frozen=True)
class ExpertsGateConfig:
    """Tiles of H [block_m, block_k], block_m at most the route's; I is split into split_k parts."""

    block_m: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_k=self.split_k)


def default_config(P: int, width: int, r: int, arch: Arch, itemsize: int = 2) -> ExpertsGateConfig:
    """A config like that of :func:`.mlp.default_config`; r is 0 without an adapter."""
    r = min(r, RANKS)
    small = arch.blackwell or arch.shared <= 160_000 or itemsize == 4
    tall = 32 if r == 0 or (r <= 32 and small) or (r > 64 and not arch.warpgroups) else 64
    block_m = min(tall, max(16, next_pow2(P)))
    warps = 8 if r > 32 else 4
    slots = arch.sms * (16 // warps)
    return ExpertsGateConfig(
        block_m=block_m,
        split_k=max(1, min(slots // cdiv(max(P, 1), block_m), width // 512)),
        num_warps=warps,
    )


@triton.jit
def _experts_gate_kernel(
    gu, h, As, words, s, offsets, tile_group, tile_start, scales, ranks,
    a_e_strides, a_r_strides, a_k_strides, alpha, limit, plus,
    K, R, K_PART, gu_stride, h_stride, s_part_stride, WORDS,
    ACT: tl.constexpr, CLAMPED: tl.constexpr, LAYOUT: tl.constexpr, ADAPTERS: tl.constexpr,
    TILE_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SUBS: tl.constexpr = (TILE_M + BLOCK_M - 1) // BLOCK_M
    tile, part = tl.program_id(0) // SUBS, tl.program_id(1)
    group = tl.load(tile_group + tile)
    if group >= 0:
        start = tl.load(tile_start + tile)
        end = tl.minimum(start + TILE_M, tl.load(offsets + group + 1))
        row = start + tl.program_id(0) % SUBS * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = row < end  # [BLOCK_M]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        gu_row = gu + row64[:, None] * gu_stride  # [BLOCK_M, 1]
        h_row = h + row64[:, None] * h_stride  # [BLOCK_M, 1]
        own_ok = row_ok & (tl.program_id(2) == 0)  # rows of H are written once
        first = part * K_PART
        last = tl.minimum(first + K_PART, K)
        if As is not None:
            adapter = group % ADAPTERS
            a = pick(As, adapter) + (group // ADAPTERS).to(tl.int64) * pick(a_e_strides, adapter)
            rank_ok = rank < pick(ranks, adapter)  # [BLOCK_R]
            a_rank = a + rank.to(tl.int64)[None, :] * pick(a_r_strides, adapter)  # [1, BLOCK_R]
            a_k_stride = pick(a_k_strides, adapter)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        # the number of stages stands here because a loop without products is not pipelined
        # otherwise
        for k0 in tl.range(first, last, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            k_ok = k < last  # [BLOCK_K]
            g, u = load_gate(gu_row, k0, row_ok, K, LAYOUT, BLOCK_M, BLOCK_K)
            value = gated(g, u, alpha, limit, plus, ACT, CLAMPED, LAYOUT == "alone")
            tl.store(h_row + k[None, :], value, mask=own_ok[:, None] & k_ok[None, :])
            if As is not None:
                a_tile = tl.load(
                    a_rank + k.to(tl.int64)[:, None] * a_k_stride,
                    mask=rank_ok[None, :] & k_ok[:, None],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_R]
                kept = value
                if words is not None:
                    keep = keep_tile(words, row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                    kept = tl.where(keep, value, 0.0).to(value.dtype)  # [BLOCK_M, BLOCK_K]
                acc = dot(kept, cast(a_tile, value.dtype), acc, PRECISION)
        if As is not None:
            tl.store(
                s + part.to(tl.int64) * s_part_stride + row64[:, None] * R + rank[None, :],
                cast(acc * pick(scales, adapter), s.dtype.element_ty),
                mask=row_ok[:, None] & (rank < R)[None, :],
            )


def plan_gate(
    gu: torch.Tensor,
    route: Route,
    name: str,
    layout: str,
    h: torch.Tensor,
    As: Sequence[torch.Tensor | None] | None,
    words: torch.Tensor | None,
    scales: Sequence[float],
    s: torch.Tensor | None,
    clamp: tuple[float, float, float] | None,
    config: ExpertsGateConfig,
) -> list[Launch]:
    """Launches that fill h [P, I] and, with ``As``, s [P, r] (both contiguous).

    The arguments are checked already.
    """
    (P, K), R = h.shape, 1 if s is None else s.shape[1]
    # parts are whole tiles, so that no mask word is split
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split = cdiv(K, k_part)
    parts = s if s is None or split == 1 else s.new_empty((split, P, R), dtype=torch.float32)
    some = next((a for a in As or () if a is not None), None)
    full = tuple(some if a is None else a for a in As or ())
    block_m = min(config.block_m, max(16, next_pow2(route.block_m)))
    block_r = min(RANKS, padded(R))
    args = (
        gu, h, full or None, words, parts, route.offsets, route.tile_group, route.tile_start,
        tuple(map(float, scales)), tuple(0 if a is None else a.shape[1] for a in As or ()),
        *(tuple(a.stride(i) for a in full if a is not None) for i in range(3)), *constants(clamp),
        K, R, k_part, row_stride(gu), row_stride(h), P * R, cdiv(K, 32),
    )  # fmt: skip
    meta = dict(
        ACT=name, CLAMPED=clamp is not None, LAYOUT=layout, ADAPTERS=route.adapters,
        TILE_M=route.block_m, BLOCK_M=block_m, BLOCK_K=config.block_k, BLOCK_R=block_r,
        PRECISION=precision(gu.dtype), STAGES=config.num_stages,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (route.tiles * cdiv(route.block_m, block_m), split, cdiv(R, block_r))
    launches = [Launch(_experts_gate_kernel, grid, args, meta)]
    if s is not None and parts is not None and parts is not s:
        launches.append(plan_sum([(parts, s)]))
    return launches


@planned("scale")
def gate(
    gu: torch.Tensor,
    route: Route,
    name: str = "silu",
    layout: str = "halves",
    a: Sequence[torch.Tensor | None] | None = None,
    scale: float | Sequence[float] = 1.0,
    bits: torch.Tensor | None = None,
    *,
    clamp: Clamp | tuple[float, float, float] | None = None,
    config: ExpertsGateConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(H [P, I], S [P, r] or None without ``a``), both in GU's dtype, in the route's order of rows.

    Rows of pairs that are in no tile of the route are not written.

    Args:
        gu: [P, 2·I] or, ``alone``, [P, I], fp16/bf16/fp32, any row stride.
        name: one of :data:`.mlp_arguments.ACTIVATIONS`.
        layout: one of :data:`.experts_gates.LAYOUTS`.
        a: for each of the route's adapters A [E, r_i, I] in fp32 or gu's dtype, any strides, r_i
            from 1 to 256, or None. r is the largest rank; columns past an adapter's rank are 0.
        scale: of S, for all adapters or for each; it must include 1 / (1 - p).
        bits: the packed keep mask of H, int32 [P, ceil(I / 32)], in the route's order of rows.
        clamp: (α, limit, plus) of a clamped gate, with silu.

    Raises:
        TypeError, ValueError: naming the argument, before any launch.
    """
    gu = check_gate(gu, name, layout, clamp)
    check_rows("gu", gu, route)
    P, K = gu.shape[0], inner_width(gu.shape[1], layout)
    if a is None and bits is not None:
        raise ValueError("bits is given without a; allowed: a mask for the adapter that reads H")
    As = None
    if a is not None:
        As = check_factors("a", a, route.adapters, route.experts, 1, K, gu.dtype)
    scales = checks.per_adapter("scale", scale, route.adapters)
    [words] = checks.masks(bits, 1, P, K)
    checks.device(gu=gu, pairs=route.pairs, a=As, bits=words)
    r = max((t.shape[1] for t in As or () if t is not None), default=0)
    h = gu.new_empty((P, K))
    s = None if As is None else gu.new_empty((P, r))
    if P == 0 or K == 0:
        return h, None if s is None else s.zero_()
    config = config or default_config(P, K, r, arch_of(gu.device), gu.element_size())
    for launch in plan_gate(
        gu, route, name, layout, h, As, words, scales if r else (), s, clamp, config
    ):
        launch.run()
    return h, s
