"""HF PEFT's address of the state dicts of adapters and of their base models."""

from ..checkpoint.base_weights import get_base_model_state_dict, set_base_model_state_dict
from ..checkpoint.loading import _insert_adapter_name_into_state_dict, set_peft_model_state_dict
from ..checkpoint.state_dicts import get_peft_model_state_dict, load_peft_weights

__all__ = [
    "_insert_adapter_name_into_state_dict",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
