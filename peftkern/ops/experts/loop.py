"""A mixture as a loop over the experts that got tokens, on torch's matrix products.

The host must know how many tokens each expert got, which costs nothing on a CPU. Beside what the
backward needs, memory holds a row for each pair and tensors of the rows of one block of experts at
a time. Sums over a token's experts are made in the order of its choices, in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..torch_products import in_dtype
from .blocks import SharedRows, blocks_of, most_rows
from .gates import gate_grad, hidden, hidden_again, norm_grad
from .loop_linear import LoopLinear, low_rank
from .order import Order, Span, sort_pairs, spans_of
from .parts import Call, ExpertLinear, Grads, Kept, Wants


def ordered(call: Call) -> Order:
    """The call's pairs in order, with the spans of the experts that got tokens.

    Raises:
        ValueError: an index or a choice out of range.
    """
    choice, n = call.choice, call.adapters
    _check_choices(call)
    pairs, edges = sort_pairs(call.chosen, call.experts, choice, n)
    bounds: list[int] = edges.tolist()
    if bounds[0] or (bounds[-1] < len(pairs) and not call.sentinels):
        _check_experts(call)
    return Order(pairs, None, spans_of(bounds, choice is not None, n))


def check_values(call: Call) -> None:
    """Raise the ValueError of :func:`ordered` for an index or a choice out of range."""
    _check_choices(call)
    _check_experts(call)


def _check_choices(call: Call) -> None:
    choice, n = call.choice, call.adapters
    if choice is not None and choice.numel():
        low, high = (int(v) for v in choice.aminmax())
        if low < -1 or high >= n:
            raise ValueError(
                f"lora_experts: choice has {low if low < -1 else high}; "
                f"allowed: {allowed_choices(n)}"
            )


def _check_experts(call: Call) -> None:
    if not call.chosen.numel():
        return
    low, high = (int(v) for v in call.chosen.aminmax())
    if low < 0 or (high >= call.experts and not call.sentinels):
        raise ValueError(
            f"lora_experts: index has {low if low < 0 else high}; allowed: {allowed_experts(call)}"
        )


def allowed_choices(adapters: int) -> str:
    return f"-1 (no adapter) to {adapters - 1}, for {adapters} adapters"


def allowed_experts(call: Call) -> str:
    allowed = f"0 to {call.experts - 1}, for {call.experts} experts"
    if call.sentinels:
        allowed += ", or more for experts of other processes (sentinels=True)"
    return allowed


def sums_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over a token's experts."""
    return torch.promote_types(dtype, torch.float32)


def sum_of_choices(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """[T, N], for each token the sum of the sorted ``rows`` [P, N] of its k pairs.

    One pass, without a copy of the rows.
    """
    P = len(order)
    if not P:
        return rows.new_zeros((0, rows.shape[1]))
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(P, dtype=order.dtype, device=order.device))
    return embedding_bag(place.view(-1, k), rows, mode="sum")


def without_rest(rows: Tensor, spans: Sequence[Span]) -> Tensor:
    """The sorted rows with zeros in those of no span."""
    rows[spans[-1].end if spans else 0 :].zero_()
    return rows


def weights_of_rows(call: Call, order: Tensor) -> Tensor:
    w = call.weights.reshape(-1).index_select(0, order)
    return in_dtype(sums_in(call.x.dtype), w)[:, None]


def room_for_s(part: ExpertLinear, x: Tensor, rows: int, mixed: bool) -> Tensor | None:
    low, R = low_rank(part, x, mixed)
    if not part.factors:
        return None
    make = x.new_zeros if mixed else x.new_empty
    return make((rows, R), dtype=low)


