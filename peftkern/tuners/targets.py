"""The modules that a configuration adapts: matching of names, and errors when nothing matches."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..utils.constants import (
    DUMMY_TARGET_MODULES,
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from ..utils.error import NoMatchingPeftModuleError
from ..utils.patterns import Pattern, whole
from ..utils.peft_types import TaskType
from ..utils.places import further_names
from ..utils.private import COMPILED
from .base_layer import BaseTunerLayer, get_model_config, walk
from .target_names import _find_minimal_target_modules, ends_with_one_of

# selective state space layers read these weights directly, so a LoRA layer's forward is not called
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_INCOMPATIBLE = ("out_proj", "conv1d")


def default_targets(config: Any, model: nn.Module) -> set[str] | str:
    """``config.target_modules``, or the defaults of the model's architecture.

    Raises:
        ValueError: no ``target_modules`` are given and the architecture has no defaults.
    """
    if config.target_modules is not None:
        return config.target_modules
    model_type = get_model_config(model)["model_type"]
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if found is None:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: there are no defaults for "
            f"model_type {model_type!r}."
        )
    return found if isinstance(found, str) else set(found)


def all_linear(config: Any, model: Any) -> set[str]:
    """Names of all linear layers except the output layer (or the classification head)."""
    found = {name: m for name, m in walk(model, into_layers=False) if _is_linear(m)}
    heads: list[Any] = []
    if hasattr(model, "get_output_embeddings"):
        output = model.get_output_embeddings()
        if output is not None:
            heads.append(output)
        elif config.task_type == TaskType.SEQ_CLS:
            heads += [getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)][
                :1
            ]
    return {n for n, m in found.items() if not any(m is head for head in heads)}


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        return isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    return isinstance(module, (nn.Linear, Conv1D))


def _suffix_pattern(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches a name that is one of ``names`` or ends with "." and one of them."""
    return re.compile(r"(?:.*\.)?(?:" + "|".join(map(re.escape, sorted(names))) + r")")


class TargetMatcher:
    """The rules of one configuration, compiled once; called with a module name, True if it matches.

    ``target_modules`` as a string is a regular expression for the whole name; as a set it holds
    names or suffixes. ``layers_to_transform`` keeps only names whose first number is one of its
    indices.
    """

    def __init__(self, config: Any, targets: set[str] | str) -> None:
        self.targets = targets
        self.exact = targets if not isinstance(targets, str) else set()
        self.match = (
            Pattern(targets, "target_modules").fullmatch
            if isinstance(targets, str)
            else _suffix_pattern(targets).fullmatch
            if targets
            else (lambda _: None)
        )
        exclude = getattr(config, "exclude_modules", None)
        self.excluded = (
            Pattern(exclude, "exclude_modules").fullmatch
            if isinstance(exclude, str) and exclude
            else _suffix_pattern(exclude).fullmatch
            if exclude
            else (lambda _: None)
        )
        # a module that is trained in full is never adapted as well, nor is anything inside it
        saved = getattr(config, "modules_to_save", None) or []
        # by the rule of `ends_with_words`
        names = "|".join(
            ("" if n[:1] in "._" else r"(?:^|(?<=[._]))") + re.escape(n) for n in saved
        )
        self.saved = re.compile(rf".*?(?:{names})(?:$|\..*)") if saved else None
        layers = getattr(config, "layers_to_transform", None)
        self.layers = None
        if layers is not None and layers != [] and not isinstance(targets, str):
            self.layers = {layers} if isinstance(layers, int) else set(layers)
        patterns = getattr(config, "layers_pattern", None) or []
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self.index: list[Any] = (
            [Pattern(rf"(?:^|.*?\.){p}\.(\d+)\.", "layers_pattern", p) for p in patterns]
            if patterns
            else [re.compile(r"(?:^|.*?\.)(\d+)\.")]  # a leading number too, unlike in HF PEFT
        )

    def is_excluded(self, name: str) -> bool:
        return bool(self.excluded(name)) or bool(self.saved and self.saved.match(name))

    def __call__(self, name: str) -> bool:
        if self.is_excluded(name) or not self.match(name):
            return False
        if self.layers is None or name in self.exact:
            return True
        for pattern in self.index:
            if found := pattern.match(name):
                return int(found[1]) in self.layers
        return False


