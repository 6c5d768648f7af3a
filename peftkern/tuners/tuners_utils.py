"""HF PEFT's address of what all adapter layers and tuners share."""

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
from .prompting.encoder import BasePromptEncoder
from .target_names import _find_minimal_target_modules
from .targets import (
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    inspect_matched_modules,
)

__all__ = [
    "BasePromptEncoder",
    "BaseTuner",
    "BaseTunerLayer",
    "_ExcludedModule",
    "_filter_state_dict_by_key_prefixes",
    "_find_minimal_target_modules",
    "_get_tuner_state_dict_key_prefixes",
    "_is_key_under_prefixes",
    "_maybe_include_all_linear_layers",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]
