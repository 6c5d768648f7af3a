"""HF PEFT's address of the wrappers of ``modules_to_save`` and of small helpers."""

from ..fsdp import fsdp_auto_wrap_policy
from ..tuners.modules_to_save import (
    CONTAINERS,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _set_adapter,
    find_modules_to_save,
    wrap_modules_to_save,
)
from ..tuners.preparing import (
    cast_mixed_precision_params,
    prepare_model_for_kbit_training,
    shift_tokens_right,
)
from ..tuners.trainable_tokens import TrainableTokensWrapper
from .constants import (
    CONFIG_NAME,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    WEIGHTS_NAME,
    bloom_model_postprocess_past_key_value,
)
from .device import infer_device
from .module_tree import batch_size as _get_batch_size
from .module_tree import freeze_adapter as _freeze_adapter
from .module_tree import (
    get_pattern_key,
    get_submodules,
    id_tensor_storage,
    match_target_against_key,
    set_layer_requires_grad,
    transpose,
)
from .module_tree import get_submodules as _get_submodules
from .module_tree import input_embeddings_name as _get_input_embeddings_name
from .module_tree import is_valid_match as _is_valid_match
from .module_tree import no_split_modules as _get_no_split_modules
from .module_tree import set_layer_requires_grad as _set_layer_requires_grad
from .tied import modules_tied_to_embedding as _get_module_names_tied_with_embedding

__all__ = [
    "CONFIG_NAME",
    "CONTAINERS",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_module_names_tied_with_embedding",
    "_get_no_split_modules",
    "_get_submodules",
    "_is_valid_match",
    "_set_adapter",
    "_set_layer_requires_grad",
    "bloom_model_postprocess_past_key_value",
    "cast_mixed_precision_params",
    "get_pattern_key",
    "get_submodules",
    "id_tensor_storage",
    "infer_device",
    "match_target_against_key",
    "prepare_model_for_kbit_training",
    "set_layer_requires_grad",
    "shift_tokens_right",
    "transpose",
    "TrainableTokensWrapper",
    "find_modules_to_save",
    "fsdp_auto_wrap_policy",
    "wrap_modules_to_save",
]
