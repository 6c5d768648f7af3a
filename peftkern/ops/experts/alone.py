"""One linear of the experts alone: sorted rows of up's or down's output, and the gradients.

Operators of torch.library have it, between which a compiler sees the gate. The call's ``up`` is the
linear. Its input is the tokens, to be gathered, or sorted rows already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import blocks_of
from .grouped import groups_of
from .grouped_linear import GroupedLinear
from .loop import room_for_s, sum_of_choices, without_rest
from .loop_linear import LoopLinear
from .order import Order
from .parts import Call, LinearGrads


def forward(
    call: Call, order: Order, words: Tensor | None, gather: bool
) -> tuple[Tensor, Tensor | None]:
    """(Y [P, N], S [P, R]) on sorted rows; zeros in those of no expert, or the bias."""
    x, P, spans = call.x, len(order.pairs), order.spans
    if spans is None:
        groups = groups_of(call, order)
        rows = x.index_select(0, groups.tokens) if gather else x
        return GroupedLinear(call.up, x, groups, words).forward(rows)
    linear = LoopLinear(call.up, x, spans, words, call.choice is not None)
    y = x.new_empty((P, call.up.weight.shape[1]))
    s = room_for_s(call.up, x, P, call.choice is not None)
    for block in blocks_of(spans):
        own = block.rows
        rows = _input(call, order, own, gather)
        linear.forward(block, rows, y[own], None if s is None else s[own])
    return without_rest(y, spans), s if s is None else without_rest(s, spans)


def _input(call: Call, order: Order, rows: slice, gather: bool) -> Tensor:
    if not gather:
        return call.x[rows]
    return call.x.index_select(0, order.pairs[rows] // call.chosen.shape[1])


def backward(
    call: Call,
    order: Order,
    words: Tensor | None,
    gather: bool,
    s: Tensor | None,
    dy: Tensor,
    wanted: Sequence[tuple[bool, bool]],
    wants_bias: bool,
    wants_x: bool,
) -> tuple[Tensor | None, LinearGrads]:
    """(dX in the shape of the input, the others' gradients) for dy [P, N]."""
    x, spans, mixed, dx = call.x, order.spans, call.choice is not None, None
    if spans is None:
        groups = groups_of(call, order)
        if groups.rest is not None:
            dy = dy.masked_fill(groups.rest, 0.0)
        rows = x.index_select(0, groups.tokens) if gather else x
        linear = GroupedLinear(call.up, x, groups, words)
        dx, grads = linear.backward(dy, None, rows, s, wanted, wants_bias, wants_x)
    else:
        loop = LoopLinear(call.up, x, spans, words, mixed)
        loop.want(wanted, wants_bias)
        if wants_x:
            dx = x.new_empty((len(order.pairs), x.shape[1]))
        for block in blocks_of(spans):
            own = block.rows
            rows = _input(call, order, own, gather)
            of_s, of_dx = (None if t is None else t[own] for t in (s, dx))
            loop.backward(block, dy[own], None, rows, of_s, of_dx)
        dx, grads = dx if dx is None else without_rest(dx, spans), loop.grads()
    if dx is not None and gather:
        dx = sum_of_choices(dx, order.pairs, call.chosen.shape[1])
    return dx, grads


def columns_of_s(call: Call) -> int:
    """The columns of S that any way makes at most: ranks filled up to whole 16 bytes."""
    E = call.experts
    ranks = [-(-f.rank(E) // 8) * 8 for f in call.up.factors]
    return (max if call.choice is not None else sum)(ranks) if ranks else 0


def widened(s: Tensor | None, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """S with as many columns as any way makes, as an operator's results have one shape."""
    if s is None:
        return like.new_zeros((0, columns), dtype=dtype)
    return torch.nn.functional.pad(s, (0, columns - s.shape[1])).contiguous()
