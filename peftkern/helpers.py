"""Small functions on a model with adapters, at HF PEFT's address."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from .condition_numbers import KappaTuneSelector, find_kappa_target_modules
from .configs.base import PeftConfig
from .tuners.base_layer import BaseTunerLayer, adapter_modules
from .tuners.lora import LoraLayer
from .tuners.lora.dora import DoraCaching
from .tuners.lora.monteclora import MontecloraTrainerMixin

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def _take_signature(model: Any, method: str, bare: tuple[tuple[str, ...], ...]) -> None:
    """Give ``model.method`` the base model's annotations and documentation.

    Only if its own arguments are among ``bare``.
    """
    own = getattr(model, method)
    if tuple(inspect.signature(own).parameters) not in bare:
        return
    was = own.__func__
    copied = FunctionType(
        was.__code__, was.__globals__, was.__name__, was.__defaults__, was.__closure__
    )
    copied.__kwdefaults__ = was.__kwdefaults__
    functools.update_wrapper(
        copied,
        getattr(type(model.get_base_model()), method),
        assigned=("__doc__", "__name__", "__annotations__"),
    )
    setattr(model, method, MethodType(copied, model))


def update_forward_signature(model: Any) -> None:
    """Give ``model.forward`` of a PeftModel without a task the base model's signature."""
    _take_signature(model, "forward", (("args", "kwargs"),))


def update_generate_signature(model: Any) -> None:
    """Give ``model.generate`` of a PeftModel the base model's signature, if that has a generate."""
    if hasattr(model, "generate"):
        _take_signature(model, "generate", (("args", "kwargs"), ("kwargs",)))


def update_signature(model: Any, method: str = "all") -> None:
    """Call :func:`update_forward_signature`, :func:`update_generate_signature` or both.

    Args:
        model: a PeftModel.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: another ``method``.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """True when a folder, or a repository on the hub, has a readable adapter configuration."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # any error of the hub or of a damaged file
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A context in which every LoRA layer's scaling is multiplied by ``multiplier``.

    A number between 0 and 1 interpolates between the base model and the adapted one (wise-ft,
    Wortsman et al., 2022, arXiv 2109.01903).

    Args:
        model: a model with LoRA layers, wrapped or not.
        multiplier: a number.

    Raises:
        TypeError: ``multiplier`` is not a number.
        ValueError: the model has no LoRA layers.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in adapter_modules(model) if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [(layer, layer.scaling) for layer in layers]
    for layer, scaling in before:
        layer.scaling = {name: value * multiplier for name, value in scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A context in which adapter layers do not cast their inputs to their weights' dtype.

    For hooks that cast the weights instead (layer-wise casting, as in diffusers). With
    ``active=False`` nothing changes.
    """
    layers = [m for m in adapter_modules(model) if isinstance(m, BaseTunerLayer)] if active else []
    before = [(layer, layer.cast_input_dtype_enabled) for layer in layers]
    for layer, _ in before:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled
