"""What variants have in common that are plain LoRA outside training, on linear layers alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...ops.lora import lora_linear
from .variant import LoraVariant

# fields of LoraConfig that ask for such a variant: what it is called
FIELDS = {"velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA"}
# other fields that select a variant by being true
OTHERS = ("alora_invocation_tokens", "use_dora")


class TrainedOtherwise(LoraVariant):
    """A variant whose adapter is B A when it is merged, and in calls that are no training: these
    run as plain LoRA's one operation."""

    name: str

    def differs(self, layer: Any) -> bool:
        """Whether a call at this moment is not the one that plain LoRA would do."""
        raise NotImplementedError

    def fused(self, layer: Any, adapter: str, x: Tensor) -> Tensor | None:
        call = layer.product_call(x, adapter)
        return None if call is None else lora_linear(x, *call)

    def fused_as(self, layer: Any, adapter: str) -> str | None:
        if self.differs(layer) or layer.product_reason(adapter) is not None:
            return None
        return f"{self.name}: plain LoRA's one operation, as it does not train"

    def merged_weight(self, layer: Any, adapter: str, weight: Tensor, base: Tensor) -> Tensor:
        return layer._delta_weight(adapter).to(weight.device, weight.dtype).add_(weight)

    def decline(self, layer: Any, adapter: str) -> str:
        if not self.differs(layer):
            reason = layer.product_reason(adapter)
            return f"{self.name}; {reason or 'it has an operation outside training'}"
        return f"{self.name}: in training the base layer, then the adapter by torch's operations"


def check(base: nn.Module, config: Any) -> None:
    """Raise, where HF PEFT has words with them, for a base layer or other settings that such a
    variant cannot be combined with.

    Raises:
        ValueError: the layer is no linear one, its weight is quantised, or another variant is asked
            for as well.
    """
    asked = [name for name in FIELDS if getattr(config, name)]
    if not asked:
        return
    shown = FIELDS[asked[0]]
    if asked[0] == "velora_config" and isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError("VeLoRA does not support adapting conv layers.")
    asked += [name for name in OTHERS if getattr(config, name)]
    asked += ["mica"] if config.init_name == "mica" else []
    if len(asked) > 1 or isinstance(base, _NOT_LINEAR):
        raise ValueError(f"Invalid or unsupported variant combination: {tuple(sorted(asked))}")
    weight: Any = getattr(base, "weight", None)
    quantised = not isinstance(weight, Tensor) or not weight.is_floating_point()
    if quantised or weight.dtype.itemsize == 1:
        raise ValueError(f"{type(base).__name__} does not support {shown}.")


_NOT_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
