"""A mixture by torch's grouped products, in which the host never waits for the device.

Every step runs on all sorted rows at once, so that memory also holds the sorted tokens, H and the
outputs of all pairs. It is the way of CUDA without Triton's kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...utils.private import assert_later
from ..torch_products import in_dtype
from .dropout import adapter_of_rows
from .gates import gate_grad, hidden, hidden_again, norm_grad
from .grouped_linear import GroupedLinear, Groups, aligned, grouped_mm_runs
from .loop import allowed_choices, allowed_experts, sum_of_choices, sums_in, weights_of_rows
from .order import Order, sort_pairs
from .parts import Call, Grads, Kept, Wants


def why_not(call: Call) -> str | None:
    """The reason that this way cannot run a call; None when it can."""
    reason = grouped_mm_runs(call.x)
    if reason is not None:
        return reason
    for name, part in (("up", call.up), ("down", call.down)):
        if not aligned(part.weight):
            return (
                f"torch's grouped product takes sizes of whole 16 bytes, and {name}'s weight "
                f"is {list(part.weight.shape)} in {part.weight.dtype}"
            )
    return None


def ordered(call: Call) -> Order:
    """The call's pairs in order; an index or a choice out of range stops the device later."""
    pairs, bounds = sort_pairs(call.chosen, call.experts, call.choice, call.adapters)
    check_later(call, bounds)
    return Order(pairs, bounds)


def check_later(call: Call, bounds: Tensor) -> None:
    """Have the device stop at an index or a choice that is out of range."""
    check_choices(call)
    if call.sentinels:
        inside = (call.chosen >= 0).all()
    else:
        inside = bounds[-1] - bounds[0] == call.chosen.numel()
    check_experts(call, inside)


def check_values(call: Call) -> None:
    """Have the device stop as :func:`ordered` does, without an order."""
    check_choices(call)
    inside = call.chosen >= 0
    if not call.sentinels:
        inside &= call.chosen < call.experts
    check_experts(call, inside.all())


def check_choices(call: Call) -> None:
    choice, n = call.choice, call.adapters
    if choice is not None and choice.numel():
        inside = (choice >= -1).all() & (choice < n).all()
        assert_later(inside, f"lora_experts: choice is out of range; allowed: {allowed_choices(n)}")


def check_experts(call: Call, inside: Tensor) -> None:
    assert_later(inside, f"lora_experts: index is out of range; allowed: {allowed_experts(call)}")


def groups_of(call: Call, order: Order) -> Groups:
    pairs, bounds = order.pairs, order.bounds
    assert bounds is not None
    tokens = pairs // call.chosen.shape[1]
    own, width = adapter_of_rows(call, pairs), 1
    if own is not None:
        width = call.adapters + 1
    rest = None
    if call.sentinels:
        rest = (torch.arange(len(pairs), device=pairs.device) >= bounds[-1])[:, None]
    ends = bounds[1:].int()
    return Groups(tokens, ends[width - 1 :: width].contiguous(), ends, own, rest)


def forward(
    call: Call, order: Order, words: tuple[Tensor | None, Tensor | None], keep: bool
) -> tuple[Tensor, Kept]:
    """(the mixture's output [T, N], what the backward needs if ``keep``)."""
    groups = groups_of(call, order)
    up = GroupedLinear(call.up, call.x, groups, words[0])
    gu, s_up = up.forward(call.x.index_select(0, groups.tokens))
    h = hidden(call.gate, gu)
    y, s_down = GroupedLinear(call.down, call.x, groups, words[1]).forward(h)
    del h
    kept_y = None
    if call.norm is not None:
        kept_y, y = y, call.norm(y)
    y = in_dtype(call.x.dtype, y * weights_of_rows(call, order.pairs))
    if groups.rest is not None:
        y.masked_fill_(groups.rest, 0.0)
    out = sum_of_choices(y, order.pairs, call.chosen.shape[1])
    return out, Kept(order, gu, s_up, s_down, kept_y if keep else None)


def backward(
    call: Call,
    kept: Kept,
    words: tuple[Tensor | None, Tensor | None],
    dout: Tensor,
    wants: Wants,
) -> Grads:
    """The gradients that are wanted, for ``dout`` [T, N]."""
    x, wide = call.x, sums_in(call.x.dtype)
    groups = groups_of(call, kept.order)
    up = GroupedLinear(call.up, x, groups, words[0])
    down = GroupedLinear(call.down, x, groups, words[1])
    w = weights_of_rows(call, kept.order.pairs)
    dy = dout.index_select(0, groups.tokens)
    if groups.rest is not None:
        dy.masked_fill_(groups.rest, 0.0)
    dw = None
    if call.norm is not None:
        assert kept.y is not None
        n, dn = norm_grad(call.norm, kept.y, dy)
        if wants.weights:
            dw = (n * dy).sum(1, dtype=wide)
        dy = dn
    again = hidden_again(call.gate, kept.gu) if wants.hidden and kept.gu is not None else None
    h = None if again is None else again.h
    through = wants.behind_gate or wants.weights
    dh, of_down = down.backward(dy, w, h, kept.s_down, wants.down, wants.down_bias, through)
    if wants.weights and dw is None:
        assert dh is not None and h is not None
        dw = (dh * h).sum(1, dtype=wide)
        if (bias := down.bias_of_rows()) is not None:
            dw += (dy * bias).sum(1, dtype=wide)
    del dy, h
    dx, of_up = None, up.no_grads()
    if wants.behind_gate:
        assert dh is not None and again is not None and kept.gu is not None
        dgu = gate_grad(call.gate, kept.gu, again, dh.mul_(w))
        del again, dh
        if groups.rest is not None:
            dgu.masked_fill_(groups.rest, 0.0)
        xs = x.index_select(0, groups.tokens) if any(a for a, _ in wants.up) else None
        dx, of_up = up.backward(dgu, None, xs, kept.s_up, wants.up, wants.up_bias, wants.x)
    if dx is not None:
        dx = sum_of_choices(dx, kept.order.pairs, call.chosen.shape[1])
    if dw is not None:
        if groups.rest is not None:
            dw.masked_fill_(groups.rest[:, 0], 0.0)
        dw = torch.empty_like(dw).index_copy_(0, kept.order.pairs, dw)
        dw = dw.view_as(call.weights).to(call.weights.dtype)
    return Grads(dx, dw, of_up, of_down)
