"""The parts of a call of :mod:`.prefix_blocked`.

They are the own keys that a row of the batch sees, the masks of causality and windows in a block,
and the memory that blocks share.

Query t has coordinate ``offset`` + t, own key s has s, prefix key p has p - P. A causal query sees
keys at distances d = query - key with 0 <= d, and with a window also d < window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix_rule import Rule

LOG2E = math.log2(math.e)
# the maximum of a row that sees nothing: far below any score; finite, as inf - inf is NaN
NOTHING = -1e30
# rows (forward) or keys (backward) of a block, and bytes of its scores that fit in the cache
BLOCK = 64
CACHE = 1 << 21


class Span(NamedTuple):
    """The own keys that a row of the batch sees: from ``first`` to before ``last``.

    ``holes`` [S] is added to the scores: 0, or -inf for keys that are hidden in between. It is None
    when all are seen.
    """

    first: int
    last: int
    holes: Tensor | None


def spans_of(keep: Tensor | None, B: int, S: int, dtype: torch.dtype) -> list[Span]:
    if keep is None:
        return [Span(0, S, None)] * B
    ones = keep.to(torch.uint8)
    counts = ones.sum(1).tolist()
    firsts = ones.argmax(1).tolist()
    lasts = (S - ones.flip(1).argmax(1)).tolist()
    spans = []
    for b, (count, first, last) in enumerate(zip(counts, firsts, lasts, strict=True)):
        if count == 0:
            spans.append(Span(0, 0, None))
        elif count == last - first:
            spans.append(Span(first, last, None))
        else:
            holes = keep.new_zeros(S, dtype=dtype).masked_fill_(~keep[b], -math.inf)
            spans.append(Span(first, last, holes))
    return spans


class _Hide:
    """Adds -inf where the distance of row and column is below 0 (causal), or not below a window."""

    def __init__(self, rule: Rule, dtype: torch.dtype, G: int) -> None:
        self.causal, self.window, self.dtype, self.G = rule.causal, rule.window, dtype, G
        self.made: dict[tuple[bool, int, int, int], Tensor] = {}

    def __call__(self, scores: Tensor, base: int) -> None:
        """Mask ``scores`` [N, M G, C], where row i and column j have distance base + i - j."""
        C, M = scores.shape[2], scores.shape[1] // self.G
        if self.causal and base < C - 1:
            rows, column = min(M, C - 1 - base), max(0, base + 1)
            self._add(scores, True, base - column, 0, rows, column, C)
        if self.window is not None and base + M - 1 >= self.window:
            row, columns = max(0, self.window - base), min(C, base + M - self.window)
            self._add(scores, False, base + row - self.window, row, M, 0, columns)

    def _add(self, s: Tensor, below: bool, base: int, i: int, j: int, c: int, d: int) -> None:
        key = (below, base, j - i, d - c)
        mask = self.made.get(key)
        if mask is None:
            rows, columns = (torch.arange(n, device=s.device) for n in (j - i, d - c))
            distance = base + rows[:, None] - columns
            hidden = (distance < 0) if below else (distance >= 0)
            mask = s.new_zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -math.inf)
            mask = self.made[key] = mask.repeat_interleave(self.G, 0)
        s[:, i * self.G : j * self.G, c:d].add_(mask)


class Scratch:
    """The memory of blocks, allocated once a call, with a view for each shape of a block."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(size, dtype=dtype, device="cpu")
        self.views: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, n: int, m: int, c: int) -> Tensor:
        view = self.views.get((n, m, c))
        if view is None:
            view = self.views[n, m, c] = self.memory[: n * m * c].view(n, m, c)
        return view


def rows_of(x: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """x [H, T, D] as [H_kv, T G, D] in ``dtype``; x itself if G is 1 and x has that dtype."""
    if G == 1:
        return x.to(dtype)
    grouped = split(x, G)
    return x.new_empty(grouped.shape, dtype=dtype).copy_(grouped).flatten(1, 2)


def split(x: Tensor, G: int) -> Tensor:
    """x [H, T, D] as [H_kv, T, G, D], a view."""
    groups: Tensor = x.unflatten(0, (-1, G))
    return groups.transpose(1, 2)


class Call:
    """The sizes and the rule of a call, and the masks that its blocks share."""

    def __init__(self, q: Tensor, k: Tensor, kp: Tensor, rule: Rule) -> None:
        self.B, self.H, self.T, self.D = q.shape
        self.H_kv, self.S, self.P = k.shape[1], k.shape[2], kp.shape[-2]
        self.G = self.H // self.H_kv
        self.offset, self.window, self.causal = int(rule.offset), rule.window, rule.causal
        self.scale, self.scale2 = rule.scale, rule.scale * LOG2E
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.shared = kp.dim() == 3
        self.hide = _Hide(rule, self.dtype, self.G)
        self.spans = spans_of(rule.keep, self.B, self.S, self.dtype)
        # rows of the batch that see no prefix
        self.bare = rule.no_prefix.tolist() if rule.no_prefix is not None else [False] * self.B

    def heads_at_once(self, keys: int) -> int:
        """The number of key heads in one product, so that their scores fit in the cache."""
        block = BLOCK * self.G * max(1, keys) * self.dtype.itemsize
        return max(1, min(self.H_kv, CACHE // block))

    def of_prefix(self, x: Tensor, b: int, heads: slice) -> Tensor:
        """The part [N, P, D], a view, of a prefix's tensor for row ``b`` of the batch."""
        return x[heads] if self.shared else x[b, heads]
