"""Attention over a prefix and own keys on a CPU, in blocks: one softmax over both sources.

Scores are float32 (float64 for float64), in blocks that stay in the cache. Unlike the vendor's CPU
attention this skips the blocks that causality, a window or padding hide (torch's kernel computes
the whole square up to 512 keys). It also gives BLAS larger products, and needs no merge.

A sequence's heads are the batch of each product; the G query heads that share a key head are rows
next to each other, [H_kv, T G, D]. Scores are in base 2, because torch's exp2 takes a third of the
time of its exp on a CPU. Half precision is widened head by head, as torch's kernel is slower in it
than in float32 (fp16 backward: ten times).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix_blocks import BLOCK, NOTHING, Call, Scratch, rows_of, split
from .prefix_rule import Grads, Needs, Rule

# the rows of query from which the blocks are faster than the merge, in float32 and in half
# precision, where they are also more exact; in float32 measured with one thread, and not used with
# more
ROWS = 144
HALF_ROWS = 16
THREADS = 1


def why_not(q: Tensor, rule: Rule) -> str | None:
    """The reason that these blocks do not take a call; None when they do."""
    if not q.is_cpu:
        return f"tensors on {q.device.type}"
    if rule.scored is not None:
        return rule.scored
    if isinstance(rule.offset, Tensor):
        return "an offset known to the device alone"
    if rule.window is not None:
        return None  # the merge does not take windows
    half = q.dtype.itemsize < 4
    rows = HALF_ROWS if half else ROWS
    if q.shape[2] < rows:
        return f"fewer than {rows} rows of query"
    if not half and torch.get_num_threads() > THREADS:
        return f"more than {THREADS} threads, which the vendor's attention keeps busier"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(O [B, H, T, D], in memory [B, T, H, D]; base 2 log-sum-exp [B, H_kv, T G, 1])."""
    call = Call(q, k, kp, rule)
    B, H, T, D, G, P = call.B, call.H, call.T, call.D, call.G, call.P
    offset, window, dtype, hide = call.offset, call.window, call.dtype, call.hide
    o = q.new_empty(B, T, H, D).transpose(1, 2)
    lse = q.new_empty(B, call.H_kv, T * G, 1, dtype=dtype)
    kp, vp = kp.to(dtype), vp.to(dtype)
    step = call.heads_at_once(call.S)
    rows = min(BLOCK, T)
    own, front = (Scratch(step * rows * G * n, dtype) for n in (call.S, P))
    out = Scratch(step * rows * G * D, dtype)
    blind = rule.no_prefix is not None or window is not None  # True if a row may see nothing
    for b, h in itertools.product(range(B), range(0, call.H_kv, step)):
        span, heads, wide = call.spans[b], slice(h, h + step), slice(h * G, (h + step) * G)
        q_, o_, lse_ = rows_of(q[b, wide], G, dtype), split(o[b, wide], G), lse[b, heads]
        kt, v_ = k[b, heads].to(dtype).transpose(1, 2), v[b, heads].to(dtype)
        kpt, vp_ = call.of_prefix(kp, b, heads).transpose(1, 2), call.of_prefix(vp, b, heads)
        N = kt.shape[0]
        for t in range(0, T, BLOCK):
            end = min(T, t + BLOCK)
            near = offset + t  # coordinate of the first row
            far = -P if window is None else max(-P, near - window + 1)
            part = slice(t * G, end * G)
            qb, M = q_[:, part], (end - t) * G
            pieces = []
            if far < 0 and not call.bare[b]:
                s = front(N, M, -far)
                torch.baddbmm(s, qb, kpt[:, :, far:], beta=0, alpha=call.scale2, out=s)
                if window is not None:
                    hide(s, near - far)
                pieces.append((s, vp_[:, far:]))
            first = max(span.first, far)
            last = min(span.last, offset + end) if rule.causal else span.last
            if first < last:
                s = own(N, M, last - first)
                torch.baddbmm(s, qb, kt[:, :, first:last], beta=0, alpha=call.scale2, out=s)
                if span.holes is not None:
                    s.add_(span.holes[first:last])
                hide(s, near - first)
                pieces.append((s, v_[:, first:last]))
            if not pieces:
                o_[:, t:end] = 0
                lse_[:, part] = NOTHING
                continue
            acc = out(N, M, D)
            total, lse_[:, part] = _softmax(pieces, acc, blind)
            if G > 1:
                o_[:, t:end] = acc.div_(total).view(N, end - t, G, D)
            else:
                torch.div(acc, total, out=o_[:, t:end, 0])
    return o, lse


