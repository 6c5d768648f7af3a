"""A batch whose samples name different adapters, on torch's own matrix products.

    Y[b] = X[b] Wᵀ + bias + scale_i · X[b] A_iᵀ B_iᵀ      i = the adapter of sample b

The batch is cut into parts. A part is one adapter's samples, with two products; or the samples of
many adapters, whose A and B are copied side by side so that two batched products serve them all.
Copies cost memory traffic, and zeros where ranks differ cost work as well; each part, and samples
that must be put in another order, cost host time or traffic. :func:`make_plan` weighs them by
bytes, once for a batch.

Without gradients the base product stays in the batch's order and each part adds to its samples of
Y; temporary tensors are written into memory that the thread keeps (:mod:`.scratch`). The batch is
put in the plan's order and back with gradients, and where parts are many and samples small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.private import in_transform
from . import autocast
from .bases.linear import base_output
from .scratch import Scratch
from .torch_products import in_dtype, low_rank_dtype

# How many bytes of A and B can be copied in the host time that one adapter, or one part, takes.
# Measured on a CPU: 16 us for the calls, 0.15 us to copy and multiply a KB.
# Zeros cost more than their bytes: factors of several ranks are put together piece by piece.
_BYTES_OF_CALLS = 64 * 1024
_BYTES_OF_PART = 16 * 1024


class Part(NamedTuple):
    """Samples ``start`` to ``stop`` of the order, and the adapters that they take."""

    start: int
    stop: int
    of: tuple[int, ...]  # the adapter of each batch of the batched products, or a single one
    ranks: tuple[int, ...]  # of each of them
    scale: float | Tensor  # [batches, 1, 1] where they differ
    dtype: torch.dtype  # of A and B
    first: int  # sample of the batch
    rows: Tensor | None  # int64, samples of the batch; None when they follow each other from first


class Plan(NamedTuple):
    """The order of a batch and its parts; samples without an adapter come last."""

    order: Tensor | None  # int64 [samples]; None when the samples stand in this order already
    back: Tensor | None  # its inverse
    parts: tuple[Part, ...]
    # True: putting all samples in order costs less than a call for each part to fetch its own
    sorts: bool


Fact = tuple[int, float, torch.dtype]  # rank, scale and dtype of an adapter
Facts = tuple[Fact | None, ...]


class _Sizes(NamedTuple):
    of_sample: int  # bytes of X and Y for one sample
    of_rank: int  # elements of A and B for one rank, K + N
    device: torch.device

    def zeros(self, counts: dict[int, int], rank: int, dtype: torch.dtype) -> int:
        """Bytes of zeros when ``counts`` {rank: samples} are padded to ``rank``."""
        more = sum(count * (rank - r) for r, count in counts.items())
        return more * self.of_rank * dtype.itemsize


def _classes(counts: dict[int, int], dtype: torch.dtype, sizes: _Sizes) -> list[int]:
    """The ranks to which those of ``counts`` {rank: samples} are padded, ascending."""
    tops: list[int] = []
    held: dict[int, int] = {}
    for r in sorted(counts):
        if tops and sizes.zeros(held, r, dtype) <= _BYTES_OF_PART:
            tops[-1] = r
        else:
            tops.append(r)
            held = {}
        held[r] = counts[r]
    # one part for all needs no other order of the samples either, two copies of X and Y
    order = sum(counts.values()) * sizes.of_sample // 2
    if sizes.zeros(counts, tops[-1], dtype) <= (len(tops) - 1) * _BYTES_OF_PART + order:
        return tops[-1:]
    return tops


def make_plan(
    choice: Sequence[int], facts: Facts, of_sample: int, of_rank: int, device: torch.device
) -> Plan:
    """The plan for a batch.

    Args:
        choice: the adapter of each sample, or -1.
        facts: (rank, scale, dtype) of each adapter, None for one without weights.
        of_sample: bytes of X and Y for one sample.
        of_rank: K + N.
        device: of the tensors of the plan.
    """
    sizes = _Sizes(of_sample, of_rank, device)
    rest: list[int] = []
    of_dtype: dict[torch.dtype, dict[int, list[int]]] = {}  # {dtype: {adapter: samples}}
    for sample, i in enumerate(choice):
        fact = facts[i] if i >= 0 else None
        if fact is None:
            rest.append(sample)
        else:
            of_dtype.setdefault(fact[2], {}).setdefault(i, []).append(sample)
    order: list[int] = []
    parts: list[Part] = []
    for dtype, held in of_dtype.items():
        counts: dict[int, int] = {}
        for i, own in held.items():
            r = _of(facts, i)[0]
            counts[r] = counts.get(r, 0) + len(own)
        low = 0
        for top in _classes(counts, dtype, sizes):
            members = {i: own for i, own in held.items() if low < _of(facts, i)[0] <= top}
            _add_parts(order, parts, members, top, facts, sizes)
            low = top
    order += rest
    if order == list(range(len(order))):
        return Plan(None, None, tuple(parts), False)
    back = [0] * len(order)
    for place, sample in enumerate(order):
        back[sample] = place
    as_tensor = [torch.tensor(numbers, device=device) for numbers in (order, back)]
    apart = sum(part.rows is not None for part in parts)
    sorts = apart * _BYTES_OF_CALLS > len(order) * of_sample
    return Plan(as_tensor[0], as_tensor[1], tuple(parts), sorts)


def _of(facts: Facts, i: int) -> Fact:
    fact = facts[i]
    assert fact is not None  # adapters that samples take have weights
    return fact


def _add_parts(
    order: list[int],
    parts: list[Part],
    members: dict[int, list[int]],
    top: int,
    facts: Facts,
    sizes: _Sizes,
) -> None:
    """Append the samples of adapters that are padded to rank ``top``, and their parts."""
    dtype = _of(facts, next(iter(members)))[2]
    together = sorted(sample for own in members.values() for sample in own)
    taken = {sample: i for i, own in members.items() for sample in own}
    of = [taken[sample] for sample in together]
    if len({len(own) for own in members.values()}) == 1:
        # as many samples for each: in the order of adapters each has its A and B once
        by_adapter = [sample for own in members.values() for sample in own]
        repeats = (len(of) - len(members)) * top * sizes.of_rank * dtype.itemsize
        if by_adapter == together or repeats > len(of) * sizes.of_sample:
            together, of = by_adapter, list(members)
    copied = len(of) * top * sizes.of_rank * dtype.itemsize
    start = len(order)
    if copied <= len(members) * _BYTES_OF_CALLS + len(together) * sizes.of_sample:
        order += together
        scales = [_of(facts, i)[1] for i in of]
        scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            scale = torch.tensor(scales, dtype=dtype, device=sizes.device).view(-1, 1, 1)
        ranks = tuple(_of(facts, i)[0] for i in of)
        where = _where(together, sizes.device)
        parts.append(Part(start, len(order), tuple(of), ranks, scale, dtype, *where))
        return
    for i, own in members.items():
        start = len(order)
        order += own
        r, scale, _ = _of(facts, i)
        where = _where(own, sizes.device)
        parts.append(Part(start, len(order), (i,), (r,), scale, dtype, *where))


def _where(samples: list[int], device: torch.device) -> tuple[int, Tensor | None]:
    """``first`` and ``rows`` of a part."""
    first = samples[0]
    if samples == list(range(first, first + len(samples))):
        return first, None
    return first, torch.tensor(samples, device=device)


def _side_by_side(ts: list[Tensor], ranks: tuple[int, ...], dim: int, room: Scratch) -> Tensor:
    """A's [r_i, K] as [batch, r, K] (dim 0) or B's [N, r_i] as [batch, r, N] (dim 1).

    r is the largest rank; the rows of smaller ones are followed by zeros.
    """
    widest = max(ranks)
    if min(ranks) == widest:
        side = torch.stack(ts, out=room.take(len(ts), *ts[0].shape))
        return side if dim == 0 else side.transpose(1, 2)
    zeros = ts[0].new_zeros((widest, ts[0].shape[1]) if dim == 0 else (ts[0].shape[0], widest))
    padded = []
    for t, r in zip(ts, ranks, strict=True):
        padded.append(t)
        if r < widest:
            padded.append(zeros.narrow(dim, 0, widest - r))
    out = room.take(len(ts), *zeros.shape)
    if out is not None:
        out = out.view(-1, zeros.shape[1]) if dim == 0 else out.view(zeros.shape[0], -1)
    side = torch.cat(padded, dim, out=out)
    if dim == 0:
        return side.view(len(ts), widest, -1)
    return side.view(-1, len(ts), widest).permute(1, 2, 0)


def _product_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the low-rank products: autocast's, or else as for one adapter."""
    if autocast.is_on(x) and torch.float64 not in (x.dtype, A.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return low_rank_dtype(x, A)


def _low_rank(x: Tensor, part: Part, adapters: Any, room: Scratch) -> tuple[Tensor, Tensor, float]:
    """S, B and a factor for a part's x [batch, rows, K]: its update is S B · factor.

    S is [batch, rows, r] and B [batch, r, N], or [rows, r] and [r, N] for a single adapter.
    """
    low = _product_dtype(x, adapters[part.of[0]].A)
    x = in_dtype(low, x)
    batch, rows, K = x.shape
    if batch == 1:
        assert not isinstance(part.scale, Tensor)  # one adapter has one scale
        A, B, _ = adapters[part.of[0]]
        return torch.mm(A.to(low), x.view(rows, K).t()).t(), B.to(low).t(), part.scale
    As, Bs = [adapters[i].A for i in part.of], [adapters[i].B for i in part.of]
    if part.dtype not in (low, torch.float32):  # autocast refuses to put these side by side
        As, Bs = [A.to(low) for A in As], [B.to(low) for B in Bs]
    out = room.take(batch, max(part.ranks), rows)
    place = room.at
    A = in_dtype(low, _side_by_side(As, part.ranks, 0, room))
    # with the small r as rows MKL is up to twice as fast as with r as columns
    s = torch.bmm(A, x.transpose(1, 2), out=out).transpose(1, 2)
    room.at = place  # A is not read again
    B = in_dtype(low, _side_by_side(Bs, part.ranks, 1, room))
    if isinstance(part.scale, Tensor):
        return s * part.scale.to(low), B, 1.0
    return s, B, part.scale


def _add(y: Tensor, s: Tensor, b: Tensor, factor: float, in_place: bool) -> Tensor:
    """y [batch, rows, N] + the update of :func:`_low_rank`."""
    if s.dim() == 2:
        if s.dtype == y.dtype:
            y2 = y.view(s.shape[0], b.shape[1])
            return (y2.addmm_ if in_place else y2.addmm)(s, b, alpha=factor).view(y.shape)
        s, b = s.unsqueeze(0), b.unsqueeze(0)
    if s.dtype == y.dtype:
        return (y.baddbmm_ if in_place else y.baddbmm)(s, b, alpha=factor)
    update = (torch.bmm(s, b) * factor).to(y.dtype)
    return y.add_(update) if in_place else y + update


def _add_in_place(y: Tensor, x: Tensor, part: Part, adapters: Any) -> None:
    """Add the part's update to its samples of y [samples, T, N], for x [samples, T, K]."""
    (_, T, K), N = x.shape, y.shape[2]
    samples, batch = part.stop - part.start, len(part.of)
    low = _product_dtype(x, adapters[part.of[0]].A)
    room = Scratch(None)
    if low is x.dtype and low is y.dtype and low is part.dtype:
        r, moved = max(part.ranks), 0 if part.rows is None else K + N
        factors = batch * r * max(K, N) if batch > 1 else 0
        room = Scratch(x, factors + samples * T * (r + moved))
    if part.rows is None:
        if samples < x.shape[0]:
            x, y = x.narrow(0, part.first, samples), y.narrow(0, part.first, samples)
        if batch < samples:
            x, y = x.view(batch, -1, K), y.view(batch, -1, N)
        _add(y, *_low_rank(x, part, adapters, room), in_place=True)
    else:
        rows = samples // batch * T
        out = room.take(batch, rows, N)
        x = torch.index_select(x, 0, part.rows, out=room.take(samples, T, K))
        if batch < samples:
            x = x.view(batch, rows, K)
        s, b, factor = _low_rank(x, part, adapters, room)
        if out is None or b.shape[-1] != N:  # torch would resize out, and index_add_ refuses
            update = in_dtype(y.dtype, torch.matmul(s, b) * factor)
        elif s.dim() == 2:
            out = out.view(samples * T, N)
            update = torch.addmm(out, s, b, beta=0, alpha=factor, out=out)
        else:
            update = torch.baddbmm(out, s, b, beta=0, alpha=factor, out=out)
        y.index_add_(0, part.rows, update.view(samples, T, N))
    room.give_back()


def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any) -> Tensor:
    """Y [M, N] for x [M, K], w [N, K], dense or quantised; see :mod:`.lora_mixed`."""
    count = len(samples)
    M, K, N = x.shape[0], x.shape[1], w.shape[0]
    T = M // max(count, 1)
    facts = tuple(None if a is None else (a.A.shape[0], a.scale, a.A.dtype) for a in adapters)
    plan: Plan = samples.plan(facts, T * (K + N) * x.element_size(), K + N, x.device)
    in_place = not (torch.is_grad_enabled() or in_transform())
    if in_place and not plan.sorts:
        y = base_output(x, w, bias)
        if plan.parts:
            y3, x3 = y.view(count, T, N), x.view(count, T, K)
            for part in plan.parts:
                _add_in_place(y3, x3, part, adapters)
        return y
    if plan.order is not None:
        x = x.view(count, T, K).index_select(0, plan.order).view(M, K)
    y = base_output(x, w, bias)
    done, end = [], 0
    for part in plan.parts:
        first, end = part.start * T, part.stop * T
        own = x[first:end].view(len(part.of), -1, K)
        terms = _low_rank(own, part, adapters, Scratch(None))
        done.append(_add(y[first:end].view(*own.shape[:2], N), *terms, in_place).view(-1, N))
    if done and not in_place:
        y = torch.cat([*done, y[end:]]) if end < M or len(done) > 1 else done[0]
    if plan.back is not None:
        y = y.view(count, T, N).index_select(0, plan.back).view(M, N)
    return y
