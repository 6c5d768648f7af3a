"""The names of a state dict that belong to adapters.

They are found through the modules that hold the tensors, never by how the names look.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..utils.private import FSDP
from ._buffer_dict import BufferDict
from .base_layer import BaseTunerLayer
from .base_tuner import BaseTuner
from .modules_to_save import AuxiliaryTrainingWrapper

_STORES = (nn.ModuleDict, nn.ParameterDict, BufferDict)
_WRAPPED = ("base_layer", "model")  # attributes of a layer and of a tuner that hold the base model


def _is_key_under_prefixes(key: str, prefixes: set[str]) -> bool:
    """True when ``key`` is one of the prefixes or below one ("a.b.c" is below "a.b", "a.bc" not).

    The time depends on the depth of the key, not on the number of prefixes.
    """
    while key:
        if key in prefixes:
            return True
        key = key.rpartition(".")[0]
    return False


def _filter_state_dict_by_key_prefixes(
    state_dict: dict[str, Any], prefixes: set[str]
) -> dict[str, Any]:
    """The entries of ``state_dict`` whose names are under one of the prefixes."""
    return {k: v for k, v in state_dict.items() if _is_key_under_prefixes(k, prefixes)}


def _held_by(module: Any, name: str, adapter_name: str | None) -> set[str]:
    """Prefixes of everything that an adapter layer holds beside the base layer."""
    found = set()
    for held in (module._modules, module._parameters, module._buffers):
        for attribute, value in held.items():
            if value is None or attribute in _WRAPPED:
                continue
            prefix = f"{name}.{attribute}" if name else attribute
            if adapter_name is None or not isinstance(value, _STORES):
                found.add(prefix)
            elif adapter_name in value:
                found.add(f"{prefix}.{adapter_name}")
    return found


def _get_tuner_state_dict_key_prefixes(
    model: nn.Module, adapter_name: str | None = None
) -> set[str]:
    """Prefixes of the names, in ``model.state_dict()``, of all that adapter layers hold.

    Args:
        model: a PeftModel, a tuner, or a model with adapter layers in it.
        adapter_name: only this adapter's part of what is kept by adapter; None: all of it.

    Modules that train beside an adapter are not among them, nor are adapter layers inside those.
    """
    found: set[str] = set()
    beside: set[str] = set()
    for name, module in model.named_modules():
        name = name.removeprefix(FSDP)
        if isinstance(module, AuxiliaryTrainingWrapper):
            beside.add(name)
        elif isinstance(module, BaseTuner) or (
            isinstance(module, BaseTunerLayer) and not _is_key_under_prefixes(name, beside)
        ):
            found |= _held_by(module, name, adapter_name)
    return found
