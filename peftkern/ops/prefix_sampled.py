"""A few numbers of a result of prefix attention, with the same numbers in float64.

:mod:`.sampled` has the purpose. The definition is that of :mod:`peftkern.kernels.prefix_reference`.
In a training step the gradient of O is the way's own O, so the float64 gradients are computed for
every way:

    O, dQ                up to 8 rows of 4 heads of 4 rows of the batch: 512 (P + S) D FLOP for O,
                         1536 (P + S) D for both
    dK, dV, dKp, dVp     up to 8 own and 8 prefix keys of the last key head, in every row of the
                         batch, from all queries of its heads: 4 D FLOP a score, of which there are
                         B (H / H_kv) T (P + S)

Above 2**33 scores (4.4e12 FLOP for D = 128) the second line is left out, and these four are only
compared with another way's.

A score gradient is P (dP - δ), a difference that can be much smaller than its terms, when nearly
all of a row's weight is on one key or when keys are nearly equal. The effect of one relative
rounding of the terms on dQ, dK and dKp decides their allowed error (``size``), since no way can be
more exact.

In float64 at a time are 2**22 numbers of keys or values, and about six arrays of 2**21 scores, or
of the scores of one row (128 MiB together).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .choices import tensors
from .prefix_rule import Needs, Rule
from .sampled import BLOCK, Exact, Sample, of_other_shapes, places

ROWS, HEADS, BATCH, KEYS = 8, 4, 4, 8
SCORES = 2**21  # of queries and keys at a time
MOST_SCORES = 2**33
# the factor in `size` of a relative rounding of all terms: a race's limits are four to eight
# roundings of the dtype, so that one or two are allowed where terms cancel
SHARE = 0.25
NAMES = ("dQ", "dK", "dV", "dKp", "dVp")
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, kp, vp


def attention(five: Five, rule: Rule, needs: Needs | None) -> Exact:
    """The samples of O [B, H, T, D], or with ``needs`` of [O, *the gradients that it asks for].

    The gradient of O is O itself.

    Args:
        five: q [B, H, T, D], k and v [B, H_kv, S, D], kp and vp [H_kv, P, D] or [B, H_kv, P, D].
        rule: of the call.
        needs: for each of dQ, dK, dV, dKp and dVp, True if a training step makes it; None without
            gradients.
    """
    wanted = [i for i in range(5) if needs is not None and needs[i]]

    def samples(result: Any) -> list[Sample]:
        o, *grads = tensors(result)
        shapes = [five[0].shape, *(five[i].shape for i in wanted)]
        found = of_other_shapes([o, *grads], shapes)
        if found:
            return found
        given = dict(zip(wanted, grads, strict=True))
        found = _over_queries(five, rule, o, given.pop(0, None))
        if given:
            found += _over_keys(five, rule, o, given)
        return found

    return samples


# ---------------------------------------------------------------------------- one head


class _Head(NamedTuple):
    """One query head of one row of the batch."""

    q: Tensor  # [T, D]
    keys: tuple[Tensor, Tensor]  # [P, D], [S, D]
    values: tuple[Tensor, Tensor]
    rule: Rule
    b: int
    h: int

    def sees(self, t: Tensor) -> Tensor:
        """bool [rows, P + S], True for keys that the queries ``t`` see."""
        P, S = (len(x) for x in self.keys)
        rule, device = self.rule, t.device
        offset: Any = rule.offset
        if isinstance(offset, Tensor):  # stays on the device: the host does not wait for it
            offset = offset.reshape(-1)[self.b if offset.numel() > 1 else 0]
        query, key = (P + offset + t)[:, None], torch.arange(P + S, device=device)
        see = torch.ones(len(t), P + S, dtype=torch.bool, device=device)
        if rule.causal:
            see &= (key < P) | (key <= query)
        if rule.window is not None:
            see &= key > query - rule.window
        if rule.keep is not None:
            see[:, P:] &= rule.keep[self.b]
        if rule.no_prefix is not None:
            see[:, :P] &= ~rule.no_prefix[self.b]
        return see

    def attend(self, t: Tensor) -> _Rows:
        """The weights and outputs of the queries ``t``."""
        rule, q = self.rule, self.q[t].double()
        scores, slope = rule.scale * _dot(q, self.keys), None
        if rule.softcap is not None:
            bent = torch.tanh(scores / rule.softcap)
            scores, slope = rule.softcap * bent, 1.0 - bent * bent
        hidden = ~self.sees(t)
        scores.masked_fill_(hidden, float("-inf"))
        if slope is not None:  # hidden keys may be NaN, and 0 times NaN is NaN
            slope.masked_fill_(hidden, 0.0)
        top = scores.amax(-1, keepdim=True)
        if rule.sinks is not None:
            top = top.maximum(rule.sinks[self.h].double())
        top = top.masked_fill(top == float("-inf"), 0.0)  # rows that see nothing
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if rule.sinks is not None:
            total = total + torch.exp(rule.sinks[self.h].double() - top)
        weights /= total.masked_fill(total == 0.0, 1.0)
        return _Rows(q, weights, slope, _mix(weights, self.values))


class _Rows(NamedTuple):
    """Some queries of a head, in float64."""

    q: Tensor  # [rows, D]
    weights: Tensor  # [rows, P + S]
    slope: Tensor | None  # the derivative of the scores after softcap by those before
    o: Tensor  # [rows, D]

    def grad_scores(
        self, do: Tensor, dp: Tensor, at: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """(dS of the keys ``at``, sum of its terms' magnitudes), both without the factor scale.

        ``dp`` is dP = dO Vᵀ of these keys.
        """
        delta = (do * self.o).sum(-1, keepdim=True)
        weights, seen = self.weights[:, at], self.weights[:, at] > 0  # hidden keys may be NaN
        if self.slope is not None:
            weights = weights * self.slope[:, at]
        ds = weights * torch.where(seen, dp - delta, 0.0)
        return ds, weights * torch.where(seen, dp.abs() + delta.abs(), 0.0)


def _blocks(parts: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """(places among the P + S keys, these keys or values in float64), block by block."""
    first = 0
    for part in parts:
        step = max(1, BLOCK // max(1, part.shape[1]))
        for i in range(0, len(part), step):
            block = part[i : i + step].double()
            yield slice(first + i, first + i + len(block)), block
        first += len(part)


def _dot(rows: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
    """The products [rows, P + S] of ``rows`` [rows, D] with all keys or values."""
    return torch.cat([rows @ block.t() for _, block in _blocks(parts)], 1)


def _mix(weights: Tensor, parts: tuple[Tensor, Tensor], power: int = 1) -> Tensor:
    """The weighted sums [rows, D] of all keys or values to a power.

    Those without a weight in any row may be NaN.
    """
    total = weights.new_zeros(len(weights), parts[0].shape[1])
    for at, block in _blocks(parts):
        unseen = ~(weights[:, at] != 0).any(0)
        total.addmm_(weights[:, at], block.masked_fill(unseen[:, None], 0.0).pow_(power))
    return total


def _head(five: Five, rule: Rule, b: int, h: int) -> _Head:
    q, k, v, kp, vp = five
    of = h // (q.shape[1] // k.shape[1])
    kp, vp = (x[of] if x.dim() == 3 else x[b, of] for x in (kp, vp))
    return _Head(q[b, h], (kp, k[b, of]), (vp, v[b, of]), rule, b, h)


# -------------------------------------------------------------------------- the samples


def _over_queries(five: Five, rule: Rule, o: Tensor, dq: Tensor | None) -> list[Sample]:
    """The samples of O at a few rows, and of dQ if it is given."""
    B, H, T, _ = o.shape
    t = places(T, ROWS, o.device)
    found_o, found_q = [], []
    squares: Any = 0.0
    for b, h in ((b, h) for b in _numbers(B, BATCH) for h in _numbers(H, HEADS)):
        head = _head(five, rule, b, h)
        rows = head.attend(t)
        found_o.append((o[b, h][t], rows.o))
        if dq is None:
            continue
        do = o[b, h][t].double()
        ds, terms = rows.grad_scores(do, _dot(do, head.values))
        # each term has a rounding of its own, and δ has one that all terms of a row share
        shared = (do * rows.o).norm(dim=-1, keepdim=True)
        through = rows.weights if rows.slope is None else rows.weights * rows.slope
        roundings = _mix(terms.square(), head.keys, 2).sum()
        roundings += (shared * _mix(through, head.keys)).square().sum()
        squares = squares + rule.scale**2 * roundings
        found_q.append((dq[b, h][t], rule.scale * _mix(ds, head.keys)))
    found = [_sample("O", found_o)]
    if dq is not None:
        found.append(_sample("dQ", found_q, squares))
    return found


def _numbers(n: int, count: int) -> list[int]:
    found: list[int] = places(n, count, torch.device("cpu")).tolist()
    return found


def _sample(name: str, pairs: list[tuple[Tensor, Tensor]], squares: Any = 0.0) -> Sample:
    got, exact = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
    return Sample(name, got, exact, SHARE * float(squares) ** 0.5)


def _over_keys(five: Five, rule: Rule, o: Tensor, given: dict[int, Tensor]) -> list[Sample]:
    """The samples of dK, dV, dKp and dVp, if given, at a few keys of the last key head."""
    q, k, _, kp, _ = five
    (B, H, T, _), H_kv, S, P = q.shape, k.shape[1], k.shape[2], kp.shape[-2]
    last, shared = H_kv - 1, kp.dim() == 3
    if B * (H // H_kv) * T * (P + S) > MOST_SCORES:
        return []
    front, own = places(P, KEYS, q.device), places(S, KEYS, q.device)
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in given}
    squares = dict.fromkeys(given, 0.0)
    prefix: Any = 0.0  # a shared one's gradients are sums over the batch
    for b in range(B):
        found = _grads_of_keys(five, rule, o, b, front, own)
        prefix = found[:, : len(front)] + (prefix if shared else 0.0)
        for i in given:
            of_prefix, which = i >= 3, (i - 1) % 2  # in `found` 0 is dK or dKp, 1 is dV or dVp
            if of_prefix and shared and b < B - 1:
                continue
            at, exact = (front, prefix) if of_prefix else (own, found[:, len(front) :])
            grad = given[i][last] if of_prefix and shared else given[i][b, last]
            pairs[i].append((grad[at], exact[which]))
            if which == 0:
                squares[i] += float(exact[2].sum())
    return [_sample(NAMES[i], pairs[i], squares[i]) for i in given]


def _grads_of_keys(five: Five, rule: Rule, o: Tensor, b: int, front: Tensor, own: Tensor) -> Tensor:
    """dK, dV and the squares of a rounding in dK, [3, keys, D], for one row of the batch.

    The keys are the prefix keys ``front`` and the own keys ``own`` of the last key head.
    """
    (_, H, T, D), H_kv = o.shape, five[1].shape[1]
    P = five[3].shape[-2]
    at = torch.cat([front, P + own])
    found = torch.zeros(3, len(at), D, dtype=torch.float64, device=o.device)
    for h in range(H - H // H_kv, H):
        head = _head(five, rule, b, h)
        values = torch.cat([head.values[0][front], head.values[1][own]]).double()
        step = max(1, SCORES // sum(len(x) for x in head.keys))
        for i in range(0, T, step):
            t = torch.arange(i, min(T, i + step), device=o.device)
            rows, do = head.attend(t), o[b, h][t].double()
            ds, terms = rows.grad_scores(do, do @ values.t(), at)
            found[0] += rule.scale * ds.t() @ rows.q
            found[1] += rows.weights[:, at].t() @ do
            found[2] += rule.scale**2 * terms.square().t() @ rows.q.square()
    return found
