"""``BaseTunerLayer``: the attributes and methods that adapter layers of every method share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..utils.constants import DUMMY_MODEL_CONFIG
from ..utils.module_tree import set_layer_requires_grad
from ..utils.shards import part_like, put_data
from ._buffer_dict import BufferDict
from .modules_to_save import AuxiliaryTrainingWrapper


def as_names(adapter_names: str | Sequence[str]) -> list[str]:
    """``adapter_names``, one name or several, as a list."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def all_modules(model: nn.Module) -> Iterator[Any]:
    """``model.modules()``, in the same order and about three times as fast."""
    stack: list[nn.Module | None] = [model]
    seen = set()
    while stack:
        module = stack.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            if module._modules:
                stack.extend(reversed(module._modules.values()))


def walk(model: nn.Module, into_layers: bool = True) -> Iterator[tuple[str, Any]]:
    """``model.named_modules()`` without the modules that adapter layers hold for their adapters.

    Those are most modules of an adapted model. With ``into_layers=False`` the base layers of
    adapter layers are left out too. The tree is walked at each call, so that a module that was
    replaced is never missed.
    """
    stack: list[tuple[str, Any]] = [("", model)]
    seen = set()
    while stack:
        name, module = entry = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield entry
        children = module._modules
        if not children:
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            if into_layers:
                inner = module.adapter_layer_names + module.other_param_names
                stack += [
                    (prefix + n, m)
                    for n, m in reversed(children.items())
                    if m is not None and n not in inner
                ]
            continue
        stack += [(prefix + n, m) for n, m in reversed(children.items()) if m is not None]


def adapter_modules(model: nn.Module) -> Iterator[Any]:
    """Every adapter layer and every ``AuxiliaryTrainingWrapper``, in the model's order."""
    for _, module in walk(model):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield module


class BaseTunerLayer:
    """Mixin for an ``nn.Module`` that wraps ``base_layer`` and holds adapters by name."""

    # attributes that hold {adapter name: module or parameter}
    adapter_layer_names: tuple[str, ...] = ()
    # attributes that hold {adapter name: plain value}
    other_param_names: tuple[str, ...] = ()

    base_layer: nn.Module
    merged_adapters: list[str]
    _disable_adapters: bool
    _active_adapter: str | list[str]
    # how the base weight is quantised; None when it is not
    quantization_backend: Any = None
    # True: inputs are cast to the dtype of the adapter's weights
    cast_input_dtype_enabled: bool = True

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer; with nested adapter layers, the innermost one."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight, so that code written for the base layer still reads it."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor:
        return self.get_base_layer().bias  # type: ignore[return-value]

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, detached from its autograd graph."""
        return self.get_base_layer().weight.data  # type: ignore[return-value]

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Put this tensor in place of the base layer's weight.

        Of a weight that processes share out (a DTensor), each has the same whole ``weight_data``,
        or a DTensor with the weight's placements.
        """
        weight: Any = self.get_base_layer().weight
        put_data(weight, part_like(weight, weight_data))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """``x`` cast to ``dtype``; unchanged when it is None or this layer does not cast."""
        if x is None or not self.cast_input_dtype_enabled or x.dtype == dtype:
            return x
        return x.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True when the update of this layer can be written as one of plain LoRA."""
        return False

    @property
    def merged(self) -> bool:
        """True while an adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self._active_adapter)

    def _stores(self) -> Iterator[Any]:
        for name in self.adapter_layer_names:
            yield getattr(self, name)

    def _saved_buffers(self) -> Iterator[tuple[str, BufferDict]]:
        """(attribute, {adapter: tensor}) of the buffers that are saved with adapters."""
        for name in self.other_param_names:
            store = getattr(self, name, None)
            if isinstance(store, BufferDict) and store.persistent:
                yield name, store

    def _get_available_adapters(self) -> set[str]:
        return {key for store in self._stores() for key in store.keys()}

    def _all_available_adapter_names(self) -> list[str]:
        """Names of all adapters of which this layer holds a weight or a setting."""
        kept = (getattr(self, n) for n in self.adapter_layer_names + self.other_param_names)
        return sorted({key for store in kept if hasattr(store, "keys") for key in store.keys()})

    def move_adapter_to_base_layer(self, adapter_name: str) -> None:
        """Put an adapter's weights on the device of the base weight (unless that is "meta")."""
        weight = next(self.get_base_layer().parameters(), None)
        if weight is None or weight.is_meta:
            return
        for store in self._stores():
            if adapter_name not in store:
                continue
            layer = store[adapter_name]
            if isinstance(layer, nn.Module):
                layer.to(weight.device)
            else:
                layer.data = layer.data.to(weight.device)
        for _, buffers in self._saved_buffers():
            if adapter_name in buffers and not buffers[adapter_name].is_meta:
                buffers[adapter_name] = buffers[adapter_name].to(weight.device)

    _move_adapter_to_device_of_base_layer = move_adapter_to_base_layer

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on (the active ones train again) or off (nothing trains)."""
        if enabled:
            self.set_adapter(self.active_adapters)
            self._disable_adapters = False
        else:
            for store in self._stores():
                for layer in store.values():
                    set_layer_requires_grad(layer, False)
            self._disable_adapters = True

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters: they train unless ``inference_mode``, no others do."""
        names = as_names(adapter_names)
        # `_modules` and `__dict__` are used directly for speed: a model has hundreds of layers, and
        # nn.Module's own access checks every value first
        held: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        for attribute in self.adapter_layer_names:
            store = held.get(attribute) if attribute in held else getattr(self, attribute)
            if not store:
                continue
            items = store._modules.items() if type(store) is nn.ModuleDict else store.items()
            for key, layer in items:
                set_layer_requires_grad(layer, key in names and not inference_mode)
        self.__dict__["_active_adapter"] = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let the parameters of these adapters train, or freeze them; others stay as they are."""
        names = as_names(adapter_names)
        for store in self._stores():
            for key, layer in store.items():
                if key in names:
                    set_layer_requires_grad(layer, requires_grad)

    def _drop_empty_stores(self) -> None:
        """Remove the stores that a variant added to this layer, once no adapter uses them."""
        for kind in ("adapter_layer_names", "other_param_names"):
            for name in getattr(self, kind):
                if name not in getattr(type(self), kind) and not getattr(self, name):
                    delattr(self, name)
                    setattr(self, kind, tuple(n for n in getattr(self, kind) if n != name))

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; another one becomes active when it was the only active one."""
        for name in self.adapter_layer_names + self.other_param_names:
            store = getattr(self, name)
            if adapter_name in store:
                del store[adapter_name]
        self._drop_empty_stores()
        active = self.active_adapters
        if adapter_name in active:
            active = [a for a in active if a != adapter_name]
            if not active:
                active = self._all_available_adapter_names()[:1]
                if active:
                    warnings.warn(
                        f"Adapter {adapter_name} was active which is now deleted. Setting active "
                        f"adapter to {active[0]}.",
                        stacklevel=2,
                    )
            self.set_adapter(active)


def get_model_config(model: nn.Module) -> dict[str, Any]:
    """``model.config`` as a dict; ``{"model_type": "custom"}`` when there is none."""
    config = getattr(model, "config", DUMMY_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config if isinstance(config, dict) else DUMMY_MODEL_CONFIG
