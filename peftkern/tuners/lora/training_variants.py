"""``TrainedOtherwise``: the base class of variants that are plain LoRA outside training.

They work on linear layers only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.lora import lora_linear
from .variant import LoraVariant


class TrainedOtherwise(LoraVariant):
    """A variant that is B A when merged and in calls outside training.

    These calls run as plain LoRA's one operation.
    """

    stacks = True

    @classmethod
    def check(cls, key: str, base: Any, r: int, config: Any) -> None:
        weight: Any = getattr(base, "weight", None)
        quantised = not isinstance(weight, Tensor) or not weight.is_floating_point()
        if quantised or weight.dtype.itemsize == 1:
            raise ValueError(f"{type(base).__name__} does not support {cls.name}.")

    def differs(self, layer: Any) -> bool:
        """True when a call at this moment differs from plain LoRA's."""
        raise NotImplementedError

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = layer.product_call(x, adapter)
        return None if call is None else lora_linear(x, *call)

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        if self.differs(layer) or layer.product_reason(adapter) is not None:
            return None
        return f"{self.name}: plain LoRA's one operation, as it does not train"

    def decline(self, layer: Any, adapter: str) -> str:
        if not self.differs(layer):
            reason = layer.product_reason(adapter)
            return f"{self.name}; {reason or 'it has an operation outside training'}"
        return f"{self.name}: in training the base layer, then the adapter by torch's operations"
