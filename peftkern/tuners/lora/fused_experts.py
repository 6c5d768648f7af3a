"""Conversion of adapters for mixtures of experts that were made under transformers 4.

There every expert had linear layers ``w1``, ``w3`` and ``w2`` (or ``gate_proj``, ``up_proj`` and
``down_proj``). transformers 5 fuses those of all experts into parameters, ``gate_up_proj``
[E, 2·I, D] and ``down_proj`` [E, D, I]. The targets of the configuration and the weights are
converted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Sequence
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
    """Move fused layers from ``target_modules`` to ``target_parameters``, in place.

    A second call changes nothing. A parameter that replaces two layers gets twice their rank and
    alpha, so that each keeps its own update and scaling.

    Args:
        config: the new adapter's configuration.
        model: the base model.
        names: :func:`fused_names` of the model.

    Raises:
        ValueError: of two layers that are one parameter now, only one is targeted.
    """
    targets = config.target_modules
    if targets is None:
        return
    if isinstance(targets, str):
        targets = _resolved(config, model, names)
        if not targets:
            return  # the pattern matches nothing, which raises the usual error later
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
    """The names that a pattern or "all-linear" matched when the experts were linear layers.

    They are last parts of names, or whole names where the pattern matches only some layers.
    """
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return {n.rpartition(".")[2] for n in all_linear(config, model)} | set(names)
    matcher = TargetMatcher(config, str(config.target_modules))
    here = [name for name, _ in model.named_modules()]
    for old, new in names.items():  # add the experts' layers under their old names
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
    model: Any, weights: dict[str, Tensor], known: Container[str], why: list[str] | None = None
) -> dict[str, Tensor]:
    """``weights`` renamed and fused like the layers in this version of transformers.

    Args:
        model: the base model with the adapter in it, or a PeftModel.
        weights: the tensors of a file; they are not changed.
        known: names of the adapter's weights in the model, without ``base_model.model.``. A file
            whose LoRA weights all have these names is returned as it is.
        why: gets a sentence for each parameter whose experts the file does not have, or has too
            many of; their weights keep their names.
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
        parts = {old: keys.get(old, {}) for old in order}
        merged = _fuse(base, weights, holder, new, side, parts, why)
        if merged is None:  # incomplete, or of another model: kept, and reported as unexpected
            found.update({k: weights[k] for group in keys.values() for k in group.values()})
        else:
            found[merged[0]] = merged[1]
    return found


def _rules(model: Any) -> list[Any]:
    """transformers' rules for renaming the weights of this model."""
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
    # a rule that only removes a prefix is for checkpoints of a part of the model
    return key if key.endswith(name) else name


def _expert(name: str, names: dict[str, str]) -> tuple[str, int, str, str, str] | None:
    """(experts module, number, old name, new name, side) of an expert's weight; None for others."""
    sides = r"(lora_[AB](?=\.weight)|lora_magnitude_vector)(?:\.weight)?"
    match = re.fullmatch(rf"(.*\.experts)\.(\d+)\.(\w+)\.{sides}", name)
    if match is None or match[3] not in names:
        return None
    return match[1], int(match[2]), match[3], names[match[3]], match[4]


def _fuse(
    model: nn.Module,
    weights: dict[str, Tensor],
    holder: str,
    parameter: str,
    side: str,
    parts: dict[str, dict[int, str]],
    why: list[str] | None,
) -> tuple[str, Tensor] | None:
    """(name, weight) of one side for a parameter, fused from those of its experts.

    ``parts`` has {expert: name in ``weights``} for each layer that the parameter replaces. None
    when some are missing or do not fit; ``why`` gets the reason.
    """
    place = _place(model, holder, parameter)
    if place is None:
        return None
    name, wrapper = place
    E = wrapper.num_experts
    wrong = {old: set(range(E)) ^ set(part) for old, part in parts.items()}
    if any(wrong.values()):
        if why is not None:
            why += [_lacking(f"{holder}.*.{old}.{side}", E, e) for old, e in wrong.items() if e]
        return None
    layers = [[weights[part[e]] for e in range(E)] for part in parts.values()]
    end = "" if side == "lora_magnitude_vector" else ".weight"  # as in files
    return f"{name}.{side}{end}", fuse_experts(layers, side)


def _lacking(what: str, E: int, wrong: set[int]) -> str:
    """A sentence about experts that a file lacks, or that a model of E experts lacks."""
    lacks, has = sorted(e for e in wrong if e < E), sorted(e for e in wrong if e >= E)
    said = [f"{what} of expert {', '.join(map(str, lacks))} is missing"] if lacks else []
    said += [f"{what} is there for expert {', '.join(map(str, has))}"] if has else []
    return f"{' and '.join(said)}, in a model of {E} experts"


def _place(model: nn.Module, holder: str, parameter: str) -> tuple[str, ParamWrapper] | None:
    """(name, wrapper) of a parameter's wrapper among the nested ones of its module, or None."""
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


def numbers_of_experts(
    model: nn.Module, adapter_name: str, mismatched: Sequence[tuple[Any, str, Any, Any]]
) -> list[str]:
    """A sentence for each lora_A of a file that has factors of another number of experts.

    Args:
        model: the model with the adapter in it.
        adapter_name: the adapter that is loaded.
        mismatched: (slot, name in the file, shape in the file, shape in the model).
    """
    said = []
    for slot, key, saved, here in mismatched:
        name, found, _ = slot.model_key.rpartition(".lora_A.")
        module = model.get_submodule(name.removeprefix(".")) if found else None
        if not isinstance(module, ParamWrapper) or len(saved) != 2 or saved[1] != here[1]:
            continue
        r, E = module.r[adapter_name], module.num_experts
        if E > 1 and saved[0] % r == 0:
            said.append(
                f"{key} has factors of {saved[0] // r} experts at rank {r}, and "
                f"`{module.parameter_name}` of the model has {E} experts"
            )
    return said
