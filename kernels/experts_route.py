"""The order in which kernels for mixtures of experts take their rows: sorted by expert, in tiles.

A pair is a token with one of its k experts, numbered t·k + j; P = T·k. Pairs are sorted by group,
which is the expert, or for a batch whose tokens name different adapters the number
expert · adapters + adapter. A tile is at most block_m rows of the sorted order, all of one group.
Nothing is read back by the host, so that a call can be captured in a CUDA graph: there are as many
tiles as any routing can need, and those past the last have group -1.

The sort is stable and by counting, so there is one order, in two launches: programs count the pairs
of each group in a chunk of pairs, then each adds up the counts of the chunks before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import checks
from .common import Launch, cdiv, device_function, next_pow2
from .launching import planned

MOST_GROUPS = 1024  # of the kernels, which hold a number for each
CHUNKS = 128  # programs of a route, at most; each reads the counts of all
INDICES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Route(NamedTuple):
    """A batch's pairs in order of their groups; G groups, whose expert is group // adapters."""

    pairs: torch.Tensor  # int32 [P], the pair at each sorted row; its token is pair // k
    offsets: torch.Tensor  # int32 [G + 1], the first sorted row of each group, and past the last
    tile_group: torch.Tensor  # int32 [tiles], or -1
    tile_start: torch.Tensor  # int32 [tiles], its first sorted row, or P; it ends with its group
    block_m: int
    k: int
    experts: int
    adapters: int  # groups of an expert

    @property
    def P(self) -> int:
        return self.pairs.shape[0]

    @property
    def groups(self) -> int:
        return self.experts * self.adapters

    @property
    def tiles(self) -> int:
        return self.tile_group.shape[0]


def most_tiles(P: int, groups: int, block_m: int) -> int:
    """The number of tiles that the worst routing of P pairs has."""
    return min(P, cdiv(P, block_m) + min(P, groups) - 1) if P else 0


def rows_of_tile(P: int, groups: int) -> int:
    """A block_m, 16 to 128, for P pairs: twice a group's mean rows, as a power of two.

    A group with more rows than a tile reads its W once more, which costs more than products of rows
    that are not there. Modelled from bytes and operations of Qwen3-30B-A3B's first linear on an
    H200, for experts that are chosen equally often up to exponentially spread, the best of the four
    sizes is at most 10% faster.
    """
    return min(128, max(16, next_pow2(cdiv(2 * P, groups))))


@device_function
def _groups(index, choice, at, P, k, t_stride, j_stride, experts, adapters):
    """The groups [BLOCK] of pairs; -1 for those that are in none."""
    token = at // k  # [BLOCK]
    there = at < P  # [BLOCK]
    place = token.to(tl.int64) * t_stride + (at - token * k).to(tl.int64) * j_stride
    expert = tl.load(index + place, mask=there, other=0).to(tl.int64)  # [BLOCK]
    group = expert * adapters
    known = (expert >= 0) & (expert < experts)  # [BLOCK]
    if choice is not None:
        adapter = tl.load(choice + token, mask=there, other=0).to(tl.int64)  # [BLOCK]
        group += adapter
        known &= (adapter >= 0) & (adapter < adapters)
    return tl.where(known, group, -1).to(tl.int32)


