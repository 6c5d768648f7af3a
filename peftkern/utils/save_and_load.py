"""HF PEFT's address of the state dicts of adapters and of their base models."""

from ..checkpoint.base_weights import get_base_model_state_dict, set_base_model_state_dict
from ..checkpoint.loading import _insert_adapter_name_into_state_dict, set_peft_model_state_dict
from ..checkpoint.state_dicts import get_peft_model_state_dict, load_peft_weights
from ..tuners.modules_to_save import AuxiliaryTrainingWrapper
from ..tuners.registry import PEFT_TYPE_TO_TUNER_MAPPING
from .constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from .device import infer_device
from .module_tree import match_target_against_key
from .peft_types import PeftType
from .warning import PeftWarning

__all__ = [
    "AuxiliaryTrainingWrapper",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftType",
    "PeftWarning",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "_insert_adapter_name_into_state_dict",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "match_target_against_key",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
