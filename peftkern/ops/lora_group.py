"""Several LoRA linears on the same input as one operation: q, k, v; gate, up.

    Y_i = X W_iᵀ + bias_i + scale_i · drop_i(X) A_iᵀ B_iᵀ
    dX  = Σ_i dY_i W_i + mask_i ∘ (c_i dY_i B_i A_i)        c_i = scale_i / (1 - p_i)

X is kept once, and one dX is written; separate operations would write one each and add them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..utils.private import unsafe_view
from . import autocast
from . import backend as _backend
from .lora import differentiable_backward, to_autocast
from .projection import Projection, ProjectionGrad


class _LoraGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Any, *tensors: Any) -> tuple[Tensor, ...]:
        x2 = x.reshape(-1, x.shape[-1])
        ctx.settings, ctx.token = settings
        members = [
            Projection(*tensors[4 * i : 4 * i + 4], *own) for i, own in enumerate(ctx.settings)
        ]
        done = _backend.active.forward(x2, members)
        needs = ctx.needs_input_grad
        ctx.shape = x.shape
        saved: list[Tensor | None] = []
        for i, (member, (_, s, bits)) in enumerate(zip(members, done, strict=True)):
            needs_b = needs[2 + 4 * i + 3]
            saved += [*member.tensors, s if needs_b else None, bits]
        ctx.save_for_backward(x, *saved)
        ctx.set_materialize_grads(False)
        lead = x.shape[:-1]
        # fresh tensors, as from torch's own linear, no views: callers may write into the output
        return tuple(unsafe_view(y, (*lead, y.shape[-1])) for y, _, _ in done)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        ctx.token = None
        rows = [saved[6 * i : 6 * i + 6] for i in range(len(dys))]
        members = [Projection(*row[:4], *own) for row, own in zip(rows, ctx.settings, strict=True)]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            words = [bits for *_, bits in rows]
            dx, *rest = differentiable_backward(x, members, words, dys, (needs[0], *needs[2:]))
            return (dx, None, *rest)
        behind, places = [], []
        for i, (member, (*_, s, bits), dy) in enumerate(zip(members, rows, dys, strict=True)):
            if dy is None:  # nobody used this output
                continue
            _, _, needs_a, needs_b = needs[2 + 4 * i : 6 + 4 * i]
            dy2 = dy.reshape(-1, dy.shape[-1])
            behind.append(
                ProjectionGrad(
                    dy2, member.w, member.A, member.B, s, bits, member.scale, member.p,
                    needs_a, needs_b,
                )
            )  # fmt: skip
            places.append(i)
        grads: list[Tensor | None] = [None] * len(needs)
        if not behind:
            return tuple(grads)
        x2 = x.reshape(-1, x.shape[-1])
        dx, pairs = _backend.behind(behind[0].dy).backward(x2, behind, needs[0])
        grads[0] = dx.view(ctx.shape) if dx is not None else None
        for i, grad, (da, db) in zip(places, behind, pairs, strict=True):
            at = 2 + 4 * i
            if needs[at]:
                dy = grad.dy
                grads[at] = x2.t() @ dy if members[i].transposed else dy.t() @ x2
            if needs[at + 1]:
                grads[at + 1] = grad.dy.sum(0)
            grads[at + 2], grads[at + 3] = da, db
        return tuple(grads)


def lora_group(x: Tensor, members: list[Projection], token: Any = None) -> tuple[Tensor, ...]:
    """Several linears with low-rank updates on one input, as one operation.

    Args:
        x: [..., K], floating point.
        members: two projections or more, with tensors as for :func:`.lora.lora_linear`. Masks are
            drawn in this order.
        token: an object that is kept alive until the backward has run.

    Returns:
        One [..., N_i] for each member, equal to calling each alone. Differentiable twice.
    """
    x, members = _in_autocast(x, members)
    settings = tuple(m.settings for m in members)
    ys: tuple[Tensor, ...] = _LoraGroup.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
        x, (settings, token), *(t for m in members for t in m.tensors)
    )
    return ys


def lora_group_infer(x: Tensor, members: list[Projection]) -> list[Tensor]:
    """The same without gradients and without dropout, for few rows; shapes and results as above."""
    return _backend.active.infer_group(*_in_autocast(x, members))


def _in_autocast(x: Tensor, members: list[Projection]) -> tuple[Tensor, list[Projection]]:
    """The arguments in autocast's dtype, if it is on."""
    if not autocast.is_on(x):
        return x, members
    device, cast = x.device.type, []
    for m in members:
        x, weight, bias, A, B = to_autocast(device, x, *m.tensors)
        cast.append(Projection(weight, bias, A, B, *m.settings))
    return x, cast
