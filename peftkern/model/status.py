"""The status of a model's adapters: enabled, active, merged, trainable, and their devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer, adapter_modules
from ..tuners.base_tuner import BaseTuner
from ..utils.module_tree import own_parameters
from ..utils.quantization_utils import resolve_quantization_backend

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The status of one adapter layer.

    Attributes:
        name: the layer's name in the model.
        module_type: its class, like ``lora.Linear``.
        enabled: False when the adapters are switched off.
        active_adapters: names of the active adapters.
        merged_adapters: names of the adapters that are merged into the base weight.
        requires_grad: {adapter: True if its weights train, "irregular" if only some do}.
        available_adapters: names of all adapters of the layer.
        devices: {adapter: kinds of devices ("cpu", "cuda") of its weights}.
        quantization_backend: the way the base weight is quantised; None when it is not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The status of a whole model, like :class:`TunerLayerStatus`; "irregular" if layers differ.

    Attributes:
        base_model_type: class of the model that was adapted.
        adapter_model_type: class of the tuner; "None" for a model with injected layers.
        peft_types: {adapter: method}.
        trainable_params: number of parameters that train.
        total_params: number of all parameters.
        num_adapter_layers: number of adapter layers.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None | Irregular


def _common(values: Iterable[Any]) -> Any:
    """The value if all ``values`` are equal, else "irregular"."""
    found = list(values)
    return found[0] if all(v == found[0] for v in found) else "irregular"


def _tuner_or_model(model: Any, caller: str) -> tuple[nn.Module, bool]:
    """(the module to search for adapter layers, True if it is the tuner of a PeftModel)."""
    if not isinstance(model, AdapterStatus):  # not a PeftModel
        return model, False
    tuner: Any = model.base_model
    if not isinstance(tuner, BaseTuner):
        raise TypeError(
            f"{caller}() got an invalid PeftModel instance; prefix tuning and adaption prompt are "
            "not supported."
        )
    return tuner, True


def _tensors_by_adapter(module: Any, names: Iterable[str]) -> dict[str, list[Tensor]]:
    """{adapter: its tensors in a layer}, from the attributes ``names``."""
    found: dict[str, list[Tensor]] = {}
    for attribute in names:
        store: Any = module
        for part in attribute.split("."):
            store = getattr(store, part)
        if not isinstance(store, nn.Module):
            continue
        for name, held in store.items():  # type: ignore[operator]
            tensors = [held] if isinstance(held, Tensor) else list(own_parameters(held))
            found.setdefault(name, []).extend(tensors)
    return found


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer and of each module that trains in full or by token.

    Args:
        model: a PeftModel, or any module with adapter layers in it.

    Raises:
        ValueError: the model has no adapter layers.
        TypeError: the adapters are prompts, which have no layers.
    """
    within, _ = _tuner_or_model(model, "get_layer_status")
    wanted = {id(m) for m in adapter_modules(within)}
    found = []
    for name, module in within.named_modules():
        if id(module) not in wanted:
            continue
        layer: Any = module
        if isinstance(module._modules.get("token_adapter"), BaseTunerLayer):
            continue  # a wrapper, whose adapter layer is listed for both
        trained = _tensors_by_adapter(layer, layer.adapter_layer_names)
        held = _tensors_by_adapter(layer, layer.adapter_layer_names + layer.other_param_names)
        backend = getattr(layer, "quantization_backend", None)
        if backend is None and isinstance(layer, BaseTunerLayer):
            backend = resolve_quantization_backend(layer.get_base_layer())
        found.append(
            TunerLayerStatus(
                name=name,
                module_type=repr(layer).partition("(")[0],
                enabled=not layer.disable_adapters,
                active_adapters=layer.active_adapters,
                merged_adapters=list(layer.merged_adapters),
                requires_grad={
                    key: _common(t.requires_grad for t in tensors)
                    for key, tensors in trained.items()
                    if tensors
                },
                available_adapters=sorted(layer._get_available_adapters()),
                devices={
                    key: sorted({t.device.type for t in tensors}) for key, tensors in held.items()
                },
                quantization_backend=getattr(backend, "backend_name", None),
            )
        )
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that "
            "you have PEFT adapters injected in the model."
        )
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of all adapters of a model; arguments and errors as :func:`get_layer_status`."""
    from transformers import PreTrainedModel

    within, wrapped = _tuner_or_model(model, "get_model_status")
    layers = get_layer_status(model)
    tuner: Any = within
    trainable, total = trainable_parameters(model)
    base = tuner.model if wrapped else model
    named = wrapped or isinstance(model, PreTrainedModel)
    merged = {name for layer in layers for name in layer.merged_adapters}
    somewhere_not = any(
        merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers
    )
    grads: dict[str, list[Any]] = {}
    devices: dict[str, set[str]] = {}
    for layer in layers:
        for name, value in layer.requires_grad.items():
            grads.setdefault(name, []).append(value)
        for name, kinds in layer.devices.items():
            devices.setdefault(name, set()).update(kinds)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if named else "other",
        adapter_model_type=type(tuner).__name__ if wrapped else "None",
        peft_types={
            name: getattr(config.peft_type, "value", str(config.peft_type))
            for name, config in (tuner.peft_config.items() if wrapped else ())
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(list(layer.active_adapters) for layer in layers),
        merged_adapters="irregular" if somewhere_not else sorted(merged),
        requires_grad={name: _common(values) for name, values in grads.items()},
        available_adapters=sorted({n for layer in layers for n in layer.available_adapters}),
        devices={name: sorted(kinds) for name, kinds in devices.items()},
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(number of trainable parameters, of all); a byte of packed 4-bit weights counts as two."""
    trainable = total = 0
    for parameter in model.parameters():
        # a parameter that DeepSpeed has sharded is empty here
        count = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            storage = getattr(parameter, "quant_storage", None)
            count *= 2 * (storage.itemsize if storage is not None else parameter.element_size())
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


class AdapterStatus:
    """The mixin of :class:`PeftModel` for its status and numbers of parameters."""

    base_model: Any

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of each adapter layer, see :func:`peftkern.get_layer_status`."""
        assert isinstance(self, nn.Module)
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of the whole model, see :func:`peftkern.get_model_status`."""
        assert isinstance(self, nn.Module)
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(number of trainable parameters, of all), see :func:`trainable_parameters`."""
        assert isinstance(self, nn.Module)
        return trainable_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        )
