"""A mixture of experts with low-rank updates as one operation, forward and backward.

    y_t = Σ_j weights[t, j] · norm(down_e(gate(up_e(x_t))))        e = index[t, j]

where up_e and down_e are linears of expert e, each with its updates or without. For the backward it
keeps X, the routing, up's output GU [T·k, N1], every S [T·k, r] and the masks as bits; H is made
again from GU. With w the routing weight of a pair of token t and expert e, and c = scale / (1 - p):

    dS0 = c dOut[t] B_d         dH0 = dOut[t] W_d + mask ∘ (dS0 A_d)
    dw  = dH0 · H (+ dOut[t] · bias_d)                      dH  = w dH0
    dB_d = Σ w dOut[t]ᵀ S_d     dA_d = Σ w dS0ᵀ (mask ∘ H)
    dS_u = c dGU B_u            dB_u = Σ dGUᵀ S_u            dA_u = Σ dS_uᵀ (mask ∘ X[t])
    dX[t] = Σ_j dGU W_u + mask ∘ (dS_u A_u)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..utils.private import (
    in_transform,
    is_grad_batch,
    outputs_are_kept,
    without_dispatch_modes,
)
from . import autocast
from .experts.checks import check, check_functions
from .experts.choosing import choose
from .experts.double import differentiable, in_a_transform
from .experts.dropout import words_of
from .experts.order import Order
from .experts.packing import flat_grads, tensors_of, wants_of, with_tensors, without_tensors
from .experts.parts import Call, ExpertLinear, Gate, Kept
from .experts_library import traced_experts
from .tracing import is_recording, is_tracing


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    gate: Gate,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    choice: Tensor | None = None,
    sentinels: bool = False,
) -> Tensor:
    """The output [T, N] of a mixture in x's dtype.

    Args:
        x: tokens [T, K], floating point.
        index: int64, int32, int16 or uint8 [T, k], the experts of each token.
        weights: [T, k], the routing weights; they may require a gradient.
        up, down: the experts' linears, [E, N1, K] and [E, N, I], in x's dtype (under autocast x is
            cast to theirs). Weights are frozen; biases may train. Factors have that dtype or
            float32.
        gate: makes H [P, I] of up's output [P, N1]; N1 is 2·I, or I with the layout "alone". Its
            function may not write to its argument, and has no trained parameters of its own.
        norm: applied to down's output before the routing weights, row by row; as the function.
        choice: [T] of such a dtype, the adapter of each token, the same number in ``up`` and
            ``down``, or -1 for none. None: all adapters are added.
        sentinels: an index of E or more means that another process has the expert, and adds
            nothing.

    Masks of dropout are drawn for each pair by itself, by the generator of x's device, for up's
    input and then for down's. Differentiable in x, weights, factors and biases, and twice. Forward
    mode and torch.func's transforms run the formula of :mod:`.experts.plain`. Under
    ``torch.compile`` and ``torch.jit.trace`` the linears are operators (:mod:`.experts_library`).

    Raises:
        ValueError: shapes, devices, an index, a choice, a probability or a gate's name or layout
            that is not allowed, or a weight that requires a gradient.
        TypeError: dtypes that differ, or of the wrong kind.
    """
    casts = autocast.is_on(x)
    if not is_tracing():  # there sizes are tensors, and comparing them would record the answers
        check(x, index, weights, up, down, gate, choice, casts)
    given = x.dtype
    call = Call(x.to(up.weight.dtype), index, weights, up, down, gate, norm, choice, sentinels)
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if casts else contextlib.nullcontext():
        return _call(call).to(given)


def _call(call: Call) -> Tensor:
    if is_recording():
        return traced_experts(call)
    if in_transform():
        return in_a_transform(call)
    tensors = tensors_of(call)
    y: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        check_functions(call)
        bare = without_tensors(call)
        y = _LoraExperts.apply(bare, call.chosen, call.choice, *tensors)  # type: ignore[no-untyped-call]
        return y
    # selective checkpointing may keep outputs of torch's products, which are written to here
    with without_dispatch_modes() if outputs_are_kept() else contextlib.nullcontext():
        return choose(call, keep=False).infer(call)


class _LoraExperts(torch.autograd.Function):
    """The arguments from ``tensors`` on are those of :func:`tensors_of`."""

    @staticmethod
    def forward(ctx: Any, bare: Call, chosen: Tensor, choice: Any, *tensors: Any) -> Tensor:
        call = with_tensors(bare, tensors)._replace(chosen=chosen, choice=choice)
        wants = wants_of(call, ctx.needs_input_grad[3:])
        with without_dispatch_modes() if outputs_are_kept() else contextlib.nullcontext():
            way = choose(call, keep=True).way
            order = way.ordered(call)
            words = words_of(call, order)
            y, kept = way.forward(call, order, words, keep=True)
        ctx.save_for_backward(
            call.chosen,
            call.choice,
            order.pairs,
            order.bounds,
            kept.gu if wants.hidden else None,
            kept.s_up if any(b for _, b in wants.up) else None,
            kept.s_down if any(b for _, b in wants.down) else None,
            kept.y,
            *words,
            *tensors,
        )
        ctx.call, ctx.way, ctx.order = bare, way, (order.spans, order.own)
        return y

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        chosen, choice, *own = ctx.saved_tensors
        pairs, bounds, gu, s_up, s_down, y, *own = own
        kept = Kept(Order(pairs, bounds, *ctx.order), gu, s_up, s_down, y)
        words, tensors = (own[0], own[1]), own[2:]
        call = with_tensors(ctx.call, tensors)._replace(chosen=chosen, choice=choice)
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or is_grad_batch(dout):
            return (*(None,) * 3, *differentiable(call, tensors, kept, words, dout, needs))
        casts, kind = autocast.is_on(dout), dout.device.type
        with torch.autocast(kind, enabled=False) if casts else contextlib.nullcontext():
            grads = ctx.way.backward(call, kept, words, dout, wants_of(call, needs))
        found = [grads.x, grads.weights, *flat_grads(grads.up), *flat_grads(grads.down)]
        return (*(None,) * 3, *found)
