"""Weights in 8-bit floating point with a scale for each tensor, row or block.

    W_nk = q_nk · s_(n // bn, k // bk)      q in float8, bn x bk elements to a scale

What is common to the owners: transformers' FineGrainedFP8, torchao, compressed-tensors and this
package's own :class:`.fp8_linear.Fp8Linear`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import fp8_products
from .fp8_numbers import E4M3, numbers, scale_
from .weight import Packed

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised

# a layer's attribute with the user's choice (:func:`peftkern.set_base_compute`)
CHOICE = "peftkern_base_compute"
DEQUANTISE, IN_FP8 = "dequantise", "fp8"


class Fp8(Packed):
    """A weight [N, K] in float8.

    Args:
        q: [N, K] in a float8 dtype.
        scale: one element, [N, 1], or [ceil(N / bn), ceil(K / bk)] with ``block`` (bn, bk).
        block: the number of rows and columns to a scale; None for one scale, or one a row.
        name: the format, for ``explain``.
        rounds_scale: the owner multiplies in the dtype of the result, the scale rounded to it
            before; False: it multiplies in float32 and rounds the product.
        compute: "fp8" to multiply in fp8 where the device can.
        kept: the dtype in which the owner keeps the dense weight, if not that of X.
    """

    __slots__ = (
        "q", "scale", "block", "rounds_scale", "compute", "kept", "name", "shape", "device"
    )  # fmt: skip

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        block: tuple[int, int] | None,
        name: str,
        rounds_scale: bool = False,
        compute: str = DEQUANTISE,
        kept: torch.dtype | None = None,
    ) -> None:
        self.q, self.scale, self.block, self.name = q, scale, block, name
        self.rounds_scale, self.compute, self.kept = rounds_scale, compute, kept
        self.shape, self.device = (q.shape[0], q.shape[1]), q.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.q, self.scale

    @property
    def format(self) -> str:  # type: ignore[override]
        if self.compute != IN_FP8:
            return self.name
        why = fp8_products.why_not(self)
        return f"{self.name}; {'computes in fp8' if why is None else f'dequantised: {why}'}"

    def dense(self, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32) if self.rounds_scale else torch.float32
        scale = self.scale.to(dtype) if self.rounds_scale else self.scale
        w = scale_(numbers(self.q, wide), scale.to(wide), self.block)
        w = w if self.kept is None else w.to(self.kept)
        return w if w.dtype == dtype else w.to(dtype)

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        from ...kernels.quantised_formats import scaled

        if self.quantises_input:
            return "its products are computed in fp8"
        if self.q.dtype != E4M3:
            return f"its weight is {self.q.dtype}"
        scale = self.scale.to(dtype) if self.rounds_scale else self.scale
        if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its scales are {scale.dtype}"
        block = self.block or (1, 0)
        if scale.numel() == 1:
            scale, block = scale.reshape(1, 1), (0, 0)
        return scaled(self.q.data, scale.data, block, through=self.kept)

    @property
    def quantises_input(self) -> bool:  # type: ignore[override]
        return self.compute == IN_FP8 and fp8_products.why_not(self) is None

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        if self.quantises_input:
            return _added(fp8_products.product(x, self), y, x.dtype)
        return super().product(x, y)

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        if self.quantises_input:
            return _added(fp8_products.grad_input(dy, self), dx, dy.dtype)
        return super().grad_input(dy, dx)


def _added(part: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if y is None else y.add_(part)


def chosen(module: Any) -> str:
    """What the user has chosen for a layer: "dequantise" or "fp8"."""
    found: str = module.__dict__.get(CHOICE, DEQUANTISE)
    return found
