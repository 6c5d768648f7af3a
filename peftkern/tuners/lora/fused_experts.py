"""Adapters made under transformers 4 for mixtures of experts, whose linear layers transformers 5
fuses into parameters: what the configuration targets, and what the weights become.

There, every expert had ``w1``, ``w3`` and ``w2`` (or ``gate_proj``, ``up_proj`` and ``down_proj``);
here all experts' share ``gate_up_proj`` [E, 2·I, D] and ``down_proj`` [E, D, I].
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from ...configs.lora import LoraConfig
from ...utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from ...utils.experts import fuse_experts
from ..targets import TargetMatcher, all_linear
from .expert_families import fused_names
from .parameter import ParamWrapper

# -------------------------------------------------------------------- the configuration


def convert_config(config: LoraConfig, model: Any, names: dict[str, str]) -> None:
    """Move fused layers from ``target_modules`` to ``target_parameters``, in place; twice is once.

    A parameter that stands for two layers gets twice their rank and alpha, so that each keeps its
    own update and scaling.

    Args:
        config: of the new adapter.
        model: the base model.
        names: :func:`fused_names` of it.

    Raises:
        ValueError: one of two layers that are one parameter now is targeted without the other.
    """
    targets = config.target_modules
    if targets is None:
        return
    if isinstance(targets, str):
        targets = _resolved(config, model, names)
        if not targets:
            return  # the pattern matches nothing, which is the usual error
    rest, parameters = set(), set(config.target_parameters or ())
    parts: dict[str, set[str]] = defaultdict(set)
    here = {name for name, _ in model.named_parameters()}
    for target in targets:
        holder, _, old = target.rpartition(".")
        if old not in names:
            rest.add(target)
            continue
        full = f"{holder}.{names[old]}"
        parameters.add(full if full in here else names[old])
        parts[names[old]].add(old)
    doubled = {}
    for new, present in parts.items():
        wanted = {old for old, name in names.items() if name == new}
        if present != wanted:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(present))} without also "
                f"targeting {', '.join(sorted(wanted - present))} because they are fused into "
                f"{new}."
            )
        if len(wanted) > 1:
            doubled[rf".*\.{re.escape(new)}"] = len(wanted)
    config.target_modules = rest
    if parts:
        config.target_parameters = sorted(parameters)
        config.rank_pattern.update({key: config.r * n for key, n in doubled.items()})
        config.alpha_pattern.update({key: config.lora_alpha * n for key, n in doubled.items()})


def _resolved(config: LoraConfig, model: nn.Module, names: dict[str, str]) -> set[str]:
    """The names that a regular expression, or "all-linear", meant in a model whose experts were
    linear layers: their last parts, or whole names where the expression means some layers only."""
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return {n.rpartition(".")[2] for n in all_linear(config, model)} | set(names)
    matcher = TargetMatcher(config, str(config.target_modules))
    here = [name for name, _ in model.named_modules()]
    for old, new in names.items():  # and the layers that were there
        ends = f".{new}"
        here += [
            f"{name.removesuffix(ends)}.{old}"
            for name, _ in model.named_parameters()
            if name.endswith(ends)
        ]
    found = {key for key in here if matcher(key)}
    last = {key.rpartition(".")[2] for key in found}
    everywhere = all(key in found for key in here if key.rpartition(".")[2] in last)
    return last if everywhere else found


# -------------------------------------------------------------------- the weights


def convert_weights(
    model: Any, weights: dict[str, Tensor], known: Container[str]
) -> dict[str, Tensor]:
    """``weights`` as this version of transformers names and fuses the layers they belong to.

    Args:
        model: the base model with the adapter in it, or a PeftModel.
        weights: read from a file; none is changed.
        known: names that the adapter's weights have, without ``base_model.model.``. A file that has
            no other LoRA weights is left alone.
    """
    strange = {
        key: name
        for key in weights
        if ".lora_" in key and (name := key.removeprefix("base_model.model.")) not in known
    }
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not strange or getattr(getattr(base, "config", None), "model_type", None) is None:
        return weights
    rules, names = _rules(base), fused_names(base)
    found: dict[str, Tensor] = {}
    experts: dict[tuple[str, str, str], dict[str, dict[int, str]]] = {}
    for key, value in weights.items():
        if key not in strange:
            found[key] = value
            continue
        name = _renamed(strange[key], rules)
        at = _expert(name, names)
        if at is None:
            found[key if name == strange[key] else name] = value
            continue
        holder, number, old, new, side = at
        group = experts.setdefault((holder, new, side), defaultdict(dict))
        group[old][number] = key
    for (holder, new, side), keys in experts.items():
        order = [old for old, name in names.items() if name == new]
        merged = _fuse(base, weights, holder, new, side, [keys.get(old, {}) for old in order])
        if merged is None:  # not all of them, or not for this model: named as unexpected
            found.update({k: weights[k] for group in keys.values() for k in group.values()})
        else:
            found[merged[0]] = merged[1]
    return found


def _rules(model: Any) -> list[Any]:
    """transformers' renamings of the model's weights."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    return [r for r in get_model_conversion_mapping(model) or () if isinstance(r, WeightRenaming)]


def _renamed(key: str, rules: list[Any]) -> str:
    name = key
    for rule in rules:
        name, _ = rule.rename_source_key(name)
    # a rule that only drops a prefix is for weights of a part of the model
    return key if key.endswith(name) else name


def _expert(name: str, names: dict[str, str]) -> tuple[str, int, str, str, str] | None:
    """(experts module, number, old name, new name, "lora_A" or "lora_B") of an expert's weight."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.(lora_[AB])\.weight", name)
    if match is None or match[3] not in names:
        return None
    return match[1], int(match[2]), match[3], names[match[3]], match[4]


def _fuse(
    model: nn.Module,
    weights: dict[str, Tensor],
    holder: str,
    parameter: str,
    side: str,
    parts: list[dict[int, str]],
) -> tuple[str, Tensor] | None:
    """(name, weight) of lora_A or lora_B for a parameter, from the experts' own: ``parts`` has
    {expert: name in ``weights``} for each layer that the parameter stands for."""
    place = _place(model, holder, parameter)
    if place is None:
        return None
    name, wrapper = place
    E = wrapper.num_experts
    if any(set(part) != set(range(E)) for part in parts):
        return None
    layers = [[weights[part[e]] for e in range(E)] for part in parts]
    return f"{name}.{side}.weight", fuse_experts(layers, side)


def _place(model: nn.Module, holder: str, parameter: str) -> tuple[str, ParamWrapper] | None:
    """(name, wrapper) of the wrapper of a parameter, in a nest of them."""
    try:
        module: Any = model.get_submodule(holder)
    except AttributeError:
        return None
    name = holder
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter:
            return name, module
        module, name = module.base_layer, f"{name}.base_layer"
    return None
