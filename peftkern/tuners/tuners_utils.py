"""HF PEFT's address of the names that all adapter layers and tuners share."""

from ..configs.base import PeftConfig
from ..utils.constants import (
    DUMMY_MODEL_CONFIG,
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
    UPCAST_DTYPES,
)
from ..utils.error import NoMatchingPeftModuleError
from ..utils.integrations import init_empty_weights
from ..utils.module_tree import get_submodules as _get_submodules
from ..utils.module_tree import match_target_against_key
from ..utils.module_tree import set_layer_requires_grad as _set_layer_requires_grad
from ..utils.peft_types import PeftType, TaskType
from ..utils.quantization_utils import QuantizationBackend
from ..utils.tied import modules_tied_to_embedding as _get_module_names_tied_with_embedding
from ..utils.warning import PeftWarning
from ._buffer_dict import BufferDict
from .adapter_calls import (
    cast_adapter_dtype,
    check_adapters_to_merge,
    clone_module,
    delete_adapter,
    find_parameter_name_by_module,
    get_device_map,
    set_adapter,
    set_requires_grad,
)
from .base_layer import BaseTunerLayer
from .base_tuner import BaseTuner
from .key_prefixes import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
)
from .lora.replication import replicate_layers
from .modules_to_save import AuxiliaryTrainingWrapper, _set_adapter
from .prompting.encoder import BasePromptEncoder
from .registry import PEFT_TYPE_TO_PREFIX_MAPPING
from .target_names import _find_minimal_target_modules
from .targets import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    inspect_matched_modules,
)

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "NoMatchingPeftModuleError",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PeftConfig",
    "PeftType",
    "PeftWarning",
    "QuantizationBackend",
    "SEQ_CLS_HEAD_NAMES",
    "TaskType",
    "UPCAST_DTYPES",
    "_ExcludedModule",
    "_filter_state_dict_by_key_prefixes",
    "_find_minimal_target_modules",
    "_get_module_names_tied_with_embedding",
    "_get_submodules",
    "_get_tuner_state_dict_key_prefixes",
    "_is_key_under_prefixes",
    "_maybe_include_all_linear_layers",
    "_set_adapter",
    "_set_layer_requires_grad",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "init_empty_weights",
    "inspect_matched_modules",
    "match_target_against_key",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]
