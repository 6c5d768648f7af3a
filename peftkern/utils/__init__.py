"""Names, constants, module helpers and checkpoint reading."""

from __future__ import annotations

import importlib
from typing import Any

from .constants import (
    ALLOWED_COMPUTE_DTYPES,
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    UPCAST_DTYPES,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)
from .error import NoMatchingPeftModuleError, PeftError
from .other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _freeze_adapter,
    _get_batch_size,
    _get_input_embeddings_name,
    _get_submodules,
    _is_valid_match,
    _set_adapter,
    cast_mixed_precision_params,
    get_pattern_key,
    id_tensor_storage,
    infer_device,
    prepare_model_for_kbit_training,
    shift_tokens_right,
    transpose,
)
from .peft_types import PeftType, TaskType
from .warning import PeftWarning

# of a floor above this one; they come when they are asked for
_ABOVE = {
    "TrainableTokensWrapper": "peftkern.tuners.trainable_tokens",
    "get_base_model_state_dict": "peftkern.utils.save_and_load",
    "get_peft_model_state_dict": "peftkern.utils.save_and_load",
    "load_peft_weights": "peftkern.utils.save_and_load",
    "replace_lora_weights_loftq": "peftkern.utils.loftq_utils",
    "set_base_model_state_dict": "peftkern.utils.save_and_load",
    "set_peft_model_state_dict": "peftkern.utils.save_and_load",
}

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_submodules",
    "_is_valid_match",
    "_set_adapter",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "get_pattern_key",
    "id_tensor_storage",
    "infer_device",
    "prepare_model_for_kbit_training",
    "shift_tokens_right",
    "transpose",
    *_ABOVE,
]


def __getattr__(name: str) -> Any:
    if name not in _ABOVE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ABOVE[name]), name)
