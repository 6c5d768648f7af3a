"""Several LoRA linears on the same input as one operation: q, k, v; gate, up.

    Y_i = X W_iᵀ + bias_i + scale_i · drop_i(X) A_iᵀ B_iᵀ
    dX  = Σ_i dY_i W_i + mask_i ∘ (c_i dY_i B_i A_i)        c_i = scale_i / (1 - p_i)

X is kept once, and one dX is written where separate operations write one each and add them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..utils.private import unsafe_view
from . import autocast
from . import backend as _backend
from .bits import unpack_bits
from .lora import plain, to_autocast
from .projection import Part, Projection


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Any, *tensors: Any) -> tuple[Tensor, ...]:
        x2 = x.reshape(-1, x.shape[-1])
        settings, ctx.token = settings
        members = _members(settings, tensors)
        done = _backend.active.group_forward(x2, members)
        needs = ctx.needs_input_grad
        ctx.settings, ctx.shape, ctx.count = settings, x.shape, len(members)
        saved: list[Tensor | None] = []
        for i, (member, (_, s, bits)) in enumerate(zip(members, done, strict=True)):
            needs_b = needs[2 + 4 * i + 3]
            saved += [member.weight, member.bias, member.A, member.B, s if needs_b else None, bits]
        ctx.save_for_backward(x, *saved)
        ctx.set_materialize_grads(False)
        lead = x.shape[:-1]
        # fresh tensors and, as in torch's own linear, no views: callers may write into the output
        return tuple(unsafe_view(y, (*lead, y.shape[-1])) for y, _, _ in done)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        ctx.token = None
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, x, saved, dys)
        needs = ctx.needs_input_grad
        parts, places = [], []
        for i, (dy, (scale, p, transposed)) in enumerate(zip(dys, ctx.settings, strict=True)):
            if dy is None:  # nobody used this output
                continue
            weight, _, A, B, s, bits = saved[6 * i : 6 * i + 6]
            w = weight if transposed else weight.t()
            needs_a, needs_b = needs[2 + 4 * i + 2], needs[2 + 4 * i + 3]
            dy2 = dy.reshape(-1, dy.shape[-1])
            parts.append(Part(dy2, w, A, B, s, bits, scale, p, needs_a, needs_b))
            places.append(i)
        grads: list[Tensor | None] = [None] * (2 + 4 * ctx.count)
        if not parts:
            return tuple(grads)
        x2 = x.reshape(-1, x.shape[-1])
        dx, pairs = _backend.active.group_backward(x2, parts, needs[0])
        grads[0] = dx.view(ctx.shape) if dx is not None else None
        for i, part, (da, db) in zip(places, parts, pairs, strict=True):
            at = 2 + 4 * i
            if needs[at]:
                transposed = ctx.settings[i][2]
                grads[at] = x2.t() @ part.dy if transposed else part.dy.t() @ x2
            if needs[at + 1]:
                grads[at + 1] = part.dy.sum(0)
            grads[at + 2], grads[at + 3] = da, db
        return tuple(grads)


def _members(settings: tuple[Any, ...], tensors: Any) -> list[Projection]:
    return [Projection(*tensors[4 * i : 4 * i + 4], *setting) for i, setting in enumerate(settings)]


def _differentiable_backward(
    ctx: Any, x: Tensor, saved: list[Tensor | None], dys: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph of their own, from the plain formula, for second derivatives."""
    outputs, grads_out = [], []
    inputs: list[Any] = [x, None]
    with torch.enable_grad():
        for i, (dy, (scale, p, transposed)) in enumerate(zip(dys, ctx.settings, strict=True)):
            weight, bias, A, B, _, bits = saved[6 * i : 6 * i + 6]
            inputs += [weight, bias, A, B]
            if dy is None:
                continue
            mask = None
            if bits is not None:
                mask = unpack_bits(bits, x.shape[-1], x.dtype).view(x.shape)
            outputs.append(plain(x, weight, bias, A, B, scale, mask, p, transposed))  # type: ignore[arg-type]
            grads_out.append(dy)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        grads = torch.autograd.grad(
            outputs, [inputs[i] for i in wanted], grads_out, create_graph=True, allow_unused=True
        )
    found = dict(zip(wanted, grads, strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def lora_group(x: Tensor, members: list[Projection], token: Any = None) -> tuple[Tensor, ...]:
    """Several linears with low-rank updates on one input, as one operation.

    Args:
        x: [..., K], floating point.
        members: two projections or more; tensors as for :func:`.lora.lora_linear`. Masks are drawn
            in this order.
        token: an object to keep alive until the backward has run.

    Returns:
        One [..., N_i] for each member, equal to calling them one by one. Differentiable twice.
    """
    if autocast.is_on(x):
        device = x.device.type
        cast = [to_autocast(device, x, *m[:4]) for m in members]
        x = cast[0][0]
        members = [Projection(*c[1:], *m[4:]) for c, m in zip(cast, members, strict=True)]
    settings = tuple((m.scale, m.p, m.transposed) for m in members)
    ys: tuple[Tensor, ...] = _LoraGroup.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        x, (settings, token), *(t for m in members for t in m[:4])
    )
    return ys
