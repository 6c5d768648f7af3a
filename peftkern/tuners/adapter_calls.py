"""Functions on the adapters of any model with adapter layers, inside a PeftModel or not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base_layer import BaseTunerLayer, adapter_modules
from .modules_to_save import AuxiliaryTrainingWrapper, _set_adapter

BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Make one adapter or several active in every layer of ``model``.

    Args:
        model: with adapter layers in it.
        adapter_name: one name or several. A module of ``modules_to_save`` uses the one of them for
            which it has a copy.
        inference_mode: freeze the parameters of the adapters that become active.
        layer_cls: which adapter layers are meant.

    Raises:
        ValueError: a module that is trained in full has several of the adapters. Nothing is
            changed then.
    """
    found = list(adapter_modules(model))
    if any(isinstance(m, AuxiliaryTrainingWrapper) for m in found):
        _set_adapter(model, adapter_name, inference_mode)
    for module in found:
        if isinstance(module, layer_cls):
            if module.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.",
                    stacklevel=3,
                )
                module.unmerge()
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> list[str] | None:
    """Remove an adapter from every layer of ``model``; its configuration is left to the caller.

    Args:
        model: with adapter layers in it.
        adapter_name: the adapter.
        prefix: HF PEFT's prefix of the method ("lora_"); not used here.
        layer_cls: which adapter layers are meant.

    Returns:
        Names of the adapters that are active now; None when the model has no such layer.

    Raises:
        ValueError: the adapter is merged into a base weight.
    """
    found = list(adapter_modules(model))
    layers = [m for m in found if isinstance(m, layer_cls)]
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them "
            "first."
        )
    active = layers[0].active_adapters if layers else []
    was_active = adapter_name in active
    left = [name for name in active if name != adapter_name]
    for module in found:  # a wrapper can use only one adapter: checked before anything changes
        if len(left) > 1 and isinstance(module, AuxiliaryTrainingWrapper):
            if adapter_name in module._get_available_adapters():
                raise ValueError(
                    f"Attempted to set multiple ({left}) adapters at once for "
                    f"{type(module).__name__}, which is not allowed."
                )
    new = left
    if was_active and not left:  # activate the first other adapter of the first layer with one
        held = (layer._all_available_adapter_names() for layer in layers)
        rest = ([name for name in names if name != adapter_name] for names in held)
        new = next((names[:1] for names in rest if names), [])
        if new:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter "
                f"to {new[0]}.",
                stacklevel=4,
            )
    for layer in layers:
        if adapter_name in layer.active_adapters:
            layer.set_adapter(new)  # all layers use the same adapters, even those they do not have
        layer.delete_adapter(adapter_name)
    for module in found:
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        module.delete_adapter(adapter_name, new_active_adapters=new)
        # a module without the deleted adapter may have a copy for one that is active now
        use = [name for name in new if name in module._get_available_adapters()]
        if was_active and use != list(module.active_adapters):
            module.set_adapter(use)
    return new if layers else None


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Let the parameters of these adapters train, or freeze them; the rest stays as it is."""
    for module in adapter_modules(model):
        module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(
    model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """Replace an adapter's float16, bfloat16 and float8 weights by float32 ones."""
    if not autocast_adapter_dtype:
        return
    for layer in adapter_modules(model):
        if not isinstance(layer, BaseTunerLayer):
            continue
        for store in layer._stores():
            if adapter_name not in store:
                continue
            held = store[adapter_name]
            if isinstance(held, torch.Tensor):
                if held.is_floating_point() and held.dtype.itemsize < 4:
                    wide = held.detach().float()
                    is_param = isinstance(held, nn.Parameter)
                    store[adapter_name] = (
                        nn.Parameter(wide, requires_grad=held.requires_grad) if is_param else wide
                    )
                continue
            for owner in held.modules():
                for name, p in owner._parameters.items():
                    if p is not None and p.is_floating_point() and p.dtype.itemsize < 4:
                        owner._parameters[name] = nn.Parameter(
                            p.detach().float(), requires_grad=p.requires_grad
                        )


def check_adapters_to_merge(
    module: BaseTunerLayer, adapter_names: list[str] | str | None = None
) -> list[str]:
    """The names among ``adapter_names`` (None: the active ones) not yet merged into this layer.

    Raises:
        TypeError: a string in place of a list.
    """
    if adapter_names is None:
        adapter_names = module.active_adapters
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    if not module.merged:
        return adapter_names
    rest = [n for n in adapter_names if n not in module.merged_adapters]
    warnings.warn(
        f"Already following adapters were merged {','.join(module.merged_adapters)}. You are now "
        f"additionally merging {','.join(rest)}."
        if rest
        else "All adapters are already merged, nothing to do.",
        stacklevel=3,
    )
    return rest


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A deep copy of a module; with ``share_weights`` it holds the original's own parameters."""
    memo = {id(p): p for p in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, memo)


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of a module in ``model``; "" when the model does not contain it."""
    return next((n for n, m in model.named_modules() if m is reference_module), "")


def get_device_map(model: Any) -> dict[str, Any]:
    """accelerate's device map of the model, or {"": device} where it is on one device."""
    if hasattr(model, "hf_device_map"):
        return model.hf_device_map
    return {"": next(model.parameters()).device}
