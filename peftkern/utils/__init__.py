"""Helpers of no single layer, and HF PEFT's address of helpers.

Names are imported when they are first used, as some belong to layers above this one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazily

if TYPE_CHECKING:
    from .constants import ALLOWED_COMPUTE_DTYPES as ALLOWED_COMPUTE_DTYPES
    from .constants import CONFIG_NAME as CONFIG_NAME
    from .constants import EMBEDDING_LAYER_NAMES as EMBEDDING_LAYER_NAMES
    from .constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
    from .constants import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
    from .constants import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,  # noqa: E501
    )
    from .constants import (
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,  # noqa: E501
    )
    from .constants import UPCAST_DTYPES as UPCAST_DTYPES
    from .constants import WEIGHTS_NAME as WEIGHTS_NAME
    from .constants import (
        bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value,
    )
    from .error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from .error import PeftError as PeftError
    from .loftq_utils import replace_lora_weights_loftq as replace_lora_weights_loftq
    from .other import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
    from .other import ModulesToSaveWrapper as ModulesToSaveWrapper
    from .other import TrainableTokensWrapper as TrainableTokensWrapper
    from .other import _freeze_adapter as _freeze_adapter
    from .other import _get_batch_size as _get_batch_size
    from .other import _get_input_embeddings_name as _get_input_embeddings_name
    from .other import _get_submodules as _get_submodules
    from .other import _is_valid_match as _is_valid_match
    from .other import _set_adapter as _set_adapter
    from .other import cast_mixed_precision_params as cast_mixed_precision_params
    from .other import get_pattern_key as get_pattern_key
    from .other import id_tensor_storage as id_tensor_storage
    from .other import infer_device as infer_device
    from .other import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .other import shift_tokens_right as shift_tokens_right
    from .other import transpose as transpose
    from .peft_types import PeftType as PeftType
    from .peft_types import TaskType as TaskType
    from .save_and_load import get_base_model_state_dict as get_base_model_state_dict
    from .save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
    from .save_and_load import load_peft_weights as load_peft_weights
    from .save_and_load import set_base_model_state_dict as set_base_model_state_dict
    from .save_and_load import set_peft_model_state_dict as set_peft_model_state_dict
    from .warning import PeftWarning as PeftWarning

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
__all__, _find = lazily(__name__, _WHERE)


if not TYPE_CHECKING:  # with a __getattr__ a type checker would accept any name, misspelt or not
    __getattr__ = _find
