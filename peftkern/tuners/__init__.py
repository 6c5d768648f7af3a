"""Adapter methods: what changes in a model, and where."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    ".lora": (
        "BdLoraConfig KasaConfig "
        "LoraConfig LoraModel LoraRuntimeConfig EvaConfig LoftQConfig LoraGAConfig convert_to_lora "
        "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga save_as_lora "
        "VeloraConfig MontecloraConfig"
    ),
    ".p_tuning": "PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType",
    ".prefix_tuning": "PrefixEncoder PrefixTuningConfig",
    ".prompt_tuning": "PromptEmbedding PromptTuningConfig PromptTuningInit",
}
_LAZY = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
