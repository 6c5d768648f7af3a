"""What is asked of an adapter's name and configuration before a model is touched."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..configs.base import PeftConfig
from ..utils.peft_types import PeftType
from ._buffer_dict import BufferDict
from .registry import PEFT_TYPE_TO_PREFIX_MAPPING

# what adapters stand in, by name: names that these have already are taken
_STORES = (nn.ModuleDict(), nn.ParameterDict(), BufferDict({}))


def check_adapter_name(adapter_name: Any, existing: Any = ()) -> None:
    """Raise a ValueError for a name that cannot be used in parameter names, or that is taken."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"`adapter_name` must be a non-empty string, got {adapter_name!r}")
    if "." in adapter_name or "/" in adapter_name or "\\" in adapter_name:
        raise ValueError(
            "`adapter_name` must not hold a dot or a slash (it becomes part of parameter and "
            f"folder names), got {adapter_name!r}"
        )
    if any(hasattr(store, adapter_name) for store in _STORES):
        raise ValueError(
            f"`adapter_name` must not be the name of a method or an attribute of torch's modules, "
            f"got {adapter_name!r}"
        )
    if adapter_name in existing:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")


def check_config(peft_config: Any) -> None:
    """Raise a TypeError for what is no configuration of peftkern's, such as one of HF PEFT's, and
    a NotImplementedError for one that names no method."""
    if isinstance(peft_config, PeftConfig):
        if not peft_config.peft_type:
            PeftConfig.check_supported(peft_config)
        return
    kind = type(peft_config)
    name = f"{kind.__module__}.{kind.__qualname__}"
    hint = f"; import {kind.__name__} from peftkern" if name.startswith("peft.") else ""
    raise TypeError(f"`peft_config` must be a configuration of peftkern's, got {name}{hint}")


def warn_of_prefix(adapter_name: str, peft_type: Any) -> None:
    """A name that the method's prefix begins with ("lora" of "lora_"): here it is a name as any
    other, but code that looks for ".lora" in the names of parameters, as older releases of HF PEFT
    do, finds every adapter. A part from elsewhere in the prefix ("a") is in nobody's way."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(peft_type))
    if prefix and prefix.startswith(adapter_name):
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. Code "
            f"that looks for '.{adapter_name}' in names of parameters finds all adapters.",
            stacklevel=3,
        )
