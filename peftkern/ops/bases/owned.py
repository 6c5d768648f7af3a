"""A weight that is a tensor of its owner's class, dequantised by its public `dequantize()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .weight import Packed


class Owned(Packed):
    """A tensor subclass with a method ``dequantize()``; ``names`` are those of its parts."""

    __slots__ = ("weight", "names", "fixed", "shape", "device", "format")

    def __init__(
        self, weight: Any, names: tuple[str, ...], form: str, fixed: torch.dtype | None = None
    ) -> None:
        self.weight, self.names, self.fixed = weight, names, fixed
        self.shape, self.device = (weight.shape[0], weight.shape[1]), weight.device
        self.format = form

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(getattr(self.weight, name) for name in self.names)

    def dense(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            w: Tensor = self.weight.dequantize()
        return w.to(dtype).contiguous()
