"""HF PEFT's address of the functions for hot swapping."""

from ..checkpoint.hotswap import (
    CONFIG_KEYS_TO_CHECK,
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from ..checkpoint.loading import _insert_adapter_name_into_state_dict
from ..checkpoint.state_dicts import load_peft_weights
from ..configs.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from ..configs.lora import LoraConfig
from ..tuners.base_layer import BaseTunerLayer
from ..tuners.lora.base import LoraLayer
from ..tuners.lora.conv import Conv2d
from ..tuners.lora.linear import Linear
from ..tuners.registry import PEFT_TYPE_TO_PREFIX_MAPPING
from .device import infer_device
from .module_tree import get_pattern_key
from .peft_types import PeftType

__all__ = [
    "BaseTunerLayer",
    "CONFIG_KEYS_TO_CHECK",
    "Conv2d",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PeftConfig",
    "PeftType",
    "_insert_adapter_name_into_state_dict",
    "check_hotswap_configs_compatible",
    "get_pattern_key",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_compiled_hotswap",
]