@triton.jit(do_not_specialize=["P", "k", "CHUNK", "experts", "adapters"])
def _route_count_kernel(
    index, choice, counts, P, k, t_stride, j_stride, CHUNK, experts, adapters,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs of each group in a chunk of them."""
    slot = tl.arange(0, SLOTS)  # [SLOTS]
    count = slot * 0
    first = tl.program_id(0) * CHUNK
    for p0 in range(first, tl.minimum(first + CHUNK, P), BLOCK):
        at = p0 + tl.arange(0, BLOCK)  # [BLOCK]
        group = _groups(index, choice, at, P, k, t_stride, j_stride, experts, adapters)
        mine = (group[:, None] == slot[None, :]) & (at < P)[:, None]  # [BLOCK, SLOTS]
        count += tl.sum(mine.to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * SLOTS + slot, count)


@triton.jit(do_not_specialize=["P", "k", "CHUNK", "CHUNKS", "TILES", "experts", "adapters"])
def _route_place_kernel(
    index, choice, counts, pairs, offsets, tile_group, tile_start,
    P, k, t_stride, j_stride, CHUNK, CHUNKS, TILES, experts, adapters,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Places the pairs of a chunk, and its share of the tiles."""
    slot = tl.arange(0, SLOTS)  # [SLOTS]
    chunk = tl.program_id(0)
    total, before = slot * 0, slot * 0
    for c0 in range(0, CHUNKS, BLOCK):
        c = c0 + tl.arange(0, BLOCK)  # [BLOCK]
        count = tl.load(
            counts + c[:, None] * SLOTS + slot[None, :], mask=(c < CHUNKS)[:, None], other=0
        )  # [BLOCK, SLOTS]
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((c < chunk)[:, None], count, 0), 0)
    starts = tl.cumsum(total, 0) - total  # [SLOTS]
    groups, grouped = experts * adapters, tl.sum(total, 0)
    if chunk == 0:
        tl.store(offsets + slot, starts, mask=slot < groups)
        tl.store(offsets + groups, grouped)

    needs = (total + (TILE - 1)) // TILE  # [SLOTS]
    ends = tl.cumsum(needs, 0)  # [SLOTS]
    for t0 in range(chunk * BLOCK, TILES, CHUNKS * BLOCK):
        tile = t0 + tl.arange(0, BLOCK)  # [BLOCK]
        # a tile is of the first group whose tiles end after it
        group = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)  # [BLOCK], or SLOTS
        here = group[:, None] == slot[None, :]  # [BLOCK, SLOTS]
        first = tl.sum(tl.where(here, starts[None, :], 0), 1)  # [BLOCK]
        passed = tile - tl.sum(tl.where(here, (ends - needs)[None, :], 0), 1)  # [BLOCK]
        used = group < SLOTS  # [BLOCK]
        tl.store(tile_group + tile, tl.where(used, group, -1), mask=tile < TILES)
        tl.store(tile_start + tile, tl.where(used, first + passed * TILE, P), mask=tile < TILES)

    place = starts + before  # [SLOTS], of the group's next pair
    passed_by = tl.sum(before, 0)  # pairs before this one that are in a group
    p_first = chunk * CHUNK
    for p0 in range(p_first, tl.minimum(p_first + CHUNK, P), BLOCK):
        at = p0 + tl.arange(0, BLOCK)  # [BLOCK]
        group = _groups(index, choice, at, P, k, t_stride, j_stride, experts, adapters)
        mine = ((group[:, None] == slot[None, :]) & (at < P)[:, None]).to(tl.int32)
        turn = tl.cumsum(mine, 0) - mine  # [BLOCK, SLOTS], pairs of the group before this one
        row = tl.sum(mine * (turn + place[None, :]), 1)  # [BLOCK]
        # pairs in no group are last, and in their order
        known = tl.sum(mine, 1)  # [BLOCK], 0 or 1
        row += (1 - known) * (grouped + at - passed_by - tl.cumsum(known, 0))
        tl.store(pairs + row, at, mask=at < P)
        place += tl.sum(mine, 0)
        passed_by += tl.sum(known, 0)


def plan_route(
    index: torch.Tensor,
    choice: torch.Tensor | None,
    found: Route,
) -> list[Launch]:
    """Launches that fill ``found``; the arguments are checked already, and there is a pair."""
    P, slots = found.P, next_pow2(found.groups)
    # 32 pairs of 128 experts spill with Triton 3.9 on sm_90
    block = min(32 if slots < 128 else 16, 8192 // slots)
    chunk = cdiv(cdiv(P, CHUNKS), block) * block
    chunks = cdiv(P, chunk)
    counts = found.pairs.new_empty((chunks, slots))
    where = (found.k, *index.stride(), chunk)
    sizes = (found.experts, found.adapters)
    meta = dict(SLOTS=slots, BLOCK=block, num_warps=8, num_stages=1)
    count = (index, choice, counts, P, *where, *sizes)
    place = (
        index, choice, counts, found.pairs, found.offsets, found.tile_group, found.tile_start,
        P, *where, chunks, found.tiles, *sizes,
    )  # fmt: skip
    return [
        Launch(_route_count_kernel, (chunks,), count, meta),
        Launch(_route_place_kernel, (chunks,), place, meta | dict(TILE=found.block_m)),
    ]


def by_sorting(
    index: torch.Tensor,
    experts: int,
    block_m: int,
    choice: torch.Tensor | None = None,
    adapters: int = 1,
) -> Route:
    """:func:`route` by torch's sort, on any device and for any number of groups."""
    T, k = index.shape
    P, groups, device = T * k, experts * adapters, index.device
    key = index.to(torch.int64)
    known = (key >= 0) & (key < experts)
    if choice is not None:
        adapter = choice.to(torch.int64)[:, None]
        known = known & (adapter >= 0) & (adapter < adapters)
        key = key * adapters + adapter
    key, pairs = torch.where(known, key, groups).reshape(-1).sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(groups + 1, device=device))
    needs = (starts.diff() + (block_m - 1)) // block_m
    ends = needs.cumsum(0)
    tile = torch.arange(most_tiles(P, groups, block_m), device=device)
    group = torch.searchsorted(ends, tile, right=True)
    own = group.clamp(max=groups - 1)
    start = starts[own] + (tile - (ends - needs)[own]) * block_m
    start, group = (torch.where(group < groups, t, none) for t, none in ((start, P), (group, -1)))
    return Route(pairs.int(), starts.int(), group.int(), start.int(), block_m, k, experts, adapters)


