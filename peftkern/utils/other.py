"""Modules trained in full beside an adapter, and small helpers on module trees."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .mixed import HERE, hand_over
from .tied import modules_tied_to_embedding as _get_module_names_tied_with_embedding

# modules that hold others and have no forward to copy
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def infer_device() -> str:
    """The accelerator of this process, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def set_layer_requires_grad(layer: nn.Module | nn.Parameter, requires_grad: bool) -> None:
    """Set ``requires_grad`` on a parameter, or on all parameters of a module."""
    if isinstance(layer, nn.Module):
        for parameter in layer.parameters():
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
    elif layer.requires_grad != requires_grad:
        layer.requires_grad_(requires_grad)


def get_pattern_key(patterns: Iterable[str], key: str) -> str:
    """The first of ``patterns`` that is ``key`` or the end of it (as names or
    regular expressions), or ``key``."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", key):
            return pattern
    return key


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, last part of the name) of the module named ``key``."""
    parent_name, _, name = key.rpartition(".")
    parent = model.get_submodule(parent_name)
    return parent, getattr(parent, name), name


class AuxiliaryTrainingWrapper(nn.Module):
    """A module that an adapter trains by other means than its own method;
    see :class:`ModulesToSaveWrapper`."""

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What stands in this wrapper's place when adapters leave the model."""
        raise NotImplementedError


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with one fully trained copy for each adapter; ``original_module`` stays as it was.

    Attribute reads that this wrapper does not answer go to the active copy, so that code which
    looks at ``classifier.weight`` sees the weight in use.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str) -> None:
        super().__init__()
        if isinstance(module_to_save, CONTAINERS):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(module_to_save)}"
            )
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict({})
        self._active_adapter: list[str] = [adapter_name]
        self._disable_adapters = False
        self.update(adapter_name)

    def update(self, adapter_name: str) -> None:
        """Give the adapter a copy of the original module, if it has none."""
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name].requires_grad_(adapter_name in self.active_adapters)

    @property
    def active_adapter(self) -> list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())

    def in_use(self) -> nn.Module:
        """The active adapter's copy, or the original module when none is active."""
        if not self._disable_adapters and self._active_adapter:
            return self.modules_to_save[self._active_adapter[0]]
        return self.original_module

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active adapter's copy, whether adapters are switched off or not; the original when
        none is active here."""
        names = self._active_adapter
        return self.modules_to_save[names[0]] if names else self.original_module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "modules_to_save" not in self._modules:
                raise
            return getattr(self.in_use(), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None or self._disable_adapters:
            return self.in_use()(*args, **kwargs)
        return self._mixed_batch(*args, adapter_names=adapter_names, **kwargs)

    def _mixed_batch(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any
    ) -> torch.Tensor:
        """Row i of the batch goes through the copy of ``adapter_names[i]``."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(adapter_names):
            rows.setdefault(name if name in self.modules_to_save else "__base__", []).append(i)
        parts = [
            (self.original_module if name == "__base__" else self.modules_to_save[name])(
                x[index], *args, **kwargs
            )
            for name, index in rows.items()
        ]
        order = torch.tensor([i for index in rows.values() for i in index], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled
        for name, module in self.modules_to_save.items():
            module.requires_grad_(enabled and name in self._active_adapter)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use the copy of this adapter (of at most one; none means the original module)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for modules_to_save, got {names}"
            )
        for name in names:
            if name not in self.modules_to_save:
                raise ValueError(
                    f"Adapter {name} not found in {sorted(self._get_available_adapters())}"
                )
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, module in self.modules_to_save.items():
            if name in names:
                module.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.modules_to_save:
            self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
            del self.modules_to_save[adapter_name]


def find_modules_to_save(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Names of the modules that ``modules_to_save`` matches (a name that ends so),
    tied ones included."""
    if not names:
        return []
    return [
        key
        for key, _ in model.named_modules(remove_duplicate=False)
        if key and any(key.endswith(name) for name in names) and ".modules_to_save." not in key
    ]


def wrap_modules_to_save(
    model: nn.Module, adapter_name: str, keys: Sequence[str], inference_mode: bool, activate: bool
) -> None:
    """Wrap the modules named ``keys`` (from :func:`find_modules_to_save`) for this adapter."""
    for key in keys:
        parent, target, name = get_submodules(model, key)
        if isinstance(target, ModulesToSaveWrapper):
            target.update(adapter_name)
            wrapper = target
        elif isinstance(parent, ModulesToSaveWrapper):
            continue  # the original_module of one that is wrapped already
        else:
            wrapper = ModulesToSaveWrapper(target, adapter_name)
            setattr(parent, name, wrapper)
        if activate:
            wrapper.set_adapter([adapter_name], inference_mode=inference_mode)
        elif wrapper._active_adapter == [adapter_name]:
            wrapper.set_adapter([])
