"""Attention over a prefix and own keys on a CPU: one softmax over two sources, in blocks of
float32 scores (float64 for float64) that stay in the cache.

Beside the vendor's CPU attention this leaves out the blocks that causality, a window or padding
hide (torch's kernel computes the whole square up to 512 keys), hands BLAS larger products, and
takes one softmax over both sources, so nothing is merged. A sequence's heads are the batch of each
product; the G query heads that share a key head are rows beside each other, [H_kv, T G, D]. Scores
are in base 2, because torch's exp2 takes a third of the time of its exp on a CPU. Half precision is
widened head by head: torch's kernel is slower in it than in float32 (fp16 backward: ten times).

Distances: query t has coordinate ``offset`` + t, own key s has s, prefix key p has p - P; a causal
query sees distances d = query - key with 0 <= d, under a window also d < window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .prefix_rule import Grads, Needs, Rule

LOG2E = math.log2(math.e)
# a row with nothing to see: far below any score, and no infinity whose difference is NaN
NOTHING = -1e30
# rows (forward) or keys (backward) of a block, and the bytes that its scores may take in the cache
BLOCK = 64
CACHE = 1 << 21
# from how many rows of query the blocks are faster than the merge, in float32 and (where they are
# also more exact) in half precision; in float32 measured with one thread, and beyond it not taken
ROWS = 144
HALF_ROWS = 16
THREADS = 1


def why_not(q: Tensor, rule: Rule) -> str | None:
    """Why a call is not for these blocks; None when it is."""
    if not q.is_cpu:
        return f"tensors on {q.device.type}"
    if rule.scored is not None:
        return rule.scored
    if isinstance(rule.offset, Tensor):
        return "an offset known to the device alone"
    if rule.window is not None:
        return None  # the merge takes none
    half = q.dtype.itemsize < 4
    rows = HALF_ROWS if half else ROWS
    if q.shape[2] < rows:
        return f"fewer than {rows} rows of query"
    if not half and torch.get_num_threads() > THREADS:
        return f"more than {THREADS} threads, which the vendor's attention keeps busier"
    return None


class _Span(NamedTuple):
    """What a row of the batch sees of its own keys: ``first`` to ``last``, with ``holes`` between
    (0 or NOTHING, to be added to the scores) or None."""

    first: int
    last: int
    holes: Tensor | None


def _spans(keep: Tensor | None, B: int, S: int, dtype: torch.dtype) -> list[_Span]:
    if keep is None:
        return [_Span(0, S, None)] * B
    ones = keep.to(torch.uint8)
    counts = ones.sum(1).tolist()
    firsts = ones.argmax(1).tolist()
    lasts = (S - ones.flip(1).argmax(1)).tolist()
    spans = []
    for b, (count, first, last) in enumerate(zip(counts, firsts, lasts, strict=True)):
        if count == 0:
            spans.append(_Span(0, 0, None))
        elif count == last - first:
            spans.append(_Span(first, last, None))
        else:
            holes = torch.zeros(S, dtype=dtype).masked_fill_(~keep[b], -math.inf)
            spans.append(_Span(first, last, holes))
    return spans


class _Hide:
    """Adds -inf where the distance of row and column is below 0 (causal), or not below a window."""

    def __init__(self, rule: Rule, dtype: torch.dtype, G: int) -> None:
        self.causal, self.window, self.dtype, self.G = rule.causal, rule.window, dtype, G
        self.made: dict[tuple[bool, int, int, int], Tensor] = {}

    def __call__(self, scores: Tensor, base: int) -> None:
        """``scores`` [N, M G, C]; row i and column j have distance base + i - j."""
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
            distance = base + torch.arange(j - i)[:, None] - torch.arange(d - c)
            hidden = (distance < 0) if below else (distance >= 0)
            mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -math.inf)
            mask = self.made[key] = mask.repeat_interleave(self.G, 0)
        s[:, i * self.G : j * self.G, c:d].add_(mask)


class _Scratch:
    """Memory of the blocks, taken once a call; most blocks have one of a few shapes."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(size, dtype=dtype)
        self.views: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, n: int, m: int, c: int) -> Tensor:
        view = self.views.get((n, m, c))
        if view is None:
            view = self.views[n, m, c] = self.memory[: n * m * c].view(n, m, c)
        return view


