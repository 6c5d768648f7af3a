"""What every adapter layer and every tuner has, whatever its method."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig
from ..utils.other import AuxiliaryTrainingWrapper, set_layer_requires_grad

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


def as_names(adapter_names: str | Sequence[str]) -> list[str]:
    """One name or several, as a list."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


class BaseTunerLayer:
    """Mixed into an ``nn.Module`` that wraps ``base_layer`` and holds adapters by name."""

    # attributes that hold {adapter name: module or parameter}
    adapter_layer_names: tuple[str, ...] = ()
    # attributes that hold {adapter name: plain value}
    other_param_names: tuple[str, ...] = ()

    base_layer: nn.Module
    merged_adapters: list[str]
    _disable_adapters: bool
    _active_adapter: str | list[str]

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer, through any nesting."""
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

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the base weight."""
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

    def _get_available_adapters(self) -> set[str]:
        return {key for store in self._stores() for key in store.keys()}

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
        """Make these the active adapters; they train unless ``inference_mode``,
        the others do not."""
        names = as_names(adapter_names)
        for store in self._stores():
            for key, layer in store.items():
                set_layer_requires_grad(layer, key in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let the parameters of these adapters train, or freeze them;
        the others stay as they are."""
        names = as_names(adapter_names)
        for store in self._stores():
            for key, layer in store.items():
                if key in names:
                    set_layer_requires_grad(layer, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter; another one becomes active when it was the only active one."""
        if adapter_name not in self._get_available_adapters():
            return
        for name in self.adapter_layer_names + self.other_param_names:
            store = getattr(self, name)
            if adapter_name in store:
                del store[adapter_name]
        active = self.active_adapters
        if adapter_name in active:
            active = [a for a in active if a != adapter_name]
            if not active:
                rest = sorted(self._get_available_adapters())
                active = rest[:1]
                if active:
                    warnings.warn(
                        f"Adapter {adapter_name} was active which is now deleted. Setting active "
                        f"adapter to {active[0]}.",
                        stacklevel=2,
                    )
            if active:
                self.set_adapter(active)
            else:
                self._active_adapter = []


def get_model_config(model: nn.Module) -> dict[str, Any]:
    """``model.config`` as a dict; ``{"model_type": "custom"}`` when there is none."""
    config = getattr(model, "config", DUMMY_MODEL_CONFIG)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return config if isinstance(config, dict) else DUMMY_MODEL_CONFIG


class BaseTuner(nn.Module):
    """Holds the adapted model as ``self.model`` and its configurations by adapter name.

    A subclass says how a module gets its adapter layer (:meth:`inject_adapter`).
    """

    prefix: str = ""
    tuner_layer_cls: type = BaseTunerLayer

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, low_cpu_mem_usage: bool = False
    ):
        super().__init__()
        self.model = model
        # a model that was wrapped before brings its adapters along
        before = getattr(model, "peft_config", None)
        known = isinstance(before, dict) and all(isinstance(c, PeftConfig) for c in before.values())
        self.peft_config: dict[str, PeftConfig] = dict(before) if known else {}  # type: ignore[arg-type]
        self.peft_config.update(
            peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        )
        self.active_adapter: str | list[str] = adapter_name
        self.targeted_module_names: list[str] = []
        self.inject_adapter(self.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        # transformers asks the model itself for its adapters' configurations
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    @property
    def active_adapters(self) -> list[str]:
        return as_names(self.active_adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not built yet
                raise
            return getattr(self.model, name)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False
    ) -> None:
        """Put the adapter ``adapter_name`` of ``self.peft_config`` into ``model``, in place."""
        raise NotImplementedError

    def adapter_layers(self) -> Iterator[Any]:
        """Every adapter layer and every fully trained module of the model."""
        for module in self.model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                yield module

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter or several active; they train unless ``inference_mode``."""
        names = as_names(adapter_name)
        for module in self.adapter_layers():
            module.set_adapter(
                [n for n in names if n in module._get_available_adapters()]
                if isinstance(module, AuxiliaryTrainingWrapper)
                else names,
                inference_mode=inference_mode,
            )
        self.active_adapter = adapter_name

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for module in self.adapter_layers():
            module.set_requires_grad(adapter_names, requires_grad)

    def _warn_trained_biases(self) -> None:
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does "
                    "not produce the same output as the base model would without adaption.",
                    stacklevel=3,
                )

    def disable_adapter_layers(self) -> None:
        """Switch every adapter off, in place."""
        self._warn_trained_biases()
        for module in self.adapter_layers():
            module.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        """Switch the active adapters on again, in place."""
        for module in self.adapter_layers():
            module.enable_adapters(True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from every layer. ValueError when there is none of that name."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        rest = [n for n in self.active_adapters if n != adapter_name]
        if not rest:
            rest = list(self.peft_config)[:1]
        for module in self.adapter_layers():
            module.delete_adapter(adapter_name)
        if adapter_name in self.active_adapters:
            self.active_adapter = rest
            if rest:
                self.set_adapter(rest)
