"""``BaseTuner``: the attributes and methods that tuners of every method share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..configs.base import PeftConfig
from ..utils.undo import unchanged_on_error
from .adapter_calls import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from .base_layer import BaseTunerLayer, adapter_modules, as_names, get_model_config


class BaseTuner(nn.Module):
    """Holds the adapted model as ``self.model`` and its configurations by adapter name.

    A subclass says how a module gets its adapter layer (:meth:`inject_adapter`).

    Attributes:
        targeted_module_names: names of the modules that were adapted.
        targeted_parameter_names: names of the parameters that were adapted.
    """

    # True for methods whose layers share weights that the tuner holds; no method here does
    uses_shared_state: bool = False
    prefix: str = ""
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    target_module_mapping: dict[str, Any] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        training: bool = True,
    ):
        super().__init__()
        self.training = training  # new layers get this mode, whatever the model's mode is
        self.model = model
        # a model that was adapted before already holds its adapters' configurations
        before = getattr(model, "peft_config", None)
        known = isinstance(before, dict) and all(isinstance(c, PeftConfig) for c in before.values())
        self.peft_config: dict[str, PeftConfig] = before if known else {}  # type: ignore[assignment]
        if known:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having "
                "multiple adapters in the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        was = dict(self.peft_config)
        self.peft_config.update(
            peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        )
        self.active_adapter: str | list[str] = adapter_name
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        try:
            # with adapters in the model already, an error must also restore their state, which the
            # new adapter's name does not identify
            with unchanged_on_error(
                model, when=known or next(self.adapter_layers(), None) is not None
            ):
                self.inject_adapter(
                    self.model,
                    adapter_name,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        except BaseException:
            self.peft_config.clear()
            self.peft_config.update(was)
            raise
        # transformers asks the model itself for its adapters' configurations
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    get_model_config = staticmethod(get_model_config)

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
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put the adapter ``adapter_name`` of ``self.peft_config`` into ``model``, in place.

        Args:
            model: the model.
            adapter_name: which configuration.
            autocast_adapter_dtype: not looked at, as in HF PEFT: the weights are made in the dtype
                that the tuner was told when it was built.
            low_cpu_mem_usage: make the weights on the meta device.
            state_dict: adapt the modules that have tensors in here, whatever ``target_modules``
                says. Only its names are read.
        """
        raise NotImplementedError

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        from .targets import check_target_module_exists

        return check_target_module_exists(peft_config, key)

    def adapter_layers(self) -> Iterator[Any]:
        """Every adapter layer and every module of ``modules_to_save``, in the model's order."""
        return adapter_modules(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter or several active; they train unless ``inference_mode``."""
        set_adapter(self.model, adapter_name, inference_mode, self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Let the parameters of these adapters train, or freeze them."""
        set_requires_grad(self.model, adapter_names, requires_grad)

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
        """Remove an adapter from every layer; another becomes active when it was the only one.

        Raises:
            ValueError: there is none of that name, or it is merged into the base weights.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        new = delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
        del self.peft_config[adapter_name]
        self.active_adapter = new or []

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True when every layer's update can be written as one of plain LoRA."""
        layers = [m for m in self.adapter_layers() if isinstance(m, BaseTunerLayer)]
        return all(layer.supports_lora_conversion(adapter_name) for layer in layers)
