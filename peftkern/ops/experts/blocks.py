"""Experts next to each other whose rows are taken at once, where the expert does not matter.

An expert has few rows of many tokens, so a call on its rows alone may cost less than making it.
What is done row by row is done on the rows of a block, and its products are made expert after
expert on views that one call cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .order import Span

T = TypeVar("T")

# the rows of a block of several experts: a part of all pairs, so that what a block takes follows
# what the call keeps, and no more than a core's own cache holds
_PART = 6
_LEAST, _MOST = 256, 512


class Block(NamedTuple):
    start: int  # the first sorted row, and past the last
    end: int
    first: int  # the place of the first of its spans among all
    spans: Sequence[Span]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def sizes(self) -> list[int]:
        return [s.end - s.start for s in self.spans]

    def of(self, each: Sequence[T]) -> Sequence[T]:
        """The block's part of a list with an entry for each of all spans."""
        return each[self.first : self.first + len(self.spans)]


def blocks_of(spans: Sequence[Span]) -> list[Block]:
    """Blocks of several experts with few rows, or of one with many."""
    found, first = [], 0
    rows = min(max((spans[-1].end if spans else 0) // _PART, _LEAST), _MOST)
    for i, span in enumerate(spans):
        last = i + 1 == len(spans)
        if last or spans[i + 1].end - spans[first].start > rows:
            found.append(Block(spans[first].start, span.end, first, spans[first : i + 1]))
            first = i + 1
    return found


def most_rows(blocks: Sequence[Block]) -> int:
    return max((b.end - b.start for b in blocks), default=0)


class SharedRows:
    """Memory that one block after another writes to.

    The allocator gives memory of this size back to the system, which costs more to take anew than
    what is written there.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.rows, self.like = rows, like
        self.made: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """[rows, columns], dense, of any values; what was taken with the name before is lost."""
        own, size = self.made.get(name), rows * columns
        if own is None or len(own) < size:
            own = self.made[name] = self.like.new_empty(max(rows, self.rows) * columns)
        return own[:size].view(rows, columns)

    def gather(self, name: str, x: Tensor, at: Tensor) -> Tensor:
        """The rows ``at`` of x."""
        return torch.index_select(x, 0, at, out=self.take(name, len(at), x.shape[1]))


class Group(NamedTuple):
    """The rows of a block that have one adapter, in pieces of one expert each."""

    adapter: int
    places: Sequence[int]  # of each piece's expert among all spans
    sizes: list[int]  # of all pieces of the block
    own: list[int] | None  # those of the group; None: all

    def cut(self, t: Tensor, dim: int = 0) -> Sequence[Tensor]:
        pieces: Sequence[Tensor] = t.split(self.sizes, dim)
        return pieces if self.own is None else [pieces[i] for i in self.own]

    def parts(self, t: Tensor) -> Sequence[Tensor]:
        """The group's rows in as few tensors as there can be."""
        return (t,) if self.own is None else self.cut(t)

    def of(self, each: Sequence[T]) -> list[T]:
        """The entry of each piece, of a list with one for each of all spans."""
        return [each[i] for i in self.places]


def groups_of(block: Block, adapters: int) -> list[Group]:
    """A group for each of the adapters, or in a mixed batch for each that has rows in the block."""
    first, spans = block.first, block.spans
    if not spans or spans[0].runs is None:
        places, sizes = range(first, first + len(spans)), block.sizes
        return [Group(i, places, sizes, None) for i in range(adapters)]
    runs = [(p, r) for p, s in enumerate(spans, first) for r in s.runs or ()]
    sizes = [r.end - r.start for _, r in runs]
    found: dict[int, Group] = {}
    for i, (place, run) in enumerate(runs):
        group = found.setdefault(run.adapter, Group(run.adapter, [], sizes, []))
        assert isinstance(group.places, list) and group.own is not None
        group.places.append(place)
        group.own.append(i)
    return [*found.values()]
