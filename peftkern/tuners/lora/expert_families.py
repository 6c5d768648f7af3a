"""The models whose experts' linear layers are fused parameters under transformers 5.

Every new adapter looks its model up here; :mod:`.fused_experts` does the conversion.
"""

from __future__ import annotations

from typing import Any

from ...utils.private import conversion_families

# {family: {name of a linear layer: the parameter that holds it, alone or with another}}
FUSED: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}


def fused_names(model: Any) -> dict[str, str]:
    """The renamed layers of a model's family; empty for all others."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return {}
    family = "mixtral" if model_type == "mixtral" else conversion_families().get(model_type, "")
    return FUSED.get(family, {})
