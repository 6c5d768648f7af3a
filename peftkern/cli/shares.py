"""``Shares``: which examples a process computes in each forward pass.

The processes cut one order of all examples into batches that they compute together, so that a run
on any number of processes sees the examples of one process with as large a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .encode import Example

# a batch's key: the process has no share of it and computes one that does not count
IDLE = "idle"


class Shares(Sampler[list[int]]):
    """The indices of each batch of process ``rank`` of ``count``, anew in each ``epoch``.

    A batch of all processes has ``size`` examples for each. The last one of an epoch may have
    fewer; a process without any of them gets one example all the same, as ``~index``, because all
    processes have to do the same number of passes.
    """

    def __init__(self, length: int, size: int, rank: int, count: int, seed: int) -> None:
        self.length, self.size, self.rank, self.count, self.seed = length, size, rank, count, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.length // (self.size * self.count))

    def __iter__(self) -> Iterator[list[int]]:
        drawn = torch.Generator().manual_seed(self.seed * 2**24 + self.epoch)
        order = torch.randperm(self.length, generator=drawn).tolist()
        width = self.size * self.count
        for start in range(0, self.length, width):
            of_all = order[start : start + width]
            yield of_all[self.rank :: self.count] or [~of_all[0]]


class Examples(Dataset[Example]):
    """A list of examples; number ``~i`` is example i, marked as one that does not count."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index] if index >= 0 else {**self.examples[~index], IDLE: True}


def marking(collate: Callable[[list[Example]], dict[str, Any]]) -> Callable[[list[Example]], Any]:
    """``collate``, whose batch has the key :data:`IDLE` when its examples do not count."""

    def marked(examples: list[Example]) -> dict[str, Any]:
        batch = collate(examples)
        if IDLE in examples[0]:
            batch[IDLE] = True
        return batch

    return marked
