"""``Parting``: separates embeddings that share a weight when adapters are merged for good."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...utils.gathering import is_shard
from ...utils.shards import memory_of
from ...utils.tied import embedding_group
from ..base_layer import get_model_config, walk
from .tying import shares_embedding

NO_LONGER = (
    "Input and output embeddings are no longer tied after merging. Setting "
    "`tie_word_embeddings=False` in the model config."
)
KEPT = (
    "The embeddings {} are no longer tied after merging. `tie_word_embeddings` stays as it is, as "
    "{} computes otherwise, or sets it again, without it: a transformers that ties them again when "
    "the saved model is loaded would lose what was merged."
)
# model types whose forward depends on the configuration's tie_word_embeddings
_SCALED_BY_TYING = ("switch_transformers", "t5gemma", "udop", "umt5")


class Parting:
    """The modules of ``model``, adapted or not, that share the input embedding's weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.group: list[tuple[str, Any]] = list(embedding_group(model))
        self._before = [(module, module._parameters["weight"]) for _, module in self.group]

    def adapted(self, layers: Any) -> list[str]:
        """Names of the modules that are the base of one of these layers.

        [] when no modules share a weight, and when single tokens train in all of them together, as
        merging those changes all of them in the same way.
        """
        layers = list(layers)
        bases = {id(layer.get_base_layer()) for layer in layers}
        tokens = [layer for layer in layers if getattr(layer, "_tied_adapter", None)]
        together = {id(m.get_base_layer()) for t in tokens for m in (t, *t._tied_adapter)}
        if len(self.group) < 2 or all(id(module) in together for _, module in self.group):
            return []
        return [name for name, module in self.group if id(module) in bases]

    def part(self, layers: Any) -> None:
        """Give the bases of these layers weights of their own, so that merging changes only one.

        Weights that are not plain parameters stay as they are.
        """
        bases = {id(layer.get_base_layer()) for layer in layers}
        for _, module in self.group if len(self.group) > 1 else ():
            weight = module._parameters["weight"]
            others = [m for _, m in self.group if m is not module]
            if id(module) not in bases or not _can_be_copied(weight) or weight.is_meta:
                continue
            if any(memory_of(m._parameters["weight"]) == memory_of(weight) for m in others):
                own = weight.detach().clone()
                module.weight = nn.Parameter(own, requires_grad=weight.requires_grad)

    def put_back(self) -> None:
        """Restore the shared weights from before :meth:`part`."""
        for module, weight in self._before:
            module._parameters["weight"] = weight

    def join(self, by_layer: dict[Any, list[str]], configs: dict[str, Any]) -> None:
        """Share the weight again where tied adapters (``ensure_weight_tying``) were merged.

        (Their updates are the same.)
        """
        names = {id(layer): names for layer, names in by_layer.items()}
        layers = [(key, layer) for key, layer in walk(self.model) if id(layer) in names]
        if not self.group:
            return
        first = self.group[0][1]
        source = next((m for _, m in layers if m.get_base_layer() is first), None)
        for key, layer in layers:
            merged = names[id(layer)]
            base = layer.get_base_layer()
            if (
                source is not None
                and merged
                and merged == names[id(source)]
                and any(base is module for _, module in self.group)
                and all(shares_embedding(configs[name], key) for name in merged)
            ):
                base.weight = first.weight

    def declare_untied(self) -> None:
        """Note in the configuration when input and output embedding no longer share a weight.

        All other modules of the group then get weights of their own too, as a saved model needs.
        For a model whose adapter layers are gone.
        """
        model = self.model
        if not get_model_config(model).get("tie_word_embeddings"):
            return
        try:
            ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        except (AttributeError, NotImplementedError):
            return
        weights: list[Any] = [getattr(end, "weight", None) for end in ends]
        now: list[Any] = [model.get_submodule(name) for name, _ in self.group]
        known = all(weight is not None for weight in weights)
        if known and memory_of(weights[0]) == memory_of(weights[1]):
            apart = {memory_of(m.weight) for m in now} != {memory_of(weights[0])}
        else:
            apart = known
        if not apart:
            return
        seen = {memory_of(weights[0])}
        for module in now[1:]:
            weight: Any = module.weight
            if memory_of(weight) in seen and _can_be_copied(weight):
                own = torch.clone(weight.detach())
                module.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
            seen.add(memory_of(module.weight))
        config = model.config
        if getattr(config, "model_type", None) in _SCALED_BY_TYING or _always_ties(config):
            names = [name for name, _ in self.group]
            warnings.warn(KEPT.format(names, type(model).__name__), stacklevel=4)
            return
        config.tie_word_embeddings = False
        warnings.warn(NO_LONGER, stacklevel=4)


def _can_be_copied(weight: Any) -> bool:
    return type(weight) is nn.Parameter or is_shard(weight)


def _always_ties(config: Any) -> bool:
    """True when configurations of this class always say that embeddings are tied.

    T5's do: they take the setting for something else.
    """
    try:
        return bool(type(config)(tie_word_embeddings=False).tie_word_embeddings)
    except Exception:  # a class that needs other arguments
        return False
