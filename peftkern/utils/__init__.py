"""What has no layer of its own, and HF PEFT's address of helpers; names come when they are asked
for, as some are of layers above this one."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    ".constants": (
        "ALLOWED_COMPUTE_DTYPES CONFIG_NAME EMBEDDING_LAYER_NAMES "
        "INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME "
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING UPCAST_DTYPES WEIGHTS_NAME "
        "bloom_model_postprocess_past_key_value"
    ),
    ".error": "NoMatchingPeftModuleError PeftError",
    ".loftq_utils": "replace_lora_weights_loftq",
    ".other": (
        "AuxiliaryTrainingWrapper ModulesToSaveWrapper _freeze_adapter _get_batch_size "
        "_get_input_embeddings_name _get_submodules _is_valid_match _set_adapter "
        "cast_mixed_precision_params get_pattern_key id_tensor_storage infer_device "
        "prepare_model_for_kbit_training shift_tokens_right transpose TrainableTokensWrapper"
    ),
    ".peft_types": "PeftType TaskType",
    ".save_and_load": (
        "get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
        "set_base_model_state_dict set_peft_model_state_dict"
    ),
    ".warning": "PeftWarning",
}
_LAZY = {name: module for module, names in _WHERE.items() for name in names.split()}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
