"""Which modules a configuration adapts: matching of names, and the errors when nothing matches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.constants import (
    EMBEDDING_LAYER_NAMES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SEQ_CLS_HEAD_NAMES,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from ..utils.peft_types import TaskType
from .tuners_utils import BaseTunerLayer, get_model_config


def default_targets(config: Any, model: nn.Module) -> set[str] | str:
    """``config.target_modules``, or the defaults of the model's architecture.

    Raises:
        ValueError: none given and the architecture has no defaults.
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
    """Names of every linear layer but the output layer (or the classification head)."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None  # an adapter layer, whose own linear layers are no targets
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
            if _is_linear(module):
                found[name] = module
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
    """Matches a name that is one of ``names`` or ends with "." and one of them."""
    return re.compile(r"(?:.*\.)?(?:" + "|".join(map(re.escape, sorted(names))) + r")")


class TargetMatcher:
    """The rules of one configuration, compiled once and asked for every module name.

    ``target_modules`` as a string is a regular expression for the whole name; as a set it holds
    names or suffixes. ``layers_to_transform`` keeps only names whose first number is one of its
    indices.
    """

    def __init__(self, config: Any, targets: set[str] | str) -> None:
        self.targets = targets
        self.exact = targets if not isinstance(targets, str) else set()
        self.match = (
            re.compile(targets).fullmatch
            if isinstance(targets, str)
            else _suffix_pattern(targets).fullmatch
            if targets
            else (lambda _: None)
        )
        exclude = config.exclude_modules
        self.excluded = (
            re.compile(exclude).fullmatch
            if isinstance(exclude, str) and exclude
            else _suffix_pattern(exclude).fullmatch
            if exclude
            else (lambda _: None)
        )
        # a module that is trained in full is never adapted as well, nor is anything inside it
        saved = config.modules_to_save or []
        self.saved = (
            re.compile(r"(?:.*\.)?(?:" + "|".join(saved) + r")(?:$|\..*)") if saved else None
        )
        layers = config.layers_to_transform
        self.layers = None
        if layers is not None and layers != []:
            self.layers = {layers} if isinstance(layers, int) else set(layers)
        patterns = config.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self.index = (
            [re.compile(rf"(?:^|.*?\.){p}\.(\d+)\.") for p in patterns]
            if patterns
            else [re.compile(r".*?\.[^.]*\.(\d+)\.")]
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


def match_targets(
    config: Any, model: nn.Module, targets: set[str] | str
) -> list[tuple[str, nn.Module]]:
    """(name, module) of everything that ``config`` adapts, in the model's order.

    Names inside an adapter layer are skipped. Raises ValueError when nothing matches, saying why.
    """
    matcher = TargetMatcher(config, targets)
    found: list[tuple[str, nn.Module]] = []
    any_excluded = any_other = False
    inside: str | None = None
    for name, module in model.named_modules():
        if not name or (inside is not None and name.startswith(inside)):
            continue
        inside = None
        if matcher(name):
            found.append((name, module))
        elif matcher.is_excluded(name):
            any_excluded = True
        else:
            any_other = True
        if isinstance(module, BaseTunerLayer):
            inside = name + "."
    if found:
        return found
    if any_excluded and not any_other:
        raise ValueError(
            "All modules were excluded. This is likely unintended. Check your `target_modules`, "
            "`exclude_modules` and `modules_to_save` configuration."
        )
    message = f"Target modules {_shown(targets)} not found in the base model."
    if config.layers_to_transform is not None:
        message += (
            f" Note: You specified 'layers_to_transform': {config.layers_to_transform}"
            + (f" and 'layers_pattern': {config.layers_pattern}" if config.layers_pattern else "")
            + ", which may leave no layer."
        )
    if any_excluded:
        message += " Some modules were left out by `exclude_modules` or `modules_to_save`."
    raise ValueError(message + " Please check the target modules and try again.")


def _shown(targets: set[str] | str) -> str:
    return repr(targets) if isinstance(targets, str) else str(sorted(targets))


def resolve_targets(config: Any, model: nn.Module) -> set[str] | str:
    """The names or the regular expression to match, with defaults and "all-linear" worked out."""
    targets = default_targets(config, model)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return all_linear(config, model)
    return targets


def targets_embedding(config: Any, model: nn.Module) -> bool:
    """Whether the input or output embedding is adapted, by PEFT's rule on their usual names."""
    targets = getattr(config, "target_modules", None)
    if not targets:
        return False
    if isinstance(targets, str):
        if targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return False
        names = (
            n for n, _ in model.named_modules() if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        )
        return any(re.fullmatch(targets, n) for n in names)
    return any(name in targets for name in EMBEDDING_LAYER_NAMES)
