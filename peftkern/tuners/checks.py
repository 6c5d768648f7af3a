"""Checks of a model and an adapter's name and configuration, made before a model is changed."""

from __future__ import annotations

import os
import warnings
from typing import Any

from torch import nn

from ..configs.base import PeftConfig
from ..utils.peft_types import PeftType
from ._buffer_dict import BufferDict
from .registry import PEFT_TYPE_TO_PREFIX_MAPPING

# Containers that hold adapters by name: an adapter cannot be named like one of their attributes.
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
    """Refuse anything but a peftkern configuration that names a method.

    Raises:
        TypeError: not a configuration of peftkern (one of HF PEFT, for example).
        NotImplementedError: a configuration without a method (``peft_type`` is None).
    """
    if isinstance(peft_config, PeftConfig):
        if not peft_config.peft_type:
            PeftConfig.check_supported(peft_config)
        return
    kind = type(peft_config)
    name = f"{kind.__module__}.{kind.__qualname__}"
    hint = f"; import {kind.__name__} from peftkern" if name.startswith("peft.") else ""
    raise TypeError(f"`peft_config` must be a configuration of peftkern's, got {name}{hint}")


def check_model(model: Any) -> None:
    """Refuse anything but a module.

    Raises:
        TypeError: ``model`` is no ``nn.Module`` (the path of one, for example).
    """
    if not isinstance(model, nn.Module):
        hint = "; load it first" if isinstance(model, (str, os.PathLike)) else ""
        raise TypeError(f"`model` must be a torch.nn.Module, got {model!r:.100}{hint}")


def warn_of_prefix(adapter_name: str, peft_type: Any) -> None:
    """Warn of an adapter name that the method's prefix begins with ("lora" of "lora_").

    peftkern takes such a name like any other. But code that looks for ".lora" in the names of
    parameters, as older releases of HF PEFT do, then finds every adapter. A name that is another
    part of the prefix ("a") does no harm.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(peft_type))
    if prefix and prefix.startswith(adapter_name):
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. Code "
            f"that looks for '.{adapter_name}' in names of parameters finds all adapters.",
            stacklevel=3,
        )
