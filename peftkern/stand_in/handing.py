"""Hands what is of another method to HF PEFT: calls with its objects, and files of its adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..auto import AutoPeftModel
from ..configs.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfigMixin
from ..files.hub import locate_file, split_hub_kwargs
from ..model.base import PeftModel
from ..utils.constants import CONFIG_NAME
from .real import is_theirs, real

# functions that take configurations, or models with adapters, of any method
_FUNCTIONS = {
    "add_weighted_adapter",
    "cast_adapter_dtype",
    "delete_adapter",
    "disable_input_dtype_casting",
    "fsdp_auto_wrap_policy",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "onload_layer",
    "rescale_adapter_scale",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
}


@functools.cache
def _handing(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(is_theirs, (*args, *kwargs.values()))):
            return _theirs(name)(*args, **kwargs)
        return ours(*args, **kwargs)

    return call


def _theirs(name: str) -> Any:
    for module in ("peft", "peft.functional", "peft.helpers", "peft.utils.other"):
        found = getattr(real(module), name, None)
        if found is not None:
            return found
    return getattr(real("peft.tuners.tuners_utils"), name)


def handed(name: str, value: Any) -> Any:
    """``value``, or a function that hands calls with HF PEFT's objects to HF PEFT."""
    if name == "get_peft_config":
        return _get_peft_config(value)
    return _handing(name, value) if name in _FUNCTIONS else value


@functools.cache
def _get_peft_config(ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def get_peft_config(config_dict: dict[str, Any]) -> Any:
        if _is_other_method(config_dict.get("peft_type")):
            return real().get_peft_config(config_dict)
        return ours(config_dict)

    return get_peft_config


def _is_other_method(peft_type: Any) -> bool:
    """True for a method that HF PEFT has and peftkern has not."""
    if not peft_type or peft_type in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        return False
    return real() is not None and peft_type in list(real("peft.utils").PeftType)


def hand_on_files() -> None:
    """Let ``from_pretrained`` of configurations and models read HF PEFT's other methods."""
    for cls, reader in (
        (PeftConfigMixin, _read_config),
        (PeftModel, _read_model),
        (AutoPeftModel, _read_auto),
    ):
        # the class that defines it, so that the task classes have it too
        owner: Any = next(base for base in cls.__mro__ if "from_pretrained" in vars(base))
        owner.from_pretrained = classmethod(reader(vars(owner)["from_pretrained"].__func__))


def _read_config(ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def from_pretrained(cls: Any, where: Any, subfolder: Any = None, **kwargs: Any) -> Any:
        kwargs["subfolder"] = subfolder
        if _is_other_method(_method_in(where, kwargs)):
            return real().PeftConfig.from_pretrained(where, **kwargs)
        return ours(cls, where, **kwargs)

    return from_pretrained


def _read_model(ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def from_pretrained(cls: Any, model: Any, where: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config") or (args[2] if len(args) > 2 else None)
        if is_theirs(config) or config is None and _is_other_method(_method_in(where, kwargs)):
            return getattr(real(), cls.__name__).from_pretrained(model, where, *args, **kwargs)
        return ours(cls, model, where, *args, **kwargs)

    return from_pretrained


def _read_auto(ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(ours)
    def from_pretrained(cls: Any, where: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_other_method(_method_in(where, kwargs)):
            return getattr(real(), cls.__name__).from_pretrained(where, *args, **kwargs)
        return ours(cls, where, *args, **kwargs)

    return from_pretrained


def _method_in(where: Any, kwargs: dict[str, Any]) -> Any:
    """``peft_type`` of the configuration at ``where``; None if there is none that can be read."""
    hub, _ = split_hub_kwargs(kwargs)
    try:
        file = locate_file(where, CONFIG_NAME, **hub)
        return PeftConfigMixin.from_json_file(file).get("peft_type") if file else None
    except (ValueError, OSError):
        return None  # peftkern meets it again, and its error is the better one
