"""The product with a quantised weight alone: Y = X Wᵀ + bias, for calls without an update.

It takes the place of the layer's own forward where adapters are disabled, merged, or several: some
owners change their weights in it (bitsandbytes packs them anew for some processors).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...utils.private import in_transform, unsafe_view
from .. import autocast
from ..torch_products import base_linear
from .weight import BaseWeight


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: BaseWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        y = base_linear(x.reshape(-1, x.shape[-1]), weight.t(), bias)
        return y if x.dim() == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        [weight] = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        # with create_graph=True torch records this product, as of any dense matrix
        if torch.is_grad_enabled():
            dx = dy2 @ weight.dense()
        else:
            dx = weight.product(dy2) if ctx.needs_input_grad[0] else None
        dbias = dy2.sum(0) if ctx.needs_input_grad[2] else None
        return (None if dx is None else dx.view(ctx.shape)), None, dbias


def frozen_linear(x: Tensor, weight: BaseWeight, bias: Tensor | None) -> Tensor:
    """Y [..., N] in x's dtype (autocast's when that is on) for x [..., K].

    Differentiable in x and bias, and twice.
    """
    if autocast.is_on(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor
    if in_transform():  # it sees torch's own operations alone
        dtype = weight.packed.compute_dtype(x.dtype)
        y = linear(x.to(dtype), weight.to(dtype).dense()).to(x.dtype)
        return y if bias is None else y + bias
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    y = weight.packed.infer(x.reshape(-1, x.shape[-1]))
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def base_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Y [..., N] of a base layer alone, for its weight [N, K], dense or quantised."""
    if weight.__class__ is BaseWeight:
        return frozen_linear(x, weight, bias)
    return linear(x, weight, bias)
