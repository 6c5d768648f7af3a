"""One operation for DoRA's linear, forward and backward (Liu et al., 2024, arXiv 2402.09353).

    Y = gain ∘ (X Wᵀ + scale · X Aᵀ Bᵀ) + bias,     gain_n = m_n / ‖w_n + scale · b_n A‖

With dropout the adapter reads the dropped X, and the base product of X itself stays, as in HF PEFT:

    Y = X Wᵀ + bias + (gain - 1) ∘ (drop(X) Wᵀ) + gain ∘ (scale · drop(X) Aᵀ Bᵀ)

Norms are constants in the backward (section 4.3). They are computed again in every call, since
nothing tells when a weight was written to. Kept for the backward are X, S [M, r], the mask as bits,
and V [M, N], which the gain multiplies, for the gradient of m.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..utils.private import is_grad_batch, unsafe_view
from . import autocast, dora_torch, torch_backend
from . import backend as _backend
from .apart import apart
from .bits import unpack_bits
from .dora_norm import gain, row_norms
from .lora import to_autocast
from .projection import Projection, ProjectionGrad


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        scale: float,
        p: float,
        transposed: bool,
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        member = Projection(weight, bias, A, B, scale, p, transposed)
        g = gain(magnitude, norms)
        _, needs_w, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        products = ctx.products = _products(x, A)
        y, s, v, bits = products.forward(x2, member, g, needs_m)
        kept_x, kept_s = x if needs_a or needs_w else None, s if needs_b or needs_m else None
        ctx.save_for_backward(kept_x, *member.tensors, magnitude, norms, kept_s, v, bits)
        ctx.x_like, ctx.settings = (x.shape, x.dtype), member.settings
        return y if x.dim() == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            return _second_derivatives(ctx, dy)
        x, weight, bias, A, B, magnitude, norms, s, v, bits = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        shape, dtype = ctx.x_like
        scale, p, transposed = ctx.settings
        w = weight if transposed else weight.t()  # [K, N]
        dy2 = dy.reshape(-1, dy.shape[-1])
        x2 = dy2.new_empty((0, shape[-1]), dtype=dtype) if x is None else x.reshape(-1, shape[-1])
        g = gain(magnitude, norms)
        member = ProjectionGrad(dy2, w, A, B, s, bits, scale, p, needs_a, needs_b)
        products = dora_torch if is_grad_batch(dy) else ctx.products
        dx, da, db, sums = products.backward(x2, member, bias, g, v, needs_x)
        dw = dbias = dm = None
        if needs_w:
            dw = _weight_gradient(dy2, x2, g, bits, p)
            dw = dw.t() if transposed else dw
        if needs_bias:
            dbias = dy2.sum(0)
        if sums is not None and needs_m:
            dm = gain(sums, norms).to(magnitude.dtype)
        return (
            (dx.view(shape) if dx is not None else None), dw, dbias, da, db, dm,
            None, None, None, None,
        )  # fmt: skip


def _weight_gradient(dy: Tensor, x: Tensor, g: Tensor, bits: Tensor | None, p: float) -> Tensor:
    """The gradient [N, K] of a base weight that trains too."""
    if bits is None:
        return ((dy.t() @ x) * g[:, None]).to(x.dtype)
    dropped = unpack_bits(bits, x.shape[1], x.dtype).mul_(x).mul_(1.0 / (1.0 - p))
    return (dy.t() @ x + (dy.t() @ dropped) * (g[:, None] - 1)).to(x.dtype)


def _second_derivatives(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by autograd of the plain formula, as a graph."""
    x, weight, bias, A, B, magnitude, norms, _, _, bits = ctx.saved_tensors
    if x is None:
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            raise RuntimeError(
                "dora_linear: second derivatives with a frozen A and a trained B or magnitude are "
                "not kept; let A require a gradient as well"
            )
        x = dy.new_zeros(ctx.x_like[0], dtype=ctx.x_like[1]).requires_grad_()
    with torch.enable_grad():
        mask = unpack_bits(bits, x.shape[-1], x.dtype).view(x.shape) if bits is not None else None
        inputs = apart([x, weight, bias, A, B, magnitude])
        x, weight, bias, A, B, magnitude = inputs
        member = Projection(weight, bias, A, B, *ctx.settings)
        y = plain(x, member, magnitude, norms, mask)
        wanted = [i for i in range(6) if ctx.needs_input_grad[i]]
        grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return tuple(found.get(i) for i in range(10))


def plain(
    x: Tensor, member: Projection, magnitude: Tensor, norms: Tensor, mask: Tensor | None
) -> Tensor:
    """Y by the formula, operation by operation; ``mask`` holds 0 and 1."""
    weight, bias, A, B, scale, p, transposed = member
    weight = weight.t() if transposed else weight
    dropped = x if mask is None else x * mask / (1.0 - p)
    low = dropped.to(A.dtype)
    g = gain(magnitude, norms)
    update = (g - 1) * linear(dropped, weight) + g * scale * linear(linear(low, A), B)
    return (linear(x, weight, bias) + update).to(x.dtype)


def _products(x: Tensor, A: Tensor) -> ModuleType:
    """The module that computes a call with these tensors, by ``forward`` and ``backward``."""
    if _backend.active is not torch_backend:
        from . import dora_triton

        if dora_triton.why_not(x, A) is None:
            return dora_triton
    return dora_torch


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float,
    p: float = 0.0,
    transposed: bool = False,
    norms: Tensor | None = None,
) -> Tensor:
    """A linear layer with a weight-decomposed low-rank update, as one operation.

    Args:
        x: [..., K], floating point.
        weight: [N, K], or [K, N] when ``transposed`` (transformers' ``Conv1D``); x's dtype.
        bias: [N] or None.
        A: [r, K], x's dtype or float32.
        B: [N, r], A's dtype.
        magnitude: m [N], any floating dtype.
        scale: factor of the update (``lora_alpha / r``).
        p: dropout probability of the adapter's input, in [0, 1); 0 when not training.
        transposed: layout of ``weight``.
        norms: ‖w_n + scale · b_n A‖ [N] if they are known; None to compute them here.

    Returns:
        [..., N] in x's dtype (autocast's when that is on). Differentiable in x, weight, bias, A, B
        and magnitude, with constant norms, and twice, except with a frozen A and a trained B or
        magnitude, which is refused.

    Raises:
        RuntimeError: torch's matrix product refuses the shapes, devices or dtypes.
    """
    if norms is None:
        norms = row_norms(weight, A, B, scale, transposed)
    if autocast.is_on(x):
        x, weight, bias, A, B = to_autocast(x.device.type, x, weight, bias, A, B)
    tensors = (x, weight, bias, A, B, magnitude)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y: Tensor = _DoraLinear.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
            x, weight, bias, A, B, magnitude, norms, scale, p, transposed
        )
        return y
    g = gain(magnitude, norms)
    if p == 0.0:
        v = _backend.active.infer(x, weight, bias, A, B, scale, transposed)
        return dora_torch.scale_columns(v, g, bias, False)
    x2 = x.reshape(-1, x.shape[-1])
    member = Projection(weight, bias, A, B, scale, p, transposed)
    y, _, _, _ = _products(x, A).forward(x2, member, g, False)
    return y.view(*x.shape[:-1], y.shape[-1])
