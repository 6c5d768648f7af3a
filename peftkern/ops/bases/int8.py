"""int8 with a scale a row or one for all, x not quantised: W = q · s.

The scale can be applied to W, to the product (x qᵀ) · s, or in the backward to dY: whichever of
these is smallest. So do torchao and quanto in their own ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...utils.private import int8_product
from . import int8_digits
from .weight import Packed

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

_FEW_ROWS = (
    8  # up to so many torch's product of bf16 with int8 is faster than one with W as numbers
)
_WHOLE = 16  # it reads past the end of rows that are no multiple of this


class Int8(Packed):
    """A weight-only int8 weight: ``q`` [N, K] and ``scale`` of one or N elements."""

    __slots__ = ("q", "scale", "fixed", "shape", "device", "format")

    def __init__(
        self, q: Tensor, scale: Tensor, owner: str, fixed: torch.dtype | None = None
    ) -> None:
        self.q, self.scale, self.fixed = q, scale, fixed
        self.shape, self.device = (q.shape[0], q.shape[1]), q.device
        self.format = f"int8 ({owner})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.q, self.scale

    def dense(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale.reshape(-1, 1)
        wide = torch.promote_types(scale.dtype, dtype)  # rounded once, as its owner does
        return self.q.to(wide).mul_(scale).to(dtype)

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import scaled

        if self.q.dtype != torch.int8 or self.scale.dtype not in (dtype, torch.float32):
            return f"its weight is {self.q.dtype} with scales in {self.scale.dtype}"
        scale = self.scale.reshape(-1, 1)
        return scaled(self.q, scale, (1 if scale.shape[0] > 1 else 0, 0))

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        dtype, M = self.compute_dtype(x.dtype), x.shape[0]
        if dtype is x.dtype:
            exact = int8_digits.multiply(x, self.q.t())
            if exact is not None:
                part = exact.mul_(self.scale.reshape(-1))
                return part if y is None else y.add_(part)
        # in float16 x qᵀ may overflow before it is scaled
        if 2 * M > self.shape[1] or dtype not in (torch.float32, torch.bfloat16):
            return super().product(x, y)
        x, given = x.to(dtype), x.dtype
        scale = self.scale.reshape(-1)
        own = M <= _FEW_ROWS and self.shape[1] % _WHOLE == 0
        if own and int8_product is not None and dtype == torch.bfloat16 and x.is_cpu:
            part = int8_product(
                x.contiguous(), self.q, scale.to(dtype).expand(self.shape[0]).contiguous()
            )
        else:
            part = torch.mm(x, self.q.to(dtype).t()).mul_(scale)
        return part.to(given) if y is None else y.add_(part)

    def infer_row(self, v: Tensor) -> Tensor:
        # a third of the host's time of `product`
        if v.dtype is not torch.float32 or self.fixed is not None or not v.is_cpu:
            return super().infer_row(v)
        if int8_digits.gains(1, self.q.numel()):
            return super().infer_row(v)
        return torch.mv(self.q.to(torch.float32), v).mul_(self.scale.view(-1))

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        dtype, M = self.compute_dtype(dy.dtype), dy.shape[0]
        if dtype is torch.float32 and dtype is dy.dtype:
            exact = int8_digits.multiply(dy * self.scale.reshape(-1), self.q)
            if exact is not None:
                return exact if dx is None else dx.add_(exact)
        if M > self.shape[1] or dtype != dy.dtype or dtype not in (torch.float32, torch.bfloat16):
            return super().grad_input(dy, dx)
        scaled = (dy * self.scale.reshape(-1)).to(dtype)
        q = self.q.to(dtype)
        return torch.mm(scaled, q) if dx is None else dx.addmm_(scaled, q)
