"""One linear of the experts with its adapters, on the rows of one block of experts after another.

    S = c (mask ∘ x) A_eᵀ        y = S B_eᵀ + bias_e, then y += x W_eᵀ        c = scale / (1 - p)

The backward takes dy without the routing weights w, which down's rows have:

    dS = c dy B_e        dx = dy W_e + mask ∘ (dS A_e)
    dB_e = dyᵀ (w ∘ S)   dA_e = (w ∘ dS)ᵀ (mask ∘ x)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..bases.experts import BaseExperts, EachExpert
from ..bits import unpack_bits
from ..torch_products import in_dtype, low_rank_dtype, mm_to
from .blocks import Block, Group, groups_of
from .order import Span
from .parts import ExpertLinear, LinearGrads

# of more experts than this share, all are taken at once: the transpose of a whole matrix takes a
# quarter of the time of as many columns one by one
_MOST = 0.3


class _Lists(NamedTuple):
    """An entry for each span, of the weight and of each adapter."""

    W: Sequence[Tensor]
    A: list[list[Tensor]]
    B: list[list[Tensor]]


class LoopLinear:
    """The tensors of one linear as the loop uses them; only the touched experts' are copied."""

    def __init__(
        self,
        part: ExpertLinear,
        x: Tensor,
        spans: Sequence[Span],
        words: Tensor | None,
        mixed: bool,
    ) -> None:
        self.part, self.words, self.mixed = part, words, mixed
        self.experts = [s.expert for s in spans]
        E, N, K = part.weight.shape
        self.low, _ = low_rank(part, x, mixed)
        self.ranks = [f.rank(E) for f in part.factors]
        self.columns, at = [], 0  # of S
        for r in self.ranks:
            self.columns.append(slice(at, at + r))
            at += 0 if mixed else r
        self.updates = any(self.ranks)
        self.bias = None if part.bias is None else self._each(part.bias)
        each = [*zip(part.factors, self.ranks, strict=True)]
        self.stacked_A = [f.A.reshape(E, r, K) for f, r in each]
        self.stacked_B, self.places = self._stack_b([f.B.reshape(N * r, E) for f, r in each])
        self.dA: list[Tensor | None] = []
        self.dB: list[Tensor | None] = []
        self.each_dA: list[list[Tensor]] = []
        self.each_dB: list[list[Tensor]] = []
        self.dbias: Tensor | None = None
        self.trains = False

    def _each(self, t: Tensor, at: Sequence[int] | None = None) -> list[Tensor]:
        """Views of t [E, ...] of the touched experts."""
        at = self.experts if at is None else at
        if len(at) <= _MOST * len(t):
            return [t[e] for e in at]
        found = t.unbind(0)
        return [found[e] for e in at]

    def _stack_b(self, flat: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[int]]:
        """(each B [N·r, E] of the touched experts as [m, N, r], dense; their places in it)."""
        E, N = self.part.weight.shape[:2]
        places: Sequence[int] = self.experts
        if len(places) <= _MOST * E:
            touched = torch.tensor(places, dtype=torch.int64, device=self.part.weight.device)
            flat, places = [b.index_select(1, touched) for b in flat], range(len(places))
        dense = [in_dtype(self.low, b.t().contiguous()) for b in flat]
        return [b.view(len(b), N, b.shape[1] // N) for b in dense], places

    @cached_property
    def _straight(self) -> _Lists:
        """W_e [N, K], A_e [r, K] and B_e [N, r], which the backward multiplies by."""
        A = [self._each(in_dtype(self.low, a)) for a in self.stacked_A]
        B = [self._each(b, self.places) for b in self.stacked_B]
        return _Lists(self._weights(False), A, B)

    @cached_property
    def _turned(self) -> _Lists:
        """Their transposes, which the forward multiplies by."""
        A = [self._each(in_dtype(self.low, a).transpose(1, 2)) for a in self.stacked_A]
        B = [self._each(b.transpose(1, 2), self.places) for b in self.stacked_B]
        return _Lists(self._weights(True), A, B)

    def _weights(self, turned: bool) -> Sequence[Tensor]:
        """W_e of the touched experts, or its transpose; a quantised one is made when it is used."""
        weight = self.part.weight
        if isinstance(weight, BaseExperts):
            return EachExpert(weight, self.experts, turned)
        return self._each(weight.transpose(1, 2) if turned else weight)

    def _groups(self, block: Block) -> list[Group]:
        return groups_of(block, len(self.ranks))

    def _is_live(self, i: int) -> bool:
        """True when adapter i adds something; False for the number of rows without one."""
        return i < len(self.ranks) and self.ranks[i] > 0

    def _mask(self, i: int, block: Block, K: int, made: dict[int, Tensor]) -> Tensor | None:
        """The mask of adapter i on the block's rows as numbers; ``made`` keeps a shared one."""
        if self.words is None or self.part.factors[i].p == 0.0:
            return None
        if not self.mixed:
            return unpack_bits(self.words[i, block.rows], K, self.low)
        if 0 not in made:
            made[0] = unpack_bits(self.words[0, block.rows], K, self.low)
        return made[0]

    def _columns_of(self, i: int, s: Tensor) -> Tensor:
        return s if s.shape[1] == self.ranks[i] else s[:, self.columns[i]]

    def forward(self, block: Block, x: Tensor, y: Tensor, s: Tensor | None) -> None:
        """Write y [m, N] for x [m, K], and S into ``s`` [m, R] if there are adapters."""
        ys, xs, ws = y.split(block.sizes), x.split(block.sizes), block.of(self._turned.W)
        if s is not None and self.updates and self.low is x.dtype:
            self._add(block, x, y, s, written=False)
            for to, rows, w in zip(ys, xs, ws, strict=True):
                to.addmm_(rows, w)
            return
        # wider low-rank parts are not rounded before the base product
        if self.bias is None:
            for to, rows, w in zip(ys, xs, ws, strict=True):
                torch.mm(rows, w, out=to)
        else:
            for to, rows, w, bias in zip(ys, xs, ws, block.of(self.bias), strict=True):
                torch.addmm(bias, rows, w, out=to)
        if s is not None and self.updates:
            wide = y.to(self.low)
            self._add(block, x.to(self.low), wide, s, written=True)
            y.copy_(wide)

    def _add(self, block: Block, x: Tensor, y: Tensor, s: Tensor, written: bool) -> None:
        made: dict[int, Tensor] = {}
        for group in self._groups(block):
            i, ys = group.adapter, group.cut(y)
            biases = None if self.bias is None or written else group.of(self.bias)
            if not self._is_live(i):
                if self.mixed and not written:
                    _fill(ys, biases)
                continue
            f, A, B = self.part.factors[i], group.of(self._turned.A[i]), group.of(self._turned.B[i])
            ss = group.cut(self._columns_of(i, s))
            xs = _dropped(group, x, self._mask(i, block, x.shape[1], made))
            c = f.scale / (1.0 - f.p)
            for to, rows, a in zip(ss, xs, A, strict=True):
                torch.addmm(to, rows, a, beta=0, alpha=c, out=to)
            if written:
                for to, rows, b in zip(ys, ss, B, strict=True):
                    to.addmm_(rows, b)
            elif biases is None:
                for to, rows, b in zip(ys, ss, B, strict=True):
                    torch.mm(rows, b, out=to)
            else:
                for to, rows, b, bias in zip(ys, ss, B, biases, strict=True):
                    torch.addmm(bias, rows, b, out=to)
            written = written or not self.mixed

    def want(self, wanted: Sequence[tuple[bool, bool]], bias: bool) -> None:
        """Make room for the gradients that are wanted; experts without tokens have zeros."""
        (E, N, K), part = self.part.weight.shape, self.part
        whole = len(self.experts) == E and not self.mixed

        def room(like: Tensor, *shape: int) -> Tensor:
            return like.new_empty(shape) if whole else like.new_zeros(shape)

        for f, r, (a, b) in zip(part.factors, self.ranks, wanted, strict=True):
            dA = room(f.A, E, r, K) if a else None
            dB = room(f.B, E, N, r) if b else None
            self.dA.append(dA)
            self.dB.append(dB)
            self.each_dA.append([] if dA is None else self._each(dA))
            self.each_dB.append([] if dB is None else self._each(dB))
        self.trains = any(a or b for a, b in wanted)
        if bias and part.bias is not None:
            self.dbias = torch.zeros_like(part.bias)

    def backward(
        self,
        block: Block,
        dy: Tensor,
        w: Tensor | None,
        x: Tensor | None,
        s: Tensor | None,
        dx: Tensor | None,
    ) -> None:
        """Write dx [m, K] without w, if it is wanted; dA, dB and the bias' gradient are kept here.

        dy [m, N]; w [m, 1]; x [m, K] and s [m, R] are what dA and dB need.
        """
        sizes = block.sizes
        if self.dbias is not None:
            weighted = (dy if w is None else dy * w).split(sizes)
            for span, rows in zip(block.spans, weighted, strict=True):
                self.dbias[span.expert] = rows.sum(0)
        low = dx
        if self.updates and (dx is not None or self.trains):
            if dx is not None and self.low is not dx.dtype:
                low = dx.new_empty(dx.shape, dtype=self.low)
            x = None if x is None else in_dtype(self.low, x)
            self._low_rank_grads(block, in_dtype(self.low, dy), w, x, s, low)
        if dx is None:
            return
        base = dx if low is dx else torch.empty_like(dx)
        each = zip(base.split(sizes), dy.split(sizes), block.of(self._straight.W), strict=True)
        if self.updates and low is dx:
            for to, rows, own in each:
                to.addmm_(rows, own)
            return
        for to, rows, own in each:
            torch.mm(rows, own, out=to)
        if base is not dx:
            assert low is not None
            dx.copy_(low.add_(base))

    def _low_rank_grads(
        self,
        block: Block,
        dy: Tensor,
        w: Tensor | None,
        x: Tensor | None,
        s: Tensor | None,
        dx: Tensor | None,
    ) -> None:
        K, made, fresh = self.part.weight.shape[2], {}, True  # type: ignore[var-annotated]
        w = None if w is None else in_dtype(self.low, w)
        for group in self._groups(block):
            i = group.adapter
            if not self._is_live(i):
                if self.mixed and dx is not None:
                    _fill(group.cut(dx), None)
                continue
            if self.dB[i] is not None:
                assert s is not None
                own = self._columns_of(i, s)
                _write(
                    group.of(self.each_dB[i]),
                    group.cut(dy.t(), 1),
                    group.cut(own if w is None else own * w),
                )
            if dx is None and self.dA[i] is None:
                continue
            f = self.part.factors[i]
            c, ds = f.scale / (1.0 - f.p), dy.new_empty((len(dy), self.ranks[i]))
            each_ds, B = group.cut(ds), group.of(self._straight.B[i])
            for to, rows, b in zip(each_ds, group.cut(dy), B, strict=True):
                torch.addmm(to, rows, b, beta=0, alpha=c, out=to)
            mask = self._mask(i, block, K, made)
            if dx is not None:
                _add_update(group, dx, each_ds, group.of(self._straight.A[i]), mask, fresh)
                fresh = self.mixed
            if self.dA[i] is not None:
                assert x is not None
                ds = ds if w is None else ds.mul_(w)
                each_dst = group.cut(ds.t(), 1)
                _write(group.of(self.each_dA[i]), each_dst, _dropped(group, x, mask))

    def grads(self) -> LinearGrads:
        """dA [r·E, K] and dB [N, r·E] of each adapter, dense."""
        pairs = []
        for dA, dB in zip(self.dA, self.dB, strict=True):
            if dA is not None:
                dA = dA.view(-1, dA.shape[2])
            if dB is not None:
                E, N, r = dB.shape
                dB = dB.view(E, N * r).t().contiguous().view(N, r * E)
            pairs.append((dA, dB))
        return LinearGrads(self.dbias, pairs)


def low_rank(part: ExpertLinear, x: Tensor, mixed: bool) -> tuple[torch.dtype, int]:
    """(the dtype of the low-rank products, R: the columns of S) of a linear."""
    low, ranks = x.dtype, [f.rank(part.weight.shape[0]) for f in part.factors]
    for i, f in enumerate(part.factors):
        own = low_rank_dtype(x, f.A)
        low = torch.promote_types(low, own) if i else own
    return low, (max if mixed else sum)(ranks) if ranks else 0


def _fill(to: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
    """The bias, or zeros, in rows that no adapter writes."""
    for i, rows in enumerate(to):
        rows.zero_() if biases is None else rows.copy_(biases[i].expand_as(rows))


def _dropped(group: Group, x: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
    """mask ∘ x of each piece."""
    if mask is None:
        return group.cut(x)
    if group.own is None:
        return group.cut(x * mask)
    return [a * b for a, b in zip(group.cut(x), group.cut(mask), strict=True)]


def _add_update(
    group: Group,
    dx: Tensor,
    each_ds: Sequence[Tensor],
    A: Sequence[Tensor],
    mask: Tensor | None,
    fresh: bool,
) -> None:
    """dx (+)= mask ∘ (dS A)."""
    to = dx if fresh or mask is None else torch.empty_like(dx)
    each = zip(group.cut(to), each_ds, A, strict=True)
    if to is dx and not fresh:
        for rows, ds, a in each:
            rows.addmm_(ds, a)
        return
    for rows, ds, a in each:
        torch.mm(ds, a, out=rows)
    if mask is not None:
        for rows, own in zip(group.parts(to), group.parts(mask), strict=True):
            rows.mul_(own)
    if to is not dx:
        dx.add_(to)


def _write(out: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """out = a b of each, without rounding to a dtype narrower than out's in between."""
    for to, left, right in zip(out, a, b, strict=True):
        if to.dtype is left.dtype:
            torch.mm(left, right, out=to)
        else:
            to.copy_(mm_to(left, right, to.dtype))
