"""Launches of torch's operations on a mixture's rows: sorts, grouped products, sums by index.

Which rows an expert gets is data. Every expert counts that can have a row, as in an even routing.
What they launch is read from torch's CUDA sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..kernels.traffic import Traffic, cdiv, unit_of

SMALL_SORT = 4096  # elements that one block sorts


def distinct(t: Tensor) -> int:
    """Bytes of the distinct elements; a broadcast dimension counts once."""
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n <= 1)
    return math.prod(sizes) * t.element_size()


def radix_sort(count: int, key: int, digits: int) -> tuple[int, int, int]:
    """(launches, read, written) of a radix sort of ``count`` keys of ``key`` bytes.

    Their int64 indices are made, keys are counted, counts are summed, and a pass for each of
    ``digits`` bytes reads and writes keys and indices.
    """
    both = count * (key + 8)
    return 3 + digits, count * key + digits * both, count * 8 + digits * both


def _sort(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Traffic]:
    keys = args[0]
    if keys.numel() <= SMALL_SORT:  # a copy of the keys, the indices, and the sort
        bytes_ = distinct(keys) + keys.numel() * 8
        return [Traffic("sort", 3, distinct(keys) + bytes_, 2 * bytes_)]
    found = radix_sort(keys.numel(), keys.element_size(), keys.element_size())
    return [Traffic("sort", *found)]


def _grouped_mm(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Traffic]:
    """The groups' addresses, then their products: rows by experts, or rows by rows for each."""
    a, b = args[0], args[1]
    if a.dim() != 2:
        raise NotImplementedError(f"no launch rule for a grouped product of {list(a.shape)}")
    chosen = distinct(b)
    if b.dim() == 3:
        chosen = chosen * min(a.shape[0], b.shape[0]) // b.shape[0]
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    read = distinct(a) + chosen + distinct(args[2] if len(args) > 2 else kwargs["offs"])
    return [Traffic("_grouped_mm", 2, read, distinct(out), flops, unit_of(a.dtype))]


def _index_put(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Traffic]:
    """Values written at an index, or with ``accumulate`` sorted by it and added there.

    torch's own small operations on the index, a few more launches, are left out. autograd has no
    other use of the destination, so there is no copy of it.
    """
    into, indices, values = args[:3]
    (index,) = (i for i in indices if i is not None)
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    there = min(distinct(into), distinct(values))
    read = distinct(index) + distinct(values)
    if not accumulate:
        return [Traffic("index_put_", 1, read, distinct(values))]
    launches, sorted_read, sorted_written = radix_sort(
        index.numel(), 8, cdiv(max(1, (into.shape[0] - 1).bit_length()), 8)
    )
    return [
        Traffic("index_put (sort)", launches, sorted_read, sorted_written),
        Traffic("index_put", 1, read + 8 * index.numel() + there, there),
    ]


def _scatter(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> list[Traffic]:
    """One pass over the values and their places, which are all different here."""
    _, _, index, values = args[:4]
    return [Traffic("scatter_", 1, distinct(index) + distinct(values), distinct(values))]


RULES: dict[str, Callable[[Any, Sequence[Any], dict[str, Any], Any], list[Traffic]]] = {
    "sort": _sort,
    "_grouped_mm": _grouped_mm,
    "index_put": _index_put,
    "index_put_": _index_put,
    "_index_put_impl_": _index_put,
    "scatter_": _scatter,
}
