"""The rank and alpha of a module by a configuration's patterns, and the scaling from both."""

from __future__ import annotations

import math
from typing import Any

from ...configs.lora import LoraConfig
from ...utils.module_tree import get_pattern_key


def rank_and_alpha(config: LoraConfig, *names: str) -> tuple[int, float]:
    """(r, lora_alpha) of the module or parameter with these names.

    The first name that a pattern matches counts; without one, the configuration's own values.
    """

    def value(field: str, default: Any) -> Any:
        patterns = getattr(config, field)
        if not patterns:
            return default
        keys = (get_pattern_key(patterns, name, field) for name in names)
        return next((patterns[key] for key in keys if key in patterns), default)

    return value("rank_pattern", config.r), value("alpha_pattern", config.lora_alpha)


def scaling_of(r: int, alpha: float, use_rslora: bool) -> float:
    """The factor of an adapter's update (rsLoRA's: Kalajdzievski, 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(r) if use_rslora else r)