def _softmax(
    pieces: list[tuple[Tensor, Tensor]], acc: Tensor, blind: bool
) -> tuple[Tensor, Tensor]:
    """(sum, log-sum-exp) of a softmax over several sources, each [N, M, 1].

    Args:
        pieces: (scores [N, M, C], which are overwritten, values [N, C, D]) of each source.
        acc: gets the weighted values [N, M, D], not yet divided by the sum.
        blind: True if a row may see nothing.
    """
    top = pieces[0][0].amax(-1, keepdim=True)
    for s, _ in pieces[1:]:
        top = torch.maximum(top, s.amax(-1, keepdim=True))
    if blind:
        top.clamp_(min=NOTHING)  # -inf - -inf would be NaN
    total: Tensor | None = None
    for s, values in pieces:
        s.sub_(top).exp2_()
        if total is None:
            total = s.sum(-1, keepdim=True)
            torch.bmm(s, values, out=acc)
        else:
            total.add_(s.sum(-1, keepdim=True))
            torch.baddbmm(acc, s, values, out=acc)
    assert total is not None
    if blind:
        total.clamp_(min=1.0)  # it is 1 or more, but 0 in a row that sees nothing
    return total, top.add_(total.log2())


class _Heads(NamedTuple):
    """Some key heads of one row of the batch, with their query heads as rows."""

    b: int
    heads: slice
    q: Tensor  # [N, T G, D]
    do: Tensor
    k: Tensor  # [N, S, D]
    v: Tensor
    lse: Tensor  # [N, T G, 1]
    delta: Tensor  # [N, T G, 1], the row sums of dO ∘ O
    grad: Tensor  # [N, T G, D], dQ without the factor scale