class _ExcludedModule:
    """A false value for a module that a rule of the configuration excluded."""

    def __bool__(self) -> bool:
        return False


def check_target_module_exists(config: Any, key: str) -> Any:
    """A true value when the configuration adapts a module of this name, else a false one.

    The false value is an ``_ExcludedModule`` when ``exclude_modules`` or ``modules_to_save``
    excluded the module.
    """
    targets = config.target_modules
    matcher = TargetMatcher(config, set() if targets is None else targets)
    return _ExcludedModule() if matcher.is_excluded(key) else matcher(key)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": names, "unmatched": names} of all modules of a tuner's model."""
    config = tuner.peft_config[adapter_name]
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key, _ in tuner.model.named_modules():
        exists = tuner._check_target_module_exists(config, key)
        found["matched" if exists else "unmatched"].append(key)
    return found


def match_targets(
    config: Any,
    model: nn.Module,
    targets: set[str] | str,
    state_dict: dict[str, Tensor] | None = None,
    prefix: str = "lora_",
) -> list[tuple[str, nn.Module]]:
    """(name, module) of every module that ``config`` adapts, in the model's order.

    Args:
        config: the adapter's configuration.
        model: modules inside its adapter layers are skipped.
        targets: from :func:`resolve_targets`.
        state_dict: when given, the modules that have tensors in it are taken instead, with a
            warning where they are not those of ``config``.
        prefix: how the names of an adapter's tensors begin after the module's name.

    Raises:
        NoMatchingPeftModuleError: nothing matches; the message says why.
    """
    if targets == DUMMY_TARGET_MODULES:
        return []
    matcher = TargetMatcher(config, targets)
    given = None if state_dict is None else _named_in(state_dict, prefix)
    aliases = further_names(model)
    found: list[tuple[str, nn.Module]] = []
    configured: set[str] = set()
    any_excluded = any_other = False
    for name, module in walk(model, into_layers=False):
        if not name:
            continue
        if given is not None:
            short = name.removeprefix(COMPILED)
            if matcher(short):
                configured.add(short)
            if short in given:
                found.append((name, module))
            else:
                any_other = True
            continue
        names = aliases.get(id(module), (name,))  # a module is adapted under all its names or none
        if any(map(matcher.is_excluded, names)):
            any_excluded = True
        elif any(map(matcher, names)):
            found.append((name, module))
        else:
            any_other = True
    if given is not None:
        _warn_inconsistent(configured, {n.removeprefix(COMPILED) for n, _ in found})
    if not found:
        _raise_unmatched(config, model, targets, any_excluded, any_other)
    if getattr(config, "exclude_modules", None) and not any_excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were "
            "excluded. Please check that exclude_modules was set correctly.",
            stacklevel=4,
        )
    return found


def _named_in(state_dict: dict[str, Tensor], prefix: str) -> set[str]:
    """Names of the modules that have adapter tensors in a state dict."""
    found = (key.rsplit("." + prefix, 1)[0] for key in state_dict if "." + prefix in key)
    return {n.removeprefix("base_model.model.").removeprefix(COMPILED) for n in found}