@planned()
def tables(
    index: torch.Tensor,
    experts: int,
    block_m: int,
    choice: torch.Tensor | None = None,
    adapters: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of :func:`route`, whose arguments these are."""
    _check(index, experts, block_m, choice, adapters)
    T, k = index.shape
    P, groups = T * k, experts * adapters
    if not checks.can_launch(index.device) or groups > MOST_GROUPS or P == 0:
        found = by_sorting(index, experts, block_m, choice, adapters)
        return found.pairs, found.offsets, found.tile_group, found.tile_start
    tiles = most_tiles(P, groups, block_m)
    pairs, offsets, tile_group, tile_start = (
        index.new_empty(n, dtype=torch.int32) for n in (P, groups + 1, tiles, tiles)
    )
    found = Route(pairs, offsets, tile_group, tile_start, block_m, k, experts, adapters)
    if choice is not None and choice.stride(0) != 1:
        choice = choice.contiguous()
    for launch in plan_route(index, choice, found):
        launch.run()
    return pairs, offsets, tile_group, tile_start


def route(
    index: torch.Tensor,
    experts: int,
    block_m: int,
    choice: torch.Tensor | None = None,
    adapters: int = 1,
) -> Route:
    """The route of ``index`` [T, k]; pairs whose expert is not one of ``experts`` are in no tile.

    They come last. index: integers, any strides; block_m: a power of two, at least 16; choice:
    integers [T], the adapter of each token, from 0 to adapters - 1 (the last for tokens without
    one; pairs of others are in no tile), or None with ``adapters`` 1. Two launches, or torch's sort
    for more than 1024 groups and on a CPU. Errors: TypeError, ValueError, before any launch.
    """
    pairs, offsets, tile_group, tile_start = tables(index, experts, block_m, choice, adapters)
    k = index.shape[1]
    return Route(pairs, offsets, tile_group, tile_start, block_m, k, experts, adapters)


def _check(
    index: torch.Tensor, experts: int, block_m: int, choice: torch.Tensor | None, adapters: int
) -> None:
    checks.matrix("index", index)
    for name, t in (("index", index), ("choice", choice)):
        if t is not None and t.dtype not in INDICES:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: int64, int32, int16, uint8")
    if index.shape[1] < 1:
        raise ValueError(f"index has shape {tuple(index.shape)}; allowed: [T, k], k from 1")
    for name, count in (("experts", experts), ("adapters", adapters)):
        if count < 1:
            raise ValueError(f"{name} is {count}; allowed: 1 or more")
    if not checks.is_power_of_two(block_m) or block_m < 16:
        raise ValueError(f"block_m is {block_m}; allowed: a power of two, at least 16")
    if index.numel() >= 2**31:
        raise ValueError(f"index has {index.numel()} entries; allowed: fewer than 2**31")
    if choice is not None:
        checks.shape("choice", choice, (index.shape[0],), "index has T rows")
        if choice.device != index.device:
            raise ValueError(f"choice is on {choice.device}; allowed: {index.device}, as index")
    elif adapters > 1:
        raise ValueError(f"choice is None with adapters={adapters}; allowed: None with adapters=1")


# ------------------------------------------------------------- for the kernels that take the rows


def checked_rows(name: str, t: torch.Tensor, route: Route, gather: bool) -> torch.Tensor:
    """``t``, checked to have a row for each token with ``gather``, else one for each sorted row.

    It is a copy only if it has no unit stride along its rows.
    """
    t = checks.rows(name, t)
    if gather:
        checks.shape(name, t, (route.P // route.k, t.shape[1]), "a row for each token of the route")
    else:
        checks.shape(name, t, (route.P, t.shape[1]), "a row for each pair of the route")
    return t


def checked_weights(
    name: str, weights: torch.Tensor | None, route: Route, dtype: torch.dtype
) -> torch.Tensor | None:
    """Routing weights as [P] in order of the pairs; given so, or as [T, k]."""
    if weights is None:
        return None
    if weights.dtype not in (torch.float32, dtype):
        raise TypeError(
            f"{name} has dtype {weights.dtype}; allowed: torch.float32 or the activation's {dtype}"
        )
    T, k = route.P // route.k, route.k
    if tuple(weights.shape) not in ((T, k), (T * k,)):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; allowed: {(T, k)} or {(T * k,)}, one for "
            "each pair of the route"
        )
    return weights.contiguous().view(-1)


def one_adapter(route: Route, what: str) -> None:
    if route.adapters != 1:
        raise ValueError(f"route has {route.adapters} adapters; allowed: 1 for {what}")


@device_function
def source_rows(pairs, row, k, GATHER: tl.constexpr):
    """The rows, int64 [BLOCK], of an operand at sorted rows [BLOCK] that are there.

    Its rows are those of tokens with GATHER; else they are sorted themselves.
    """
    if GATHER:
        row = tl.load(pairs + row) // k
    return row.to(tl.int64)
