"""Which modules an adapter trains in full, and their wrapping: ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .module_tree import get_submodules
from .other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .places import ends_with_words, further_names, outside_of, replace


def find_modules_to_save(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Names of the modules that ``modules_to_save`` matches: those that end with one of its names
    as whole words ("classifier" is in "pre_classifier", "out" is not in "dropout"), outside of
    adapter layers. A module that has several names is there under the first one that matches."""
    if not names:
        return []
    aliases = further_names(model)
    found = []
    for key, module in outside_of(model, (AuxiliaryTrainingWrapper,)):
        for own in aliases.get(id(module), (key,)):
            if any(ends_with_words(own, name) for name in names):
                found.append(own)
                break
    return found


def wrap_modules_to_save(
    model: nn.Module, adapter_name: str, keys: Sequence[str], inference_mode: bool, activate: bool
) -> None:
    """Wrap the modules named ``keys`` (from :func:`find_modules_to_save`) for this adapter."""
    for key in keys:
        _, target, _ = get_submodules(model, key)
        if isinstance(target, ModulesToSaveWrapper):
            target.update(adapter_name)
            wrapper = target
        else:
            wrapper = ModulesToSaveWrapper(target, adapter_name)
            replace(model, target, wrapper)
        if activate:
            wrapper.set_adapter([adapter_name], inference_mode=inference_mode)
        elif wrapper._active_adapter == [adapter_name]:
            wrapper.set_adapter([])