def forward(
    call: Call,
    order: Order,
    words: tuple[Tensor | None, Tensor | None],
    keep: bool,
) -> tuple[Tensor, Kept]:
    """(the mixture's output [T, N], what the backward needs if ``keep``)."""
    x, mixed, P, spans = call.x, call.choice is not None, len(order.pairs), order.spans
    assert spans is not None
    k, N1, N = call.chosen.shape[1], call.up.weight.shape[1], call.down.weight.shape[1]
    up = LoopLinear(call.up, x, spans, words[0], mixed)
    down = LoopLinear(call.down, x, spans, words[1], mixed)
    blocks = blocks_of(spans)
    most = most_rows(blocks)
    scratch = SharedRows(most, x)
    gu_all = x.new_empty((P if keep else most, N1))
    s_up, s_down = (room_for_s(p, x, P if keep else most, mixed) for p in (call.up, call.down))
    y_all = x.new_empty((P, N))  # times the routing weights
    keep_y = x.new_empty((P, N)) if keep and call.norm is not None else None
    tokens = order.pairs // k
    w = weights_of_rows(call, order.pairs)
    for block in blocks:
        rows = block.rows
        room = rows if keep else slice(0, rows.stop - rows.start)
        gu = gu_all[room]
        own = scratch.gather("tokens", x, tokens[rows])
        up.forward(block, own, gu, None if s_up is None else s_up[room])
        h = hidden(call.gate, gu, scratch)
        y = y_all[rows] if keep_y is None else keep_y[rows]
        down.forward(block, h, y, None if s_down is None else s_down[room])
        if call.norm is None:
            y.mul_(w[rows])
        else:
            torch.mul(call.norm(y), w[rows], out=y_all[rows])
    out = sum_of_choices(without_rest(y_all, spans), order.pairs, k)
    return out, Kept(order, gu_all, s_up, s_down, keep_y)


def backward(
    call: Call,
    kept: Kept,
    words: tuple[Tensor | None, Tensor | None],
    dout: Tensor,
    wants: Wants,
) -> Grads:
    """The gradients that are wanted, for ``dout`` [T, N]."""
    x, mixed = call.x, call.choice is not None
    pairs, spans = kept.order.pairs, kept.order.spans
    assert spans is not None
    k = call.chosen.shape[1]
    up = LoopLinear(call.up, x, spans, words[0], mixed)
    down = LoopLinear(call.down, x, spans, words[1], mixed)
    up.want(wants.up, wants.up_bias)
    down.want(wants.down, wants.down_bias)
    tokens = pairs // k
    wide = sums_in(x.dtype)
    w = weights_of_rows(call, pairs)
    dx_all = x.new_empty((len(w), x.shape[1])) if wants.x else None
    dw = w.new_zeros(len(w)) if wants.weights else None
    through = wants.behind_gate or wants.weights
    blocks = blocks_of(spans)
    scratch = SharedRows(most_rows(blocks), x)
    for block in blocks:
        rows = block.rows
        of, w_rows = tokens[rows], w[rows]
        dy = scratch.gather("tokens", dout, of)
        if call.norm is not None:
            assert kept.y is not None
            n, dn = norm_grad(call.norm, kept.y[rows], dy)
            if dw is not None:
                dw[rows] = (n * dy).sum(1, dtype=wide)
            dy = dn
        again = gu = None
        if wants.hidden:
            assert kept.gu is not None
            gu = kept.gu[rows]
            again = hidden_again(call.gate, gu, scratch)
        s = None if kept.s_down is None else kept.s_down[rows]
        dh = scratch.take("dh", len(dy), call.down.weight.shape[2]) if through else None
        down.backward(block, dy, w_rows, None if again is None else again.h, s, dh)
        if dh is None or again is None or gu is None:
            continue
        if dw is not None and call.norm is None:
            own = (dh * again.h).sum(1, dtype=wide)
            if call.down.bias is not None:
                each = zip(own.split(block.sizes), dy.split(block.sizes), block.spans, strict=True)
                for to, dy_rows, span in each:
                    to += torch.mv(dy_rows, call.down.bias[span.expert])
            dw[rows] = own
        if not wants.behind_gate:
            continue
        dgu = gate_grad(call.gate, gu, again, dh.mul_(w_rows), scratch)
        del again, dh, dy
        x_rows = scratch.gather("tokens", x, of) if any(a for a, _ in wants.up) else None
        s = None if kept.s_up is None else kept.s_up[rows]
        up.backward(block, dgu, None, x_rows, s, None if dx_all is None else dx_all[rows])
    dx = None
    if dx_all is not None:
        dx = sum_of_choices(without_rest(dx_all, spans), pairs, k)
    if dw is not None:
        placed = torch.empty_like(dw)
        placed.scatter_(0, pairs, dw)
        dw = placed.view_as(call.weights).to(call.weights.dtype)
    return Grads(dx, dw, up.grads(), down.grads())
