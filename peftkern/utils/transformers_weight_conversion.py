"""What transformers' own ``load_adapter`` asks for at this address: its conversions of a model's
weights, made into conversions of an adapter's."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from .experts import fuse_experts

# the parameter of the outermost wrapper, and of the one inside it
_PLACES = {"down_proj": "", "gate_up_proj": ".base_layer"}


class FuseExperts(ConversionOps):  # type: ignore[misc]  # transformers is not read
    """lora_A, or lora_B, of a parameter that all experts share, from the experts' own."""

    def __init__(self, side: str) -> None:
        self.side = side

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        layers = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        return {kwargs["full_layer_name"]: fuse_experts(layers, self.side)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("an adapter of fused experts cannot be taken apart")


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The conversions of an adapter's weights, in a file, to names in a model that has the adapter.

    Args:
        weight_conversions: the model's own (``get_model_conversion_mapping``).
        adapter_name: goes into the names.
        peft_config: not needed; adapters' names begin with ``lora_``.
    """
    if not weight_conversions:
        return []
    found: list[Any] = [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
    ]
    for conversion in weight_conversions:
        if isinstance(conversion, WeightConverter):
            found += _experts(conversion, adapter_name)
        else:
            found.append(conversion)
    return found


def _experts(conversion: Any, adapter_name: str) -> list[Any]:
    """The conversions of lora_A and lora_B where a weight's merges the weights of experts."""
    targets = conversion.target_patterns
    holder, _, parameter = targets[0].rpartition(".")
    if len(targets) != 1 or parameter not in _PLACES:
        return []
    if not any(isinstance(op, MergeModulelist) for op in conversion.operations):
        return []
    found = []
    for side in ("lora_A", "lora_B"):
        made = type(conversion)(
            [re.sub(r"\.[^.]*$", f".{side}.*", source) for source in conversion.source_patterns],
            f"{holder}{_PLACES[parameter]}.{side}.{adapter_name}.weight",
            [FuseExperts(side)],
        )
        for name in ("distributed_operation", "quantization_operation"):
            setattr(made, name, getattr(conversion, name))
        found.append(made)
    return found
