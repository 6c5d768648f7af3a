"""One operation for a frozen linear and its low-rank update, forward and backward.

    Y = X Wᵀ + bias + scale · drop(X) Aᵀ Bᵀ          (Hu et al., 2021, eq. 3)

For the backward it keeps X once, S [M, r] and the dropout mask as bits, but not the dropped X, a
mask of bytes, or a scaled copy of Y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..utils.private import forward_level, unsafe_view
from . import autocast
from . import backend as _backend
from .apart import apart
from .bits import unpack_bits
from .projection import Projection, ProjectionGrad


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        transposed: bool,
    ) -> Tensor:
        x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        member = Projection(weight, bias, A, B, scale, p, transposed)
        [(y, s, bits)] = _backend.active.forward(x2, [member])
        needs_x, needs_w, _, needs_a, needs_b = ctx.needs_input_grad[:5]
        # x is an input and not the view x2, so that a second derivative finds its graph
        keep_x = needs_a or needs_w
        ctx.save_for_backward(
            x if keep_x else None, weight, A, B, s if needs_b else None, bits, bias
        )
        ctx.x_like = (x.shape, x.dtype)
        ctx.scale, ctx.p, ctx.transposed = scale, p, transposed
        return y if x.dim() == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, s, bits, bias = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            return second_derivatives(ctx, dy)
        shape, dtype = ctx.x_like
        w = weight if ctx.transposed else weight.t()  # [K, N]
        dy2 = dy.reshape(-1, dy.shape[-1])
        # without a gradient for A, only the shape and dtype of x are used
        x2 = (
            x.reshape(-1, shape[-1])
            if x is not None
            else dy2.new_empty((0, shape[-1]), dtype=dtype)
        )
        member = ProjectionGrad(dy2, w, A, B, s, bits, ctx.scale, ctx.p, needs_a, needs_b)
        dx, [(da, db)] = _backend.behind(dy).backward(x2, [member], needs_x)
        dw = dbias = None
        if needs_w:
            dw = x2.t() @ dy2 if ctx.transposed else dy2.t() @ x2
        if needs_bias:
            dbias = dy2.sum(0)
        return (dx.view(shape) if dx is not None else None), dw, dbias, da, db, None, None, None


def second_derivatives(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by autograd of the plain formula, as a graph.

    ``ctx`` is that of a forward whose first arguments are x, weight, bias, A and B, and which saved
    the same tensors as :class:`_LoraLinear`.
    """
    x, weight, A, B, _, bits, bias = ctx.saved_tensors
    if x is None:
        if ctx.needs_input_grad[4]:  # S alone is kept, and S has no graph
            raise RuntimeError(
                "lora_linear: second derivatives with a frozen A and a trained B are not kept; "
                "let A require a gradient as well"
            )
        # dX does not depend on x, so any x of this shape serves
        x = dy.new_zeros(ctx.x_like[0], dtype=ctx.x_like[1]).requires_grad_()
    member = Projection(weight, bias, A, B, ctx.scale, ctx.p, ctx.transposed)
    grads = differentiable_backward(x, [member], [bits], [dy], ctx.needs_input_grad[:5])
    return (*grads, None, None, None)


def differentiable_backward(
    x: Tensor,
    members: Sequence[Projection],
    words: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of each projection's four tensors, by autograd of the plain formula.

    They are a graph. ``needs`` has True for each that is wanted, in this order; the others are
    None. A dY is None for an output that was not used.
    """
    wanted = [i for i, need in enumerate(needs) if need]
    ys, used = [], []
    with torch.enable_grad():
        inputs: list[Any] = apart([x, *(t for m in members for t in m.tensors)])
        x, own = inputs[0], inputs[1:]
        members = [
            Projection._make((*own[4 * i : 4 * i + 4], *m.settings)) for i, m in enumerate(members)
        ]
        for member, bits, dy in zip(members, words, dys, strict=True):
            if dy is None:
                continue
            mask = None
            if bits is not None:
                mask = unpack_bits(bits, x.shape[-1], x.dtype).view(x.shape)
            ys.append(plain(x, member, mask))
            used.append(dy)
        sources: Any = [inputs[i] for i in wanted]
        grads = torch.autograd.grad(ys, sources, used, create_graph=True, allow_unused=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(len(inputs))]


def plain(x: Tensor, member: Projection, mask: Tensor | None) -> Tensor:
    """Y by the formula, operation by operation; ``mask`` holds 0 and 1."""
    weight, bias, A, B, scale, p, transposed = member
    y = linear(x, weight.t() if transposed else weight, bias)
    dropped = (x if mask is None else x * mask).to(A.dtype)
    return (y + linear(linear(dropped, A), B) * (scale / (1.0 - p))).to(y.dtype)


def to_autocast(
    device: str, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The tensors of a call in the dtype of ``device``'s autocast, which must be on.

    As in torch's own products, float64 stays.
    """
    if x.dtype == torch.float64:
        return x, weight, bias, A, B
    dtype = torch.get_autocast_dtype(device)
    narrow = bias.to(dtype) if bias is not None else None
    return x.to(dtype), weight.to(dtype), narrow, A.to(dtype), B.to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """A linear layer with a low-rank update, as one operation.

    Args:
        x: [..., K], floating point.
        weight: [N, K], or [K, N] when ``transposed`` (transformers' ``Conv1D``); x's dtype.
        bias: [N] or None.
        A: [r, K], x's dtype or float32.
        B: [N, r], A's dtype.
        scale: factor of the update (``lora_alpha / r``).
        p: dropout probability of A's input, in [0, 1); 0 when not training.
        transposed: layout of ``weight``.

    Returns:
        [..., N] in x's dtype (autocast's when that is on). Products accumulate in float32; A's and
        B's gradients have A's dtype. Differentiable in x, weight, bias, A and B, and twice, except
        with a frozen A and a trained B, which is refused. Forward-mode AD gets the formula,
        operation by operation.

    Raises:
        RuntimeError: torch's matrix product refuses the shapes, devices or dtypes.
    """
    if forward_level() >= 0:  # a fused operation has no tangent, and a kernel would lose one
        if autocast.is_on(x):
            x, weight, bias, A, B = to_autocast(x.device.type, x, weight, bias, A, B)
        mask = torch.empty_like(x).bernoulli_(1.0 - p) if p > 0.0 else None
        return plain(x, Projection(weight, bias, A, B, scale, p, transposed), mask)
    return fused_linear(x, weight, bias, A, B, scale, p, transposed)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    transposed: bool,
) -> Tensor:
    """:func:`lora_linear` for a caller that knows that no forward-mode AD is on."""
    # x.device.type costs as much as a small product; the flags do not
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else autocast.elsewhere(x)
    if device and torch.is_autocast_enabled(device):
        x, weight, bias, A, B = to_autocast(device, x, weight, bias, A, B)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or A.requires_grad
        or B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
            x, weight, bias, A, B, scale, p, transposed
        )
        return y
    if p == 0.0:
        return _backend.active.infer(x, weight, bias, A, B, scale, transposed)
    x2 = x.reshape(-1, x.shape[-1])
    member = Projection(weight, bias, A, B, scale, p, transposed)
    [(y, _, _)] = _backend.active.forward(x2, [member])
    return y.view(*x.shape[:-1], y.shape[-1])
