"""Counts the bytes that kernels load while Triton's interpreter runs them, of each tensor.

It is what all programs ask of the L2 cache: a lane that is masked off does not count, and a byte
that is loaded again counts again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


@contextlib.contextmanager
def loads(tensors: dict[str, Tensor]) -> Iterator[Counter[str]]:
    """The bytes loaded within the block, under the names of ``tensors``; "other" for the rest."""
    ranges = {}
    for name, t in tensors.items():
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        ranges[name] = range(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size())
    found: Counter[str] = Counter()
    load = InterpreterBuilder.create_masked_load

    def count(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        wanted = ptrs.data[mask.data]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        if wanted.size:
            low, high = int(wanted.min()), int(wanted.max())
            left = wanted.size
            for name, r in ranges.items():
                if left and r.start <= high and low < r.stop:
                    here = int(((wanted >= r.start) & (wanted < r.stop)).sum())
                    found[name] += here * size
                    left -= here
            found["other"] += left * size
        return load(self, ptrs, mask, *others)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", count):
        yield found
