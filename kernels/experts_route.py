"""The order in which kernels for mixtures of experts take their rows: sorted by expert, in tiles.

A pair is a token with one of its k experts, numbered t·k + j; P = T·k. Pairs are sorted by group,
which is the expert, or for a batch whose tokens name different adapters the number
expert · adapters + adapter. A tile is at most block_m rows of the sorted order, all of one group.
Nothing is read back by the host, so that a call can be captured in a CUDA graph: there are as many
tiles as any routing can need, and those past the last have group -1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from . import checks
from .common import cdiv, device_function, next_pow2

INDICES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Route(NamedTuple):
    """A batch's pairs in order of their groups; G groups, whose expert is group // adapters."""

    pairs: torch.Tensor  # int32 [P], the pair at each sorted row; its token is pair // k
    offsets: torch.Tensor  # int32 [G + 1], the first sorted row of each group, and past the last
    tile_group: torch.Tensor  # int32 [tiles], or -1
    tile_start: torch.Tensor  # int32 [tiles], its first sorted row; it ends with its group
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


def route(
    index: torch.Tensor,
    experts: int,
    block_m: int,
    choice: torch.Tensor | None = None,
    adapters: int = 1,
) -> Route:
    """The route of ``index`` [T, k]; pairs whose expert is ``experts`` or more are in no tile.

    index: integers, not negative; block_m: a power of two, at least 16; choice: integers [T], the
    adapter of each token, from 0 to adapters - 1 (the last for tokens without one), or None with
    ``adapters`` 1. Their values are not looked at, as the device has them. Errors: TypeError,
    ValueError, before any launch.
    """
    _check(index, experts, block_m, choice, adapters)
    T, k = index.shape
    P, groups, device = T * k, experts * adapters, index.device
    key = index.to(torch.int64)
    if choice is not None:
        key = key * adapters + choice.to(torch.int64)[:, None]
    key, pairs = key.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(groups + 1, device=device))
    needs = (starts.diff() + (block_m - 1)) // block_m
    ends = needs.cumsum(0)
    tile = torch.arange(most_tiles(P, groups, block_m), device=device)
    group = torch.searchsorted(ends, tile, right=True)
    own = group.clamp(max=groups - 1)
    start = starts[own] + (tile - (ends - needs)[own]) * block_m
    group = torch.where(group < groups, group, -1)
    return Route(pairs.int(), starts.int(), group.int(), start.int(), block_m, k, experts, adapters)


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