def _warn_inconsistent(configured: set[str], found: set[str]) -> None:
    said = ""
    if more := sorted(configured - found):
        said += f"The PEFT config contained these additional target modules: {more}. "
    if more := sorted(found - configured):
        said += f"The state_dict contained these additional target modules: {more}. "
    if said:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT "
            "config and the provided state_dict. This is not necessarily an issue and can be "
            "ignored if this was the intent. " + said,
            RuntimeWarning,
            stacklevel=5,
        )


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers, each once, in the model's order."""
    names = (name for name, module in walk(model, into_layers=False) if _is_linear(module))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def parameter_names(model: nn.Module) -> list[str]:
    """The last two parts of the names of weights of three dimensions, else of all weights."""
    named = list(model.named_parameters())
    stacked = [name for name, value in named if value.ndim == 3]
    names = stacked or [name for name, _ in named]
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))


def choice_of(given: Iterable[str], names: list[str]) -> str:
    """A phrase with the ``names`` that exist, and the one nearest to what was ``given``, if any."""
    near = [close for name in given for close in difflib.get_close_matches(name, names, n=1)]
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}It has {', '.join(names) or 'none'}"


def _raise_unmatched(
    config: Any, model: nn.Module, targets: set[str] | str, any_excluded: bool, any_other: bool
) -> None:
    if any_excluded and not any_other:
        raise NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, "
            "`exclude_modules` and `modules_to_save` configuration."
        )
    if not any_excluded and not targets:
        raise NoMatchingPeftModuleError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the "
            "values for these arguments."
        )
    if any_excluded:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of "
            "mismatched target modules and excluded modules. Please check your `target_modules` "
            "and `exclude_modules` configuration. You may also have only targeted modules that are "
            f"marked to be saved (`modules_to_save`). Targets: {_shown(targets)}."
        )
    else:
        message = (
            f"Target modules {_shown(targets)} not found in the base model. Please check the "
            "target modules and try again."
        )
        named = [targets] if isinstance(targets, str) else sorted(targets)
        message += f" Names of linear layers: {choice_of(named, linear_names(model))}."
    if getattr(config, "layers_to_transform", None) is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if getattr(config, "layers_pattern", None) is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    raise NoMatchingPeftModuleError(message)


def _shown(targets: set[str] | str) -> str:
    """The targets as HF PEFT prints them, sorted so that the text is always the same."""
    return targets if isinstance(targets, str) else "{" + str(sorted(targets))[1:-1] + "}"


def check_compatible(config: Any, model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ValueError for a module that must not be adapted in this architecture."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _MAMBA:
        return
    for name in names:
        last = name.rpartition(".")[2]
        if last in _MAMBA_INCOMPATIBLE:
            raise ValueError(
                f"[PEFT:{config.peft_type}] Module '{last}' is incompatible with Mamba-based "
                f"models (model_type='{model_type}'). Incompatible modules: "
                f"{set(_MAMBA_INCOMPATIBLE)}. Please remove it from `target_modules` to avoid "
                "compatibility issues."
            )


def resolve_targets(config: Any, model: nn.Module) -> set[str] | str:
    """The names or the regular expression to match; resolves the defaults and "all-linear"."""
    targets = default_targets(config, model)
    if isinstance(targets, str):
        if targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            targets = all_linear(config, model)
        else:
            return targets
    if len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return targets
    # many names of one layer each (from a checkpoint without a configuration, for example)
    names = (name for name, _ in walk(model, into_layers=False))
    fewer = _find_minimal_target_modules(
        targets, {name for name in names if name and not ends_with_one_of(name, targets)}
    )
    return fewer if len(fewer) < len(targets) else targets


def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """``peft_config`` with "all-linear" replaced, in place, by the names that it stands for."""
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        peft_config.target_modules = all_linear(peft_config, model)
    return peft_config


def targets_embedding(config: Any, model: nn.Module) -> bool:
    """True when the input or output embedding is adapted; known by usual names, as in PEFT."""
    targets = getattr(config, "target_modules", None)
    if not targets:
        return False
    if isinstance(targets, str):
        if targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return False
        names = (
            n for n, _ in model.named_modules() if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        )
        return any(map(whole(targets, "target_modules").fullmatch, names))
    return any(name in targets for name in EMBEDDING_LAYER_NAMES)
