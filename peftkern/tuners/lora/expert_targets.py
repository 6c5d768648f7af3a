"""The parameters of a mixture's experts: ``target_parameters="all-experts"``, and hints to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ...configs.lora import LoraConfig
from ...ops.bases.experts import reader_of
from ...utils.constants import ALL_EXPERTS_SHORTHAND
from .experts import form_of, parameters_of
from .parameter_targets import Target, check_layout, holders, matches

logger = logging.getLogger("peftkern")


class Experts(NamedTuple):
    """Parameters of experts in a model.

    ``inside``: those of modules that transformers' interface for experts may run; ``outside``:
    other parameters of three dimensions in modules named after experts; ``all_keys``: the names of
    all parameters of the model.
    """

    inside: list[Target]
    outside: list[Target]
    all_keys: list[str]


def find_experts(model: nn.Module) -> Experts:
    """The parameters of a mixture's experts, in the model's order."""
    inside, outside, keys = [], [], []
    for name, module in holders(model):
        ours = form_of(type(module)) is not None or reader_of(module) is not None
        named = ours or "expert" in f"{name}.{type(module).__name__}".lower()
        named &= not type(module).__module__.startswith("torch.nn")  # a convolution, for example
        for parameter, value in module._parameters.items():
            key = f"{name}.{parameter}" if name else parameter
            keys.append(key)
            if not named or value is None or len(getattr(value, "ds_shape", value.shape)) != 3:
                continue
            target = Target(name, parameter, key)
            if ours and parameter in parameters_of(module):
                inside.append(target)
            else:
                outside.append(target)
    return Experts(inside, outside, keys)


def short_names(targets: Sequence[Target], all_keys: Sequence[str]) -> list[str]:
    """Names for ``target_parameters`` that match these parameters and no others, sorted.

    They begin after the number of a layer, as in "mlp.experts.down_proj". Where that would match
    another parameter too, full names are used.
    """
    wanted = {target.key for target in targets}
    ends: dict[str, set[str]] = {}
    for key in wanted:
        parts = key.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        ends.setdefault(".".join(parts[last + 1 :]), set()).add(key)
    found: set[str] = set()
    for end, keys in ends.items():
        matched = {k for k in all_keys if k == end or k.endswith(f".{end}")}
        found |= {end} if matched <= wanted else keys
    return sorted(found)


def resolve_experts(
    config: LoraConfig, model: nn.Module, others: Sequence[tuple[str, Any]]
) -> None:
    """Replace "all-experts" in ``config.target_parameters`` by names, in place.

    Args:
        config: the new adapter's configuration.
        model: the base model; it is not changed.
        others: (name, configuration) of the adapters that the model has. The names of one that
            adapts the same parameters are taken, as those of all adapters have to be equal.

    Raises:
        ValueError: the model has no module of transformers' interface for experts, or one whose
            weights are in a layout of other kernels.
    """
    if config.target_parameters != ALL_EXPERTS_SHORTHAND:
        return
    for name, module in holders(model):
        check_layout(name, module)
    inside, outside, keys = find_experts(model)
    left_out = f"{short_names(outside, keys)} of {_classes(model, outside)}" if outside else ""
    if not inside:
        raise ValueError(
            f"`target_parameters={ALL_EXPERTS_SHORTHAND!r}` needs a mixture of experts, and no "
            f"module of {type(model).__name__} is of transformers' interface for experts."
            + (f" It has {left_out}, which a list of names can target." if left_out else "")
        )
    if left_out:
        logger.warning(
            "target_parameters='all-experts' leaves out %s, not of transformers' interface for "
            "experts: name them in a list to adapt them too.",
            left_out,
        )
    wanted = {target.key for target in inside}
    for _, other in others:
        theirs = getattr(other, "target_parameters", None) or ()
        if {target.key for target in matches(model, sorted(theirs))} == wanted:
            config.target_parameters = sorted(theirs)
            return
    config.target_parameters = short_names(inside, keys)


def _classes(model: nn.Module, targets: Sequence[Target]) -> str:
    kinds = {type(_base(model, target)).__name__ for target in targets}
    return ", ".join(sorted(kinds))


def _base(model: nn.Module, target: Target) -> Any:
    module: Any = model.get_submodule(target.module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def setting_for(experts: Experts) -> str:
    """The setting that adapts all experts of a model, as text; empty for a model without any."""
    inside, outside, keys = experts
    names = short_names([*inside, *outside], keys)
    short = "" if outside else f" (or {ALL_EXPERTS_SHORTHAND!r})"
    return f"target_parameters={names}{short}" if names else ""


def note_experts_left_out(
    config: LoraConfig,
    model: nn.Module,
    others: Sequence[tuple[str, Any]],
    adapted: Sequence[Target],
) -> None:
    """Log one line when a mixture's experts get no adapter: the setting that would adapt them.

    Silent for a further adapter of the model, one that is loaded to be used, one that adapts a
    parameter of any experts, and one whose ``target_parameters`` match nothing, of which a warning
    has told.

    Args:
        config: the new adapter's configuration, resolved.
        model: the base model.
        others: (name, configuration) of the adapters that the model has.
        adapted: the parameters that the new adapter adapts.
    """
    if others or config.inference_mode or (config.target_parameters and not adapted):
        return
    experts = find_experts(model)
    setting = setting_for(experts)
    if not setting or not set(experts.inside + experts.outside).isdisjoint(adapted):
        return
    logger.warning(
        "The experts of %s get no adapter, as they are parameters and not linear layers. To adapt "
        "them: LoraConfig(..., %s).",
        type(model).__name__,
        setting,
    )