class _Backward:
    """The gradients of one call, None for those that are not wanted, and memory to make them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule, needs: Needs
    ) -> None:
        call = self.call = Call(q, k, kp, rule)
        self.needs_q, self.needs_k, self.needs_v, self.needs_kp, self.needs_vp = needs
        B, T, D, G, dtype = call.B, call.T, call.D, call.G, call.dtype
        self.kp, self.vp = kp.to(dtype), vp.to(dtype)
        self.dq = q.new_empty(B, T, call.H, D).transpose(1, 2) if self.needs_q else None
        self.dk = torch.empty_like(k) if self.needs_k else None
        self.dv = torch.empty_like(v) if self.needs_v else None
        self.dkp = kp.new_zeros(kp.shape, dtype=dtype) if self.needs_kp else None
        self.dvp = vp.new_zeros(vp.shape, dtype=dtype) if self.needs_vp else None
        self.step = call.heads_at_once(T)
        width = min(BLOCK, call.S)
        size = self.step * T * G * max(width, call.P)
        self.probs, self.dscores = Scratch(size, dtype), Scratch(size, dtype)
        self.acc = Scratch(self.step * T * G * D, dtype)
        self.some = Scratch(self.step * max(T * G, width) * D, dtype)

    def scores(
        self, at: _Heads, rows: slice, keys: Tensor, values: Tensor, base: int,
        holes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, slice]:  # fmt: skip
        """(P, dS, slice of the rows in ``at``) for some query rows and keys.

        P and dS are [N, M G, C], dS without the factor scale.
        """
        G = self.call.G
        part = slice(rows.start * G, rows.stop * G)
        size = (keys.shape[0], part.stop - part.start, keys.shape[1])
        s, g = self.probs(*size), self.dscores(*size)
        q = at.q[:, part]
        torch.baddbmm(s, q, keys.transpose(1, 2), beta=0, alpha=self.call.scale2, out=s)
        if holes is not None:
            s.add_(holes)
        self.call.hide(s, base)
        s.sub_(at.lse[:, part]).exp2_()
        if self.needs_q or self.needs_k or self.needs_kp:
            torch.bmm(at.do[:, part], values.transpose(1, 2), out=g)
            g.sub_(at.delta[:, part]).mul_(s)
        return s, g, part

    def over_prefix(self, at: _Heads) -> None:
        """Add to the gradients of the prefix, and write its part of dQ to ``at.grad``."""
        call, b, heads = self.call, at.b, at.heads
        T, window = call.T, call.window
        stop = T if window is None else max(0, min(T, window - 1 - call.offset))
        if self.needs_q and (stop < T or call.bare[b]):
            at.grad.zero_()
        if stop <= 0 or call.bare[b] or not (self.needs_q or self.needs_kp or self.needs_vp):
            return
        keys, values = call.of_prefix(self.kp, b, heads), call.of_prefix(self.vp, b, heads)
        s, g, part = self.scores(at, slice(0, stop), keys, values, call.offset + call.P)
        if self.dvp is not None:
            call.of_prefix(self.dvp, b, heads).baddbmm_(s.transpose(1, 2), at.do[:, part])
        if self.dkp is not None:
            call.of_prefix(self.dkp, b, heads).baddbmm_(g.transpose(1, 2), at.q[:, part])
        if self.needs_q and stop == T:
            torch.bmm(g, keys, out=at.grad)
        elif self.needs_q:
            at.grad[:, part] = torch.bmm(g, keys)

    def over_own(self, at: _Heads) -> None:
        """Write dK and dV, and add the own keys' part of dQ to ``at.grad``."""
        call, b, heads = self.call, at.b, at.heads
        span, N, D = call.spans[b], at.k.shape[0], call.D
        if not (self.needs_q or self.needs_k or self.needs_v):
            return
        if span.first > 0 or span.last < call.S:
            self.unseen(at, slice(0, span.first))
            self.unseen(at, slice(span.last, call.S))
        for first in range(span.first, span.last, BLOCK):
            last = min(span.last, first + BLOCK)
            start = max(0, first - call.offset) if call.causal else 0
            stop = (
                call.T if call.window is None else min(call.T, last - 1 + call.window - call.offset)
            )
            if start >= stop:
                self.unseen(at, slice(first, last))
                continue
            holes = span.holes[first:last] if span.holes is not None else None
            keys, values, base = at.k[:, first:last], at.v[:, first:last], call.offset - first
            s, g, part = self.scores(at, slice(start, stop), keys, values, base + start, holes)
            if self.dv is not None:
                x = self.some(N, last - first, D)
                torch.bmm(s.transpose(1, 2), at.do[:, part], out=x)
                self.dv[b, heads, first:last] = x
            if self.dk is not None:
                x = self.some(N, last - first, D)
                torch.bmm(g.transpose(1, 2), at.q[:, part], out=x)
                torch.mul(x, call.scale, out=self.dk[b, heads, first:last])
            if self.needs_q:
                x = self.some(N, part.stop - part.start, D)
                at.grad[:, part].add_(torch.bmm(g, keys, out=x))

    def unseen(self, at: _Heads, keys: slice) -> None:
        """Write zero gradients for keys that no query sees."""
        for x in (self.dk, self.dv):
            if x is not None:
                x[at.b, at.heads, keys] = 0


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor,
    vp: Tensor,
    o: Tensor,
    lse: Tensor,
    rule: Rule,
    needs: Needs,
) -> Grads:
    """(dQ, dK, dV, dKp, dVp), with None for those that ``needs`` does not ask for.

    For a shared prefix the last two are summed over the batch.
    """
    grads = _Backward(q, k, v, kp, vp, rule, needs)
    call, step = grads.call, grads.step
    T, D, G, dtype = call.T, call.D, call.G, call.dtype
    for b, h in itertools.product(range(call.B), range(0, call.H_kv, step)):
        heads, wide = slice(h, h + step), slice(h * G, (h + step) * G)
        q_, do_ = rows_of(q[b, wide], G, dtype), rows_of(do[b, wide], G, dtype)
        N = do_.shape[0]
        product = grads.some(N, T * G, D).unflatten(1, (T, G))
        torch.mul(split(o[b, wide], G), do_.unflatten(1, (T, G)), out=product)
        delta = product.sum(-1).flatten(1, 2).unsqueeze(-1)
        k_, v_ = k[b, heads].to(dtype), v[b, heads].to(dtype)
        grad = grads.acc(N, T * G, D)
        at = _Heads(b, heads, q_, do_, k_, v_, lse[b, heads], delta, grad)
        grads.over_prefix(at)
        grads.over_own(at)
        if grads.dq is not None:
            out = split(grads.dq[b, wide], G)
            torch.mul(grad.unflatten(1, (T, G)), rule.scale, out=out)
    dkp, dvp = grads.dkp, grads.dvp
    if dkp is not None:
        dkp = dkp.mul_(rule.scale).to(q.dtype)
    return grads.dq, grads.dk, grads.dv, dkp, dvp.to(q.dtype) if dvp is not None else None
