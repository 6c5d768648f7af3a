"""``LoraConfig.target_parameters``: finding the parameters, and wrapping their modules."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...configs.lora import LoraConfig
from ...ops.bases.experts import reader_of as experts_reader
from ...ops.bases.formats import reader_of
from ...utils.module_tree import get_submodules
from ...utils.places import further_names, replace
from ...utils.tied import plain_name
from ..base_layer import BaseTunerLayer
from ..modules_to_save import AuxiliaryTrainingWrapper
from .parameter import ParamWrapper

# the parameter `name` of the module named `module`; `key` is the full name, without wrappers
Target = namedtuple("Target", ["module", "name", "key"])


def wrapper_of(module: Any, parameter: str) -> ParamWrapper | None:
    """The wrapper of this parameter among a module's nested wrappers, or None."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter:
            return module
        module = module.base_layer
    return None


def find_parameters(
    config: LoraConfig, model: nn.Module, others: Sequence[tuple[str, Any]], adapted: Sequence[str]
) -> list[Target]:
    """The parameters that the configuration names, in the order in which they are wrapped.

    Args:
        config: its ``target_parameters`` are full names, or ends of names that start at a dot.
        model: the base model; it is not changed.
        others: (name, configuration) of the adapters that the model has.
        adapted: names of modules that get an adapter layer from the same configuration.

    Raises:
        ValueError: a setting that parameters do not support; a parameter of the model itself, of
            an adapter layer, or without 2 or 3 dimensions; another adapter with other
            ``target_parameters``.

    Names that match no parameter are not refused, as in HF PEFT: :func:`unmatched` finds them.
    """
    wanted = sorted(set(config.target_parameters or ()))
    if not wanted:
        return []
    for name, other in others:
        have = set(getattr(other, "target_parameters", None) or ())
        if have and have != set(wanted):
            raise ValueError(
                "When using multiple adapters with `target_parameters`, all adapters must target "
                f"the same set of parameters, but got {wanted} for the new adapter and "
                f"{sorted(have)} for adapter '{name}'."
            )
    found = matches(model, wanted)
    if found:
        ParamWrapper.check_config(config)
    for target in found:
        _check(model, target, adapted, config)
    return found


def matches(model: nn.Module, wanted: Sequence[str]) -> list[Target]:
    """The parameters with these names, or with names that end with a dot and one of these."""
    return list(_matches(model, wanted))


def unmatched(model: nn.Module, wanted: Sequence[str], found: Sequence[Target]) -> list[str]:
    """The names among ``wanted`` that none of the parameters ``found`` has, sorted."""
    aliases = further_names(model)
    keys = {target.key for target in found}
    for target in found:
        further = aliases.get(id(model.get_submodule(target.module)), ())
        keys |= {f"{plain_name(name)}.{target.name}" for name in further}
    return sorted(n for n in wanted if n not in keys and not any(k.endswith(f".{n}") for k in keys))


def _matches(model: nn.Module, wanted: Sequence[str]) -> Iterator[Target]:
    ends = tuple(f".{name}" for name in wanted)
    aliases = further_names(model)
    for module_name, module in holders(model):
        if hasattr(module, "parametrizations"):
            # a parametrized attribute is no parameter of that name any more
            for key in wanted:
                owner, _, parameter = key.rpartition(".")
                if owner == module_name and getattr(module, parameter, None) is not None:
                    yield Target(module_name, parameter, key)
            continue
        check_layout(module_name, module, wanted)
        for parameter in module._parameters:
            key = f"{module_name}.{parameter}" if module_name else parameter
            names = [f"{plain_name(n)}.{parameter}" for n in aliases.get(id(module), ())]
            if any(name in wanted or name.endswith(ends) for name in (key, *names)):
                yield Target(module_name, parameter, key)


def check_layout(name: str, module: Any, wanted: Sequence[str] | None = None) -> None:
    """Refuse experts whose weights their owner keeps in a form that cannot be adapted.

    Args:
        name, module: the experts, or any other module.
        wanted: names of parameters that are asked for; None: all of the module's.

    Raises:
        ValueError: a wanted parameter is one of them.
    """
    reader = experts_reader(module)
    reason = (
        None
        if reader is None or not hasattr(reader, "other_layout")
        else reader.other_layout(module)
    )
    if reason is None:
        return
    keys = [f"{name}.{parameter}" for parameter in reader.SCALES]
    if wanted is None or any(key == w or key.endswith(f".{w}") for key in keys for w in wanted):
        raise ValueError(f"`target_parameters` names `{name}`, a {type(module).__name__}: {reason}")


def holders(module: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, module) of modules with parameters, without those of adapters.

    A module that an adapter layer wraps has the adapter layer's name.
    """
    seen = set() if seen is None else seen
    if id(module) in seen or isinstance(module, AuxiliaryTrainingWrapper):
        return
    seen.add(id(module))
    while isinstance(module, BaseTunerLayer):
        module = module.base_layer
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None and child_name != "parametrizations":
            yield from holders(child, f"{name}.{child_name}" if name else child_name, seen)


def _check(model: nn.Module, target: Target, adapted: Sequence[str], config: LoraConfig) -> None:
    if not target.module:
        raise ValueError(
            "Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"'{target.name}'). "
        )
    _, module, _ = get_submodules(model, target.module)
    is_adapter = isinstance(module, BaseTunerLayer) and not isinstance(module, ParamWrapper)
    if is_adapter or target.module in adapted:
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        raise ValueError(
            f"Trying to wrap an `nn.Parameter` of layer '{target.module}' of type "
            f"{type(base).__name__}, which is not a valid target. Make sure that this layer is not "
            "also targeted with `target_modules`. For some models, PEFT will do this "
            "automatically, try setting `target_modules=[]` to prevent it."
        )
    holder: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if reader_of(holder) is not None and target.name == "weight":
        raise ValueError(
            f"`target_parameters` names '{target.key}', the quantised weight of a "
            f"{type(holder).__name__}, to which nothing can be added; name the layer in "
            "`target_modules` instead"
        )
    wrapper = wrapper_of(module, target.name)
    if wrapper is None:
        try:
            wrapper = ParamWrapper(module, target.name)  # raises for one that it cannot adapt
        except ValueError as exc:
            shape = tuple(getattr(holder, target.name).shape)
            raise ValueError(
                f"{exc} `target_parameters` names '{target.key}', of shape {shape}."
            ) from None
    wrapper.check_here(config)


def wrap_parameter(model: nn.Module, target: Target, active: list[str]) -> ParamWrapper:
    """The wrapper of the target; it is made around the module in its place if there is none yet."""
    _, module, _ = get_submodules(model, target.module)
    wrapper = wrapper_of(module, target.name)
    if wrapper is None:
        wrapper = ParamWrapper(module, target.name)
        wrapper._active_adapter = active
        replace(model, module, wrapper)
    return wrapper
