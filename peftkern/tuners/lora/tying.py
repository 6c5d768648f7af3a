"""``ensure_weight_tying``: adapters of tied modules share the weights of the embedding's adapter.

A tied module shares the input embedding's weight.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ...utils.module_tree import get_submodules
from ...utils.places import ends_with_words
from ...utils.tied import embedding_group, input_embedding_name
from ..base_layer import walk
from ..modules_to_save import ModulesToSaveWrapper, find_modules_to_save, wrap_modules_to_save
from ..targets import TargetMatcher
from .linear import Linear

UNTIED = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
    "`ensure_weight_tying` is not set to True. This can lead to complications, for example when "
    "merging the adapter or converting your model to formats other than safetensors. Check the "
    "discussion here: https://github.com/huggingface/peft/issues/2777"
)


def resolve_tying(config: Any, model: nn.Module) -> None:
    """Set ``config.modules_to_tie`` or ``config.target_modules_to_tie`` if tying is asked for.

    In ``modules_to_save`` or ``target_modules`` the input embedding then replaces the modules that
    are tied to it. Warns when there is nothing to tie, when tying may be needed but is not asked
    for, and when an embedding is adapted that the model never calls.
    """
    targets = config.target_modules
    group = embedding_group(model)
    names = [name for name, _ in group]
    saves = [n for n in names if any(ends_with_words(n, m) for m in config.modules_to_save or ())]
    adapts = _adapted(config, [n for n in names if n not in saves])
    tied = set(names[1:])
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        tied = set()  # they share a weight by chance: a checkpoint would hold separate ones
    if not config.ensure_weight_tying:
        if (saves or adapts) and len(group) > 1:
            warnings.warn(UNTIED, stacklevel=5)
            _warn_if_never_called(model, group, {*saves, *adapts})
    elif not tied:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model",
            stacklevel=5,
        )
    elif saves:
        config.modules_to_tie = tied
        config.modules_to_save = _with_embedding(config.modules_to_save, tied, model)
    elif adapts:
        config.target_modules_to_tie = tied
        if isinstance(targets, str):
            name = re.escape(input_embedding_name(model) or "")
            config.target_modules = rf"(?:{targets}|^{name}$)"
        else:
            config.target_modules = set(_with_embedding(sorted(targets), tied, model))
    else:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either "
            "`modules_to_save` or `target_modules`",
            stacklevel=5,
        )


def _adapted(config: Any, names: list[str]) -> list[str]:
    """Those of ``names``, all of embeddings, that ``target_modules`` matches."""
    targets = config.target_modules
    if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return []  # neither the defaults nor "all-linear" contain embeddings or heads
    matcher = TargetMatcher(config, targets)
    return [name for name in names if matcher.match(name) and not matcher.excluded(name)]


def _warn_if_never_called(
    model: Any, group: list[tuple[str, nn.Module]], adapted: set[str]
) -> None:
    """Warn when the adapted embedding is one that the model never calls.

    T5, BART and similar models keep the weight in a module (``shared``) that is never called;
    encoder and decoder call other modules with that weight.
    """
    first = group[0][0]
    called = [
        name for name, module in group[1:] if isinstance(module, nn.Embedding) and name != first
    ]
    if first not in adapted or adapted.intersection(called) or not called:
        return
    warnings.warn(
        f"`{first}` is adapted, but the model never calls it: {called} have its weight and are "
        "called. The adapter of it trains nothing and has no effect. Name those modules instead, "
        "or set `ensure_weight_tying=True`, which adapts all of them.",
        stacklevel=6,
    )


def _with_embedding(names: Iterable[str], tied: set[str], model: nn.Module) -> list[str]:
    """``names`` with the input embedding added, and without the names that match tied modules."""
    found = list(names)
    embedding = input_embedding_name(model) or ""
    if embedding not in found:
        found.append(embedding)
    for key in sorted(tied):
        match = next((n for n in found if f".{n}." in f".{key}."), None)
        if match is not None:
            found.remove(match)
    return found


def is_tied_target(config: Any, key: str) -> bool:
    """True when the module's adapter is tied to the input embedding's."""
    tied = getattr(config, "target_modules_to_tie", None) or ()
    return key in tied or any(key.endswith(f".{name}") for name in tied)


def shares_embedding(config: Any, key: str) -> bool:
    """True when the adapter of a tied module is made of the embedding adapter's weights.

    Only modules of the top level share them, as in HF PEFT, whose files must fit.
    """
    return key.rpartition(".")[2] in (getattr(config, "target_modules_to_tie", None) or ())


def tie_adapter(layer: Any, embedding: Any, adapter_name: str, init: bool | str) -> None:
    """Make the adapter's weights of a LoRA ``Linear`` views of those of an ``Embedding``.

    lora_A is lora_embedding_Bᵀ and lora_B is lora_embedding_Aᵀ, in the same memory. Unless ``init``
    is False, the values are those drawn for the linear layer.
    """
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    shared_A = embedding.lora_embedding_B[adapter_name].data.t()
    shared_B = embedding.lora_embedding_A[adapter_name].data.t()
    if init is not False:
        shared_A.copy_(A.weight.data)
        shared_B.copy_(B.weight.data)
    A.weight = nn.Parameter(shared_A, requires_grad=A.weight.requires_grad)
    B.weight = nn.Parameter(shared_B, requires_grad=B.weight.requires_grad)


def share_again(model: Any) -> None:
    """Make tied adapters of ``model`` share memory again after their tensors were moved or copied.

    The parameters stay the same objects, as an optimizer may hold them.
    """
    for name, config in model.peft_config.items():
        if not getattr(config, "target_modules_to_tie", None):
            continue
        embedding: Any = model.get_input_embeddings()
        for key, layer in walk(model):
            if not (isinstance(layer, Linear) and name in layer.lora_A):
                continue
            if not shares_embedding(config, key) or name not in embedding.lora_embedding_A:
                continue
            for store, shared in (
                (layer.lora_A, embedding.lora_embedding_B[name]),
                (layer.lora_B, embedding.lora_embedding_A[name]),
            ):
                weight: Any = store[name].weight
                value = shared.data.t()
                same = (weight.shape, weight.dtype, weight.device)
                if same == (value.shape, value.dtype, value.device):
                    weight.data = value


def tie_again(model: Any, adapter_name: str) -> None:
    """Share the adapter's tied weights again after its tensors were replaced, not copied into."""
    config = model.peft_config[adapter_name]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(config, "target_modules_to_tie", None):
        for key, module in base.named_modules():
            if shares_embedding(config, key) and isinstance(module, Linear):
                tie_adapter(module, base.get_input_embeddings(), adapter_name, init=False)
    for key in find_modules_to_save(base, sorted(getattr(config, "modules_to_tie", ()) or ())):
        _, wrapper, _ = get_submodules(base, key)
        copies: Any = base.get_input_embeddings().modules_to_save
        wrapper.modules_to_save[adapter_name].weight = copies[adapter_name].weight  # type: ignore


def tie_saved_modules(
    model: Any, adapter_name: str, config: Any, activate: bool, keys: Sequence[str]
) -> None:
    """Wrap the modules named ``keys`` like ``modules_to_save``.

    Their copies have the weight of the input embedding's copy.
    """
    if not keys:
        return
    weight = model.get_input_embeddings().modules_to_save[adapter_name].weight
    wrap_modules_to_save(model, adapter_name, keys, config.inference_mode, activate=activate)
    for key in keys:
        _, wrapper, _ = get_submodules(model, key)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        wrapper.modules_to_save[adapter_name].weight = weight
