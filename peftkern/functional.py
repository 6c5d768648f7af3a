"""HF PEFT's address of the functions for models without a :class:`PeftModel` around them.

Other libraries use them.
"""

from .checkpoint.loading import set_peft_model_state_dict
from .checkpoint.state_dicts import get_peft_model_state_dict
from .mapping import inject_adapter_in_model
from .tuners.adapter_calls import (
    cast_adapter_dtype,
    delete_adapter,
    set_adapter,
    set_requires_grad,
)

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]
