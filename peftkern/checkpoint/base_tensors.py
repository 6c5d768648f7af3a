"""Tensors of the base model in an adapter's file: biases that train with it, and embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer, adapter_modules
from ..tuners.lora.merging import Merging
from ..tuners.modules_to_save import AuxiliaryTrainingWrapper
from ..utils.tied import plain_name
from .slots import PREFIX, Slot, clean, tensors_of


def bias_slots(model: nn.Module, config: Any) -> Iterator[Slot]:
    """The biases that are saved with an adapter of this configuration (``bias`` of LoRA)."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return
    for name, module in model.named_modules():
        at = f"{name}." if name else ""
        if bias == "lora_only":
            if isinstance(module, BaseTunerLayer):
                base: Any = module.base_layer
                if base._parameters.get("bias") is not None:
                    yield Slot(f"{at}base_layer.bias", f"{at}base_layer.bias", base, "bias")
        elif module._parameters.get("bias") is not None and not re.search(
            r"\.(lora_[AB]|modules_to_save)\.", f".{name}."
        ):
            yield Slot(f"{at}bias", f"{at}bias", module, "bias")


def embedding_slots(model: Any, targeted: bool = False) -> Iterator[Slot]:
    """The weights of the input and output embeddings, found inside adapter layers and wrappers.

    With ``targeted`` only those of embeddings with an adapter layer.
    """
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        if layer is None or (targeted and not isinstance(layer, BaseTunerLayer)):
            continue
        wanted: Any = layer
        while isinstance(wanted, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wraps: Any = wanted
            within = isinstance(wanted, BaseTunerLayer)
            wanted = wraps.base_layer if within else wraps.original_module
        name = next((n for n, m in model.named_modules() if m is wanted), None)
        if name is not None:
            for key, owner, last in tensors_of(wanted, name):
                yield Slot(key, key, owner, last)


def unmerged(model: nn.Module, slots: Iterable[Slot]) -> dict[str, Tensor]:
    """{name in the model: the tensor without adapters} of the slots with merged adapters."""
    names: dict[int, list[str]] = {}
    for slot in slots:
        names.setdefault(id(slot.tensor), []).append(slot.model_key)
    found = {}
    for layer in adapter_modules(model):
        if not getattr(layer, "merged", False) or not isinstance(layer, Merging):
            continue
        if keys := names.get(id(layer._base_parameter())):
            found.update(dict.fromkeys(keys, layer._unmerged_parameter()))
    return found


@dataclass
class Beside:
    """Names that a file may have beside an adapter's, without ``base_model.model.``.

    Attributes:
        biases: {name: slot} of the biases that train.
        embeddings: {name: slot}. HF PEFT saves embeddings when the vocabulary was resized, when
            they are adapted, or when asked to (``save_embedding_layers``); the configuration does
            not show this.
        twice: names of tensors that are not loaded, because the file has them under another name
            too, or because they did not train.
    """

    biases: dict[str, Slot]
    embeddings: dict[str, Slot]
    twice: set[str]

    def has_embedding(self, name: str, weights: Iterable[str]) -> bool:
        """True when ``name`` is an embedding's, in a file with the names ``weights``.

        The embedding is adapted, or the file has all embeddings of the model. If it has only some,
        the name is that of a module that another configuration trains in full.
        """
        if name not in self.embeddings or ".base_layer." in name:
            return name in self.embeddings
        names = {clean(key).removeprefix(PREFIX) for key in weights}
        here = {slot.model_key for at, slot in self.embeddings.items() if at in names}
        return here == {slot.model_key for slot in self.embeddings.values()}


def find_beside(model: Any, config: Any, slots: Iterable[Slot]) -> Beside:
    """The base model's tensors that a file of an adapter with these ``slots`` may hold too.

    Each is listed by its name in this model and by its name without other adapters' wrappers.
    """
    found = Beside({}, {}, set())
    for slot in bias_slots(model, config):
        name = clean(slot.key).removeprefix(PREFIX)
        if ".original_module." in f".{name}":  # the bias of the module's copy trains, not this one
            found.twice.add(name)
            continue
        found.biases[name] = slot
        found.biases.setdefault(plain_name(name), slot)
    if getattr(config, "bias", None) == "all":
        # HF PEFT writes the biases of fully trained modules twice, under one of these names too
        for slot in slots:
            name = clean(slot.model_key).removeprefix(PREFIX)
            head, store, tail = name.rpartition(".modules_to_save.")
            if store and name.endswith(".bias"):
                found.twice |= {name, f"{head}{store}{tail.partition('.')[2]}"}
    for slot in embedding_slots(model):
        name = clean(slot.key).removeprefix(PREFIX)
        found.embeddings[name] = slot
        found.embeddings.setdefault(plain_name(name), slot)
    return found
