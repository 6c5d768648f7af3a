"""One linear of the experts with its adapters, on the rows of one expert after another.

    S = c (mask ∘ x) A_eᵀ        y = S B_eᵀ + bias_e, then y += x W_eᵀ        c = scale / (1 - p)

The backward takes dy without the routing weights w, which down's rows have:

    dS = c dy B_e        dx = dy W_e + mask ∘ (dS A_e)
    dB_e = dyᵀ (w ∘ S)   dA_e = (w ∘ dS)ᵀ (mask ∘ x)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bits import unpack_bits
from ..torch_products import in_dtype, low_rank_dtype, mm_to
from .order import Run, Span
from .parts import ExpertLinear, Factors, LinearGrads

# of more experts than this share, all of B are copied at once: the transpose of a whole matrix
# takes a quarter of the time of as many columns one by one
_MOST = 0.3


def _by_expert(B: Tensor, experts: int, touched: Sequence[int], dtype: torch.dtype) -> Tensor:
    """B [N, r·E] of the touched experts as [m, N, r], dense."""
    N = B.shape[0]
    r = B.shape[1] // experts
    flat = B.reshape(N * r, experts)
    if len(touched) < experts:
        flat = flat.index_select(1, torch.tensor(touched, dtype=torch.int64, device=B.device))
    return in_dtype(dtype, flat.t().contiguous()).view(len(touched), N, r)


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
        self.weight, self.bias, self.words, self.mixed = part.weight, part.bias, words, mixed
        self.factors = part.factors
        experts = part.weight.shape[0]
        self.low, self.R = low_rank(part, x, mixed)
        self.offsets, at = [], 0
        for f in self.factors:
            self.offsets.append(at)
            at += 0 if mixed else f.rank(experts)
        touched: Sequence[int] = [s.expert for s in spans]
        if len(touched) > _MOST * experts:
            touched = range(experts)
        self.place = {e: i for i, e in enumerate(touched)}
        self.A = [f.A.reshape(experts, f.rank(experts), f.A.shape[1]) for f in self.factors]
        self.B = [_by_expert(f.B, experts, touched, self.low) for f in self.factors]
        self.dA: list[Tensor | None] = []
        self.dB: list[Tensor | None] = []
        self.dbias: Tensor | None = None
        self.trains = False

    def _runs(self, span: Span) -> Sequence[Run | tuple[int, int, int]]:
        if span.runs is not None:
            return span.runs
        rows = span.end - span.start
        return [(i, 0, rows) for i in range(len(self.factors))]

    def _of(self, i: int, e: int) -> tuple[Factors, Tensor, Tensor] | None:
        """(adapter i, its A_e [r, K], its B_e [N, r]), or None if it adds nothing."""
        if i >= len(self.factors) or not self.A[i].shape[1]:
            return None
        return self.factors[i], in_dtype(self.low, self.A[i][e]), self.B[i][self.place[e]]

    def _mask(self, i: int, start: int, end: int, columns: int) -> Tensor | None:
        """The mask of adapter i on sorted rows as numbers."""
        if self.words is None or self.factors[i].p == 0.0:
            return None
        words = self.words[0 if self.mixed else i, start:end]
        return unpack_bits(words, columns, self.low)

    def forward(self, span: Span, x: Tensor, y: Tensor, s: Tensor | None) -> None:
        """Write y [m, N] for x [m, K], and S into ``s`` [m, R] if there are adapters."""
        e = span.expert
        w, bias = self.weight[e].t(), None if self.bias is None else self.bias[e]
        if s is None or self.low is not x.dtype:
            # wider low-rank parts are not rounded before the base product
            torch.mm(x, w, out=y) if bias is None else torch.addmm(bias, x, w, out=y)
            if s is not None:
                wide = y.to(self.low)
                self._add(span, x.to(self.low), wide, s, None, written=True)
                y.copy_(wide)
            return
        self._add(span, x, y, s, bias, written=False)
        y.addmm_(x, w)

    def _add(
        self, span: Span, x: Tensor, y: Tensor, s: Tensor, bias: Tensor | None, written: bool
    ) -> None:
        e, K = span.expert, x.shape[1]
        for i, a, b in self._runs(span):
            whole = b - a == len(x)
            ya, xa, sa = (y, x, s) if whole else (y[a:b], x[a:b], s[a:b])
            fresh = not written and (self.mixed or i == 0)
            found = self._of(i, e)
            if found is None:
                if fresh:
                    ya.zero_() if bias is None else ya.copy_(bias.expand_as(ya))
                continue
            f, A, B = found
            if self.mixed and sa.shape[1] != len(A):
                sa = sa[:, : len(A)]
            elif not self.mixed and len(self.factors) > 1:
                sa = sa[:, self.offsets[i] : self.offsets[i] + len(A)]
            mask = self._mask(i, span.start + a, span.start + b, K)
            if mask is not None:
                xa = mask.mul_(xa)
            torch.addmm(sa, xa, A.t(), beta=0, alpha=f.scale / (1.0 - f.p), out=sa)
            if not fresh:
                ya.addmm_(sa, B.t())
            elif bias is None:
                torch.mm(sa, B.t(), out=ya)
            else:
                torch.addmm(bias, sa, B.t(), out=ya)

    def want(self, wanted: Sequence[tuple[bool, bool]], bias: bool) -> None:
        """Make room for the gradients that are wanted; experts without tokens have zeros."""
        E, N = self.weight.shape[:2]
        self.dA = [
            torch.zeros_like(f.A, memory_format=torch.contiguous_format) if a else None
            for f, (a, _) in zip(self.factors, wanted, strict=True)
        ]
        self.dB = [
            f.B.new_zeros((E, N, f.rank(E))) if b else None
            for f, (_, b) in zip(self.factors, wanted, strict=True)
        ]
        self.trains = any(a or b for a, b in wanted)
        if bias and self.bias is not None:
            self.dbias = torch.zeros_like(self.bias)

    def backward(
        self,
        span: Span,
        dy: Tensor,
        w: Tensor | None,
        x: Tensor | None,
        s: Tensor | None,
        dx: Tensor | None,
    ) -> None:
        """Write dx [m, K] without w, if it is wanted; dA, dB and the bias' gradient are kept here.

        dy [m, N]; w [m, 1]; x [m, K] and s [m, R] are what dA and dB need.
        """
        e = span.expert
        if self.dbias is not None:
            self.dbias[e] = (dy if w is None else dy * w).sum(0)
        low = dx
        if self.factors and (dx is not None or self.trains):
            if dx is not None and self.low is not dx.dtype:
                low = dx.new_empty(dx.shape, dtype=self.low)
            self._low_rank_grads(span, in_dtype(self.low, dy), w, x, s, low)
        if dx is None:
            return
        if not self.factors:
            torch.mm(dy, self.weight[e], out=dx)
        elif low is dx:
            dx.addmm_(dy, self.weight[e])
        else:
            assert low is not None
            dx.copy_(low.add_(torch.mm(dy, self.weight[e])))

    def _low_rank_grads(
        self,
        span: Span,
        dy: Tensor,
        w: Tensor | None,
        x: Tensor | None,
        s: Tensor | None,
        dx: Tensor | None,
    ) -> None:
        e, K = span.expert, self.weight.shape[2]
        for i, a, b in self._runs(span):
            found, part, fresh = self._of(i, e), slice(a, b), self.mixed or i == 0
            if found is None:
                if dx is not None and fresh:
                    dx[part].zero_()
                continue
            f, A, B = found
            dA, dB = self.dA[i], self.dB[i]
            dya, wa = dy[part], None if w is None else w[part]
            if dB is not None:
                assert s is not None
                sa = s[part, self.offsets[i] : self.offsets[i] + len(A)]
                _write(dB[e], dya.t(), sa if wa is None else sa * in_dtype(self.low, wa))
            if dx is None and dA is None:
                continue
            ds = dya.new_empty((b - a, len(A)))
            torch.addmm(ds, dya, B, beta=0, alpha=f.scale / (1.0 - f.p), out=ds)
            mask = self._mask(i, span.start + a, span.start + b, K)
            if dx is not None:
                _add_update(dx[part], ds, A, mask, fresh)
            if dA is not None:
                assert x is not None
                xa = in_dtype(self.low, x[part])
                if mask is not None:
                    xa = mask.mul_(xa)
                own = dA.view(self.weight.shape[0], len(A), K)[e]
                _write(own, (ds if wa is None else ds.mul_(wa)).t(), xa)

    def grads(self) -> LinearGrads:
        """dA [r·E, K] and dB [N, r·E] of each adapter, dense."""
        pairs = []
        for dA, dB in zip(self.dA, self.dB, strict=True):
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


def _add_update(dx: Tensor, ds: Tensor, A: Tensor, mask: Tensor | None, fresh: bool) -> None:
    """dx (+)= mask ∘ (dS A)."""
    if not fresh:
        dx.add_(torch.mm(ds, A).mul_(mask)) if mask is not None else dx.addmm_(ds, A)
        return
    torch.mm(ds, A, out=dx)
    if mask is not None:
        dx.mul_(mask)


def _write(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, without rounding to a dtype narrower than out's in between."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(mm_to(a, b, out.dtype))
