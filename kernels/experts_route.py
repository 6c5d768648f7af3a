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

from .common import cdiv


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
    def tiles(self) -> int:
        return self.tile_group.shape[0]


def most_tiles(P: int, groups: int, block_m: int) -> int:
    """The number of tiles that the worst routing of P pairs has."""
    return min(P, cdiv(P, block_m) + min(P, groups) - 1) if P else 0


def route(
    index: torch.Tensor,
    experts: int,
    block_m: int,
    choice: torch.Tensor | None = None,
    adapters: int = 1,
) -> Route:
    """The route of ``index`` [T, k]; pairs whose expert is ``experts`` or more are in no tile.

    ``choice`` [T]: the adapter of each token, from 0 to adapters - 1 (the last for tokens without
    one); None with ``adapters`` 1.
    """
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
