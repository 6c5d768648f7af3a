"""The order in which a mixture's pairs are computed: by expert, and within one by adapter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring rows of one expert that have an adapter; counted from the expert's first."""

    adapter: int  # the number of adapters for rows without one
    start: int
    end: int


class Span(NamedTuple):
    """The sorted rows of one expert that got tokens."""

    expert: int
    start: int
    end: int
    runs: tuple[Run, ...] | None  # None: every adapter has all rows


class Order(NamedTuple):
    """Pairs sorted by group, stable.

    The group is the expert e, or for a batch whose tokens name one of n adapters
    e · (n + 1) + adapter, with n for tokens without one.
    """

    pairs: Tensor  # [P], the pair at each sorted row
    bounds: Tensor | None  # [groups + 1], the first row of each group, and past the last
    spans: list[Span] | None = None  # the same on the host, where a way asks for it
    own: Any = None  # what else a way made of them


def sort_pairs(
    index: Tensor, experts: int, choice: Tensor | None, adapters: int
) -> tuple[Tensor, Tensor]:
    """The pairs and the bounds of an :class:`Order` of ``index`` [T, k].

    ``choice`` [T] has adapters from -1 to ``adapters`` - 1.
    """
    groups, key = experts, index
    if choice is not None:
        groups = experts * (adapters + 1)
        own = choice.to(torch.int64)
        key = index.to(torch.int64) * (adapters + 1) + own.where(own >= 0, adapters)[:, None]
    elif index.dtype.itemsize < 4:  # a number of groups may not be one of its dtype
        key = index.to(torch.int64)
    key, pairs = key.reshape(-1).sort(stable=True)
    edges = torch.arange(groups + 1, dtype=key.dtype, device=key.device)
    return pairs, torch.searchsorted(key, edges)


def spans_of(bounds: list[int], mixed: bool, adapters: int) -> list[Span]:
    """The experts that got tokens, from an :class:`Order`'s bounds."""
    if not mixed:
        return [
            Span(e, start, end, None)
            for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
            if start < end
        ]
    found, width = [], adapters + 1
    for e in range((len(bounds) - 1) // width):
        own = bounds[e * width : (e + 1) * width + 1]
        first, last = own[0], own[-1]
        if first < last:
            edges = zip(own, own[1:], strict=False)
            runs = [Run(i, a - first, b - first) for i, (a, b) in enumerate(edges) if a < b]
            found.append(Span(e, first, last, tuple(runs)))
    return found