def _rows(x: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """[H, T, D] as [H_kv, T G, D] in ``dtype``; a view where G is 1 and x has that dtype."""
    if G == 1:
        return x.to(dtype)
    split = _split(x, G)
    return torch.empty(split.shape, dtype=dtype).copy_(split).flatten(1, 2)


def _split(x: Tensor, G: int) -> Tensor:
    """[H, T, D] as [H_kv, T, G, D], a view."""
    groups: Tensor = x.unflatten(0, (-1, G))
    return groups.transpose(1, 2)


def _heads_at_once(H_kv: int, G: int, keys: int, itemsize: int) -> int:
    """Key heads that are the batch of one product, so that their scores fit the cache."""
    return max(1, min(H_kv, CACHE // (BLOCK * G * max(1, keys) * itemsize)))


def forward(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """O [B, H, T, D] (as [B, T, H, D] in memory) and the base 2 log-sum-exp [B, H_kv, T G, 1]."""
    B, H, T, D = q.shape
    H_kv, S, P = k.shape[1], k.shape[2], kp.shape[-2]
    G = H // H_kv
    offset, window = int(rule.offset), rule.window
    o = q.new_empty(B, T, H, D).transpose(1, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(B, H_kv, T * G, 1, dtype=dtype)
    kp, vp = kp.to(dtype), vp.to(dtype)
    step = _heads_at_once(H_kv, G, S, dtype.itemsize)
    rows = min(BLOCK, T)
    own, front = (_Scratch(step * rows * G * n, dtype) for n in (S, P))
    out = _Scratch(step * rows * G * D, dtype)
    hide = _Hide(rule, dtype, G)
    c = rule.scale * LOG2E
    spans = _spans(rule.keep, B, S, dtype)
    bare = rule.no_prefix.tolist() if rule.no_prefix is not None else None
    blind = bare is not None or window is not None  # whether a row may see nothing
    for b in range(B):
        span = spans[b]
        alone = bare is not None and bare[b]
        for h in range(0, H_kv, step):
            heads = slice(h, h + step)
            q_ = _rows(q[b, h * G : (h + step) * G], G, dtype)
            o_ = _split(o[b, h * G : (h + step) * G], G)
            kt, v_ = k[b, heads].to(dtype).transpose(1, 2), v[b, heads].to(dtype)
            lse_ = lse[b, heads]
            kp_, vp_ = (x[heads] if x.dim() == 3 else x[b, heads] for x in (kp, vp))
            kpt = kp_.transpose(1, 2)
            N = kt.shape[0]
            for t in range(0, T, BLOCK):
                end = min(T, t + BLOCK)
                near = offset + t  # coordinate of the first row
                far = -P if window is None else max(-P, near - window + 1)
                part = slice(t * G, end * G)
                qb, M = q_[:, part], (end - t) * G
                pieces = []
                if far < 0 and not alone:
                    s = front(N, M, -far)
                    torch.baddbmm(s, qb, kpt[:, :, far:], beta=0, alpha=c, out=s)
                    if window is not None:
                        hide(s, near - far)
                    pieces.append((s, vp_[:, far:]))
                first = max(span.first, far)
                last = min(span.last, offset + end) if rule.causal else span.last
                if first < last:
                    s = own(N, M, last - first)
                    torch.baddbmm(s, qb, kt[:, :, first:last], beta=0, alpha=c, out=s)
                    if span.holes is not None:
                        s.add_(span.holes[first:last])
                    hide(s, near - first)
                    pieces.append((s, v_[:, first:last]))
                if not pieces:
                    o_[:, t:end] = 0
                    lse_[:, part] = NOTHING
                    continue
                top = pieces[0][0].amax(-1, keepdim=True)
                for s, _ in pieces[1:]:
                    top = torch.maximum(top, s.amax(-1, keepdim=True))
                if blind:
                    top.clamp_(min=NOTHING)  # -inf - -inf would be NaN
                acc, total = out(N, M, D), None
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
                    total.clamp_(min=1.0)  # the largest counts 1; 0 is a row that sees nothing
                if G > 1:
                    o_[:, t:end] = acc.div_(total).view(N, end - t, G, D)
                else:
                    torch.div(acc, total, out=o_[:, t:end, 0])
                lse_[:, part] = top.add_(total.log2_())
    return o, lse


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
    """dQ, dK, dV and, reduced over the batch where the prefix is shared, dKp and dVp; None for what
    ``needs`` does not ask for."""
    B, H, T, D = q.shape
    H_kv, S, P = k.shape[1], k.shape[2], kp.shape[-2]
    G = H // H_kv
    offset, window, shared = int(rule.offset), rule.window, kp.dim() == 3
    needs_q, needs_k, needs_v, needs_kp, needs_vp = needs
    dq = q.new_empty(B, T, H, D).transpose(1, 2) if needs_q else None
    dk = torch.empty_like(k) if needs_k else None
    dv = torch.empty_like(v) if needs_v else None
    dtype = torch.promote_types(q.dtype, torch.float32)
    kp, vp = kp.to(dtype), vp.to(dtype)
    dkp = torch.zeros(kp.shape, dtype=dtype) if needs_kp else None
    dvp = torch.zeros(vp.shape, dtype=dtype) if needs_vp else None
    step = _heads_at_once(H_kv, G, T, dtype.itemsize)
    width = min(BLOCK, S)
    probs, dscores = (_Scratch(step * T * G * max(width, P), dtype) for _ in range(2))
    acc = _Scratch(step * T * G * D, dtype)
    some = _Scratch(step * max(T * G, width) * D, dtype)
    hide = _Hide(rule, dtype, G)
    c = rule.scale * LOG2E
    spans = _spans(rule.keep, B, S, dtype)
    bare = rule.no_prefix.tolist() if rule.no_prefix is not None else None

    def scores_of(
        rows: slice, keys: Tensor, values: Tensor, base: int, holes: Tensor | None
    ) -> tuple[Tensor, Tensor, slice]:
        """P and dS [N, M G, C] of some rows and keys (dS without the factor scale)."""
        size = (N, (rows.stop - rows.start) * G, keys.shape[1])
        part = slice(rows.start * G, rows.stop * G)
        s, g = probs(*size), dscores(*size)
        torch.baddbmm(s, q_[:, part], keys.transpose(1, 2), beta=0, alpha=c, out=s)
        if holes is not None:
            s.add_(holes)
        hide(s, base)
        s.sub_(lse_[:, part]).exp2_()
        if needs_q or needs_k or needs_kp:
            torch.bmm(do_[:, part], values.transpose(1, 2), out=g)
            g.sub_(delta[:, part]).mul_(s)
        return s, g, part

    for b in range(B):
        span = spans[b]
        alone = bare is not None and bare[b]
        for h in range(0, H_kv, step):
            heads, wide = slice(h, h + step), slice(h * G, (h + step) * G)
            q_, do_ = _rows(q[b, wide], G, dtype), _rows(do[b, wide], G, dtype)
            k_, v_, lse_ = k[b, heads].to(dtype), v[b, heads].to(dtype), lse[b, heads]
            kp_, vp_ = (x[heads] if shared else x[b, heads] for x in (kp, vp))
            N = k_.shape[0]
            product = some(N, T * G, D).unflatten(1, (T, G))
            torch.mul(_split(o[b, wide], G), do_.unflatten(1, (T, G)), out=product)
            delta = product.sum(-1).flatten(1, 2).unsqueeze(-1)
            grad = acc(N, T * G, D)
            stop = T if window is None else max(0, min(T, window - 1 - offset))
            fresh = needs_q  # whether grad holds nothing yet
            if stop > 0 and not alone and (needs_q or needs_kp or needs_vp):
                s, g, part = scores_of(slice(0, stop), kp_, vp_, offset + P, None)
                if dvp is not None:
                    (dvp if shared else dvp[b])[heads].baddbmm_(s.transpose(1, 2), do_[:, part])
                if dkp is not None:
                    (dkp if shared else dkp[b])[heads].baddbmm_(g.transpose(1, 2), q_[:, part])
                if needs_q and stop == T:
                    torch.bmm(g, kp_, out=grad)
                    fresh = False
                elif needs_q:
                    grad.zero_()[:, part] = torch.bmm(g, kp_)
                    fresh = False
            if fresh:
                grad.zero_()
            for x in (dk, dv):  # keys that no query sees
                if x is not None and (span.first > 0 or span.last < S):
                    x[b, heads, : span.first] = 0
                    x[b, heads, span.last :] = 0
            for first in range(span.first, span.last, BLOCK):
                if not (needs_q or needs_k or needs_v):
                    break
                last = min(span.last, first + BLOCK)
                start = max(0, first - offset) if rule.causal else 0
                stop = T if window is None else min(T, last - 1 + window - offset)
                if start >= stop:
                    for x in (dk, dv):
                        if x is not None:
                            x[b, heads, first:last] = 0
                    continue
                holes = span.holes[first:last] if span.holes is not None else None
                keys = k_[:, first:last]
                s, g, part = scores_of(
                    slice(start, stop), keys, v_[:, first:last], offset + start - first, holes
                )
                if dv is not None:
                    x = some(N, last - first, D)
                    dv[b, heads, first:last] = torch.bmm(s.transpose(1, 2), do_[:, part], out=x)
                if dk is not None:
                    x = some(N, last - first, D)
                    torch.bmm(g.transpose(1, 2), q_[:, part], out=x)
                    torch.mul(x, rule.scale, out=dk[b, heads, first:last])
                if needs_q:
                    x = some(N, (stop - start) * G, D)
                    grad[:, part].add_(torch.bmm(g, keys, out=x))
            if dq is not None:
                x = _split(dq[b, wide], G)
                torch.mul(grad.unflatten(1, (T, G)), rule.scale, out=x)
    if dkp is not None:
        dkp = dkp.mul_(rule.scale).to(q.dtype)
    return dq, dk, dv, dkp, dvp.to(q.dtype) if dvp is not None else None
