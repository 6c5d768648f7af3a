"""Conversions of an adapter's weights, made from transformers' conversions of a model's weights.

transformers' own ``load_adapter`` imports them from this address.
"""

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

# the parameter of the outermost wrapper, and that of the one inside it
_PLACES = {"down_proj": "", "gate_up_proj": ".base_layer"}


class FuseExperts(ConversionOps):  # type: ignore[misc]  # transformers is not read
    """Makes lora_A or lora_B of a parameter that holds all experts from those of the experts."""

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
    """The conversions of an adapter's weights in a file to those in a model with the adapter.

    Args:
        weight_conversions: the model's conversions (``get_model_conversion_mapping``).
        adapter_name: the adapter's name, which is a part of names in the model.
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
    """The conversions of lora_A and lora_B for one that merges the weights of experts."""
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
