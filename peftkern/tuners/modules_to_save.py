"""Modules that train in full beside an adapter (``modules_to_save``): finding and wrapping them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..utils.handing import HERE, TokenNames, hand_over
from ..utils.module_tree import get_submodules, set_layer_requires_grad
from ..utils.places import ends_with_words, further_names, outside_of, replace
from ..utils.zero3 import gathered
from .tensor_parallel import copied

# modules that hold others and have no forward of their own
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
# modules that map each row of a batch to one row, independently of the others
ROW_WISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AuxiliaryTrainingWrapper(nn.Module):
    """A module that trains with an adapter, but in full and not by the adapter's method.

    Attributes that the wrapper does not have are read from the module in use (:meth:`in_use`), so
    that code which reads ``classifier.weight`` gets the weight that forward computes with.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: Sequence[str] = ()

    original_module: nn.Module
    _active_adapter: list[str] | str
    _disable_adapters: bool
    # names of the adapters that this module trains with
    _adapters: set[str]

    @property
    def active_adapter(self) -> list[str] | str:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The one of these adapters that this module has; None when it has none of them.

        Raises:
            ValueError: no adapter is named, or this module has several of them.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        have = self._get_available_adapters()
        names = [n for n in adapter_name if n in have]
        if len(names) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(names)}")
        return names[0] if names else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        raise NotImplementedError

    def delete_adapter(
        self, adapter_name: str, new_active_adapters: Sequence[str] | None = None
    ) -> None:
        raise NotImplementedError

    def in_use(self) -> Any:
        """The module that forward runs at present: the active adapter's, or the original one."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that replaces this wrapper when adapters are removed from the model."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_disable_adapters" not in self.__dict__ or name == "original_module":
                raise
            if (used := self.in_use()) is None:
                raise
            return getattr(used, name)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with one fully trained copy for each adapter; ``original_module`` never changes.

    Raises:
        TypeError: the module is a container without a forward, or an adapter layer.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str) -> None:
        super().__init__()
        if isinstance(module_to_save, CONTAINERS) or hasattr(module_to_save, "base_layer"):
            raise TypeError(
                f"modules_to_save cannot be applied to modules of type {type(module_to_save)}"
            )
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict({})
        self._active_adapter = [adapter_name]
        self._disable_adapters = False
        self._adapters = set()
        self.update(adapter_name)

    def update(self, adapter_name: str) -> None:
        """Give the adapter a copy of the original module, if it has none."""
        self._adapters.add(adapter_name)
        if adapter_name not in self.modules_to_save:
            with gathered(self.original_module.parameters()):
                self.modules_to_save[adapter_name] = copied(self.original_module)
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name].requires_grad_(adapter_name in self.active_adapters)

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())

    def in_use(self) -> Any:
        """The copy of the merged adapter, else of the active one, else the original module."""
        names = self.active_adapters if self._merged is None else self._merged
        if self._disable_adapters or not names:
            return self.original_module
        return self.modules_to_save._modules.get(names[0])

    # ---------------------------------------------------------------- beside merged layers

    # the adapter ([name], or [] for the original module) whose copy is in use while adapters are
    # merged into the layers; None: nothing is merged
    _merged: list[str] | None = None

    def merge_choice(self, adapter_names: Sequence[str] | None) -> list[str]:
        """The adapter whose copy is to be used once ``adapter_names`` are merged into the layers.

        ``adapter_names`` None means the active ones; adapters that are merged already count too.
        Returns [name], or [] for the original module.

        Raises:
            ValueError: several have a copy, and none of them is the active one.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = dict.fromkeys([*(self._merged or ()), *wanted])
        held = [name for name in names if name in self.modules_to_save]
        if len(held) > 1:
            active = [name for name in held if name in self.active_adapters]
            if not active:
                raise ValueError(
                    f"`adapter_names`: {held} have each trained a {type(self.original_module)} in "
                    "full (`modules_to_save`), and only one can be in use; make that one active "
                    "with `set_adapter`, or merge one alone"
                )
            held = active
        return held

    def note_merged(self, names: list[str] | None) -> None:
        """Use the copy for ``names`` (of :meth:`merge_choice`); None when adapters are unmerged."""
        self._merged = names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if HERE.blocks:
            kwargs = hand_over(self, kwargs)
        last = kwargs.pop("last_tokens", None)  # [B], given with a prompt: `prompting.pooling`
        y = self._called(*args, **kwargs)
        if last is None or not isinstance(y, torch.Tensor) or y.dim() != 3:
            return y
        # the model reads a row's logits at the last place, so those of its last token go there
        return torch.cat([y[:, :-1], y[torch.arange(len(y), device=y.device), last, None]], 1)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        adapter_names = kwargs.pop("adapter_names", None)
        if isinstance(adapter_names, TokenNames):
            return adapter_names.over(self._called, *args, **kwargs)
        if adapter_names is not None and args and len(args[0]) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(args[0])} respectively."
            )
        if self._disable_adapters and self._merged is not None:  # layers unmerge in this call too
            self._merged = None
        if adapter_names is None or self._disable_adapters:
            used = self.in_use()
            return (self.original_module if used is None else used)(*args, **kwargs)
        return self._mixed_batch(*args, adapter_names=adapter_names, **kwargs)

    def _mixed_batch(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any
    ) -> torch.Tensor:
        """Run row i of the batch through the copy of ``adapter_names[i]``."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(adapter_names):
            rows.setdefault(name if name in self.modules_to_save else "__base__", []).append(i)
        parts = []
        for name, index in rows.items():
            module = self.original_module if name == "__base__" else self.modules_to_save[name]
            given = kwargs
            if any(module in block for block in HERE.blocks):  # an adapter on the copy
                given = {**kwargs, "adapter_names": [adapter_names[i] for i in index]}
            part = module(x[index], *args, **given)
            if not isinstance(part, torch.Tensor) or len(part) != len(index):
                raise TypeError(
                    "Mixed batching is only supported for the following modules: "
                    f"{', '.join(m.__name__ for m in ROW_WISE)}. Any other must return one tensor "
                    f"with a row for each row of its input, which {type(module).__name__} does not."
                )
            parts.append(part)
        order = torch.tensor([i for index in rows.values() for i in index], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active copy, which trains again; or the original module, and nothing trains."""
        self._disable_adapters = not enabled
        for name, module in self.modules_to_save.items():
            if not enabled or name in self.active_adapters:
                set_layer_requires_grad(module, enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use the copy of this adapter (at most one; with none, the original module).

        The copy trains unless ``inference_mode``; the one used so far no longer trains.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Attempted to set multiple ({names}) adapters at once for modules_to_save."
            )
        for name in names:
            if name not in self.modules_to_save:
                raise ValueError(f"Adapter {name} not found in {sorted(self._adapters)}")
        for name in self.active_adapters:
            if name in self.modules_to_save:
                set_layer_requires_grad(self.modules_to_save[name], False)
        for name in names:
            set_layer_requires_grad(self.modules_to_save[name], not inference_mode)
        self._active_adapter = names
        self._merged = None

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let the copies of these adapters train, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, module in self.modules_to_save.items():
            if name in names:
                set_layer_requires_grad(module, requires_grad)

    def delete_adapter(
        self, adapter_name: str, new_active_adapters: Sequence[str] | None = None
    ) -> None:
        """Drop the adapter's copy.

        Args:
            adapter_name: nothing happens when this module has no copy for it.
            new_active_adapters: the adapters that the model's layers use from now on; this module
                uses the copy for them if it has one, else the original module.
        """
        if adapter_name not in self.modules_to_save:
            return
        names = list(new_active_adapters or ())
        if len(names) > 1:
            raise ValueError(
                f"Attempted to set multiple ({names}) adapters at once for "
                f"{type(self).__name__}, which is not allowed."
            )
        keep = [n for n in self.active_adapters if n != adapter_name]
        if new_active_adapters is not None:
            keep = [n for n in names if n in self.modules_to_save and n != adapter_name]
        if keep != self.active_adapters:
            self.set_adapter(keep)
        del self.modules_to_save[adapter_name]
        self._adapters.discard(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """{name on disk: name in this module} of the adapter's tensors."""
        if adapter_name not in self.modules_to_save:
            return {}
        copied = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in copied}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The copy of the merged adapter, else of the active one; without a copy, the original.

        Adapters that are switched off (``enable_adapters(False)``) make no difference.
        """
        if merge:
            names = self.merge_choice(adapter_names)
        else:
            names = self.active_adapters if self._merged is None else self._merged
        return self.modules_to_save[names[0]] if names else self.original_module


def _set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False
) -> None:
    """Make all ``AuxiliaryTrainingWrapper`` modules of ``model`` use this adapter's copy, if any.

    Nothing is changed when one of them refuses.
    """
    found = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    chosen = [(m, m.check_set_adapter(adapter_name)) for m in found]
    for module, name in chosen:
        known = name is not None and name in module._adapters
        module.set_adapter([name] if known and name else [], inference_mode=inference_mode)


def find_modules_to_save(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Names of the modules that ``modules_to_save`` matches, outside of adapter layers.

    A module matches when its name ends with one of ``names`` as whole words: "classifier" matches
    "pre_classifier", "out" does not match "dropout". A module that has several names is listed
    under the first one that matches.
    """
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
