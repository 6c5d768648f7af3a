"""``LoraConfig.trainable_token_indices``: finding the modules with trained tokens, and wrapping."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...utils.module_tree import get_submodules
from ...utils.places import ends_with_words, replace
from ...utils.tied import input_embedding_name, modules_tied_to_embedding, plain_name
from ...utils.zero3 import whole_shape
from ..base_layer import BaseTunerLayer
from .wrapper import TrainableTokensWrapper, check_wrappable

# The module named `key` trains the tokens `indices`. With `tied` it uses the rows of the input
# embedding's wrapper.
Target = namedtuple("Target", ["key", "indices", "tied"])


def find_tokens(
    model: nn.Module, config: Any, model_config: dict[str, Any], adapted: Sequence[str] = ()
) -> list[Target]:
    """The modules and tokens that ``config.trainable_token_indices`` names; nothing is changed.

    Args:
        model: the base model.
        config: a LoraConfig. Its indices are a list, for the input embedding, or {module name or
            the end of one: list}.
        model_config: ``model.config`` as a dict.
        adapted: names of the modules that get an adapter layer from the same configuration.

    Raises:
        ValueError: an unknown module, or one that is trained in full; an index outside of the
            weight's rows; ``ensure_weight_tying`` with different indices for tied modules.
        TypeError: a module that is no embedding or output layer, or that has an adapter layer.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return []
    if not isinstance(wanted, dict):
        wanted = {input_embedding_name(model, "embed_tokens"): wanted}
    for name in wanted:
        if name in (config.modules_to_save or ()):
            raise ValueError(
                "The embedding layer is already marked to be trained fully, either specify "
                f'`modules_to_save=[..., "{name}", ...]` or '
                f"`trainable_tokens={{'{name}': x}}` but not both."
            )
    tied = bool(model_config.get("tie_word_embeddings", False))
    if config.ensure_weight_tying and not tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights "
            "(tie_word_embeddings=False). Weight tying will not be applied for "
            "trainable_token_indices.",
            stacklevel=6,
        )
    names = [plain_name(n) for n in modules_tied_to_embedding(model)] if tied else []
    differ, left_out = _compare_tied(model, wanted, names, config) if tied else (False, set())

    places = _places(model)
    targets = {}
    for name, indices in wanted.items():
        if name not in left_out:
            for key in _ending_with(places, [name]):
                targets[key] = Target(key, indices, False)
    embedding = input_embedding_name(model)
    if names and embedding in targets and (config.ensure_weight_tying or not differ):
        for key in _ending_with(places, names):
            targets.setdefault(key, Target(key, targets[embedding].indices, True))
    for target in targets.values():
        _check(model, target, adapted)
    return list(targets.values())


def _compare_tied(
    model: Any, wanted: dict[str, Any], names: list[str], config: Any
) -> tuple[bool, set[str]]:
    """(True when tied modules have different indices, the names of ``wanted`` to leave out).

    A name is left out when its module is tied to the embedding and takes its rows from there.
    """
    if len(wanted) < 2:
        return False, set()
    embedding = input_embedding_name(model) or ""
    together = [
        name
        for name in wanted
        if embedding.endswith(name) or any(t.endswith(name) or name in t.split(".") for t in names)
    ]
    if len(together) < 2:
        return False, set()
    if all(wanted[name] == wanted[together[0]] for name in together):
        return False, set(together) & set(names)
    if config.ensure_weight_tying:
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied "
            f"layers. Conflicting layers: {', '.join(f'{n}: {wanted[n]}' for n in together)}. "
            "Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    return True, set()


def _places(model: nn.Module) -> list[str]:
    """Names of all modules, tied ones too, except those inside wrappers and adapter layers."""
    inside = "\0"
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name.startswith(inside):
            continue
        names.append(name)
        if isinstance(module, (BaseTunerLayer, TrainableTokensWrapper)):
            inside = f"{name}."
    return names


def _ending_with(places: list[str], names: Sequence[str]) -> list[str]:
    found = [key for key in places if any(ends_with_words(key, name) for name in names)]
    if not found:
        raise ValueError(
            f"Target modules {set(names)} not found in the base model. Please check the target "
            "modules and try again."
        )
    return found


def _check(model: nn.Module, target: Target, adapted: Sequence[str]) -> None:
    _, module, _ = get_submodules(model, target.key)
    if target.key in adapted:
        raise TypeError(
            "trainable_token_indices cannot be applied to modules of type LoraLayer: "
            f"`{target.key}` is among the target_modules"
        )
    check_wrappable(module)
    weight: Any = module.weight
    rows = whole_shape(weight)[0]
    bad = [
        i
        for i in target.indices
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < rows
    ]
    if bad:
        raise ValueError(
            f"`trainable_token_indices` of `{target.key}` must be integers from 0 to {rows - 1}, "
            f"got {bad[:5]}"
        )


def wrap_tokens(
    model: Any,
    adapter_name: str,
    targets: Sequence[Target],
    inference_mode: bool,
    activate: bool,
    autocast_dtype: bool = True,
) -> None:
    """Wrap the modules that :func:`find_tokens` found, and add the adapter's rows to them."""
    for target in targets:
        _, module, _ = get_submodules(model, target.key)
        if not isinstance(module, TrainableTokensWrapper):
            source = model.get_input_embeddings().token_adapter if target.tied else None
            wrapped, module = module, TrainableTokensWrapper(module, source)
            replace(model, wrapped, module)
            active = [adapter_name] if activate else []
        else:
            active = module.active_adapters
        module.update(adapter_name, target.indices, autocast_dtype=autocast_dtype)
        module.set_adapter(active, inference_mode=inference_mode)
