"""Where the tensors of an adapter are in a model, and what they are called on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer, walk
from ..tuners.modules_to_save import ModulesToSaveWrapper
from ..tuners.prompting.encoder import BasePromptEncoder
from ..tuners.trainable_tokens import TrainableTokensLayer
from ..utils.private import WRAPPERS

PROMPT_KEY = "prompt_embeddings"
PREFIX = "base_model.model."


class _Fields(NamedTuple):
    model_key: str
    key: str
    owner: nn.Module
    attribute: str


class Slot(_Fields):
    """One tensor of an adapter: its names in the model and on disk,
    and the module that holds it."""

    @property
    def in_base(self) -> bool:
        """Whether it is a tensor of the base model, which no adapter is named after."""
        return self.model_key == self.key

    @property
    def model_keys(self) -> list[str]:
        """Names in a state dict of all tensors that are needed to save this one."""
        return [clean(self.model_key)]

    @property
    def tensor(self) -> Tensor:
        owner: Any = self.owner
        found: Tensor | None = owner._parameters.get(self.attribute)
        if found is None:
            found = owner._buffers[self.attribute]
        return found

    @property
    def refuses(self) -> str | None:
        """Why no saved tensor can be put here; None when one can."""
        return None

    def saved(self, state_dict: dict[str, Tensor] | None) -> Tensor:
        """What goes to the file, from the model or from a state dict of it (names cleaned)."""
        return self.tensor.detach() if state_dict is None else state_dict[clean(self.model_key)]

    def assign(self, value: Tensor) -> None:
        """Put ``value`` in place of the present tensor, which may be on the meta device."""
        owner, old = self.owner, self.tensor
        if self.attribute in owner._parameters:
            owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            owner._buffers[self.attribute] = value


class PromptSlot(Slot):
    """The virtual tokens of an adapter: ``model_key`` is its encoder's name, ``owner`` the
    embedding and ``attribute`` its weight. A file holds what the encoder makes of them."""

    encoder: BasePromptEncoder

    @property
    def model_keys(self) -> list[str]:
        at = clean(self.model_key)
        return [f"{at}.{name}" for name, _ in self.encoder.named_parameters()]

    @property
    def refuses(self) -> str | None:
        if not self.encoder.has_network:
            return None
        return (
            f"`{PROMPT_KEY}` cannot be loaded into `{self.model_key}`, which makes its prompt with "
            "a network: the file holds the prompt, from which the network cannot be told"
        )

    def saved(self, state_dict: dict[str, Tensor] | None) -> Tensor:
        if state_dict is None:
            return self.encoder.prompt().detach()
        names = [name for name, _ in self.encoder.named_parameters()]
        at = clean(self.model_key)
        weights = {f"encoder.{n}": state_dict[f"{at}.{n}"] for n in names}
        prompt: Tensor = torch.func.functional_call(_Prompt(self.encoder), weights, ())
        return prompt.detach()


class _Prompt(nn.Module):
    """An encoder's prompt as a module's call."""

    def __init__(self, encoder: BasePromptEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self) -> Tensor:
        return self.encoder.prompt()


def prompt_slot(name: str, encoder: BasePromptEncoder) -> PromptSlot:
    """The slot of the encoder that is called ``name`` in the model."""
    slot = PromptSlot(name, PROMPT_KEY, encoder.embedding, "weight")
    slot.encoder = encoder
    return slot


def tensors_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    for name, sub in module.named_modules():
        place = f"{prefix}.{name}" if name else prefix
        for attribute, value in [*sub._parameters.items(), *sub._buffers.items()]:
            if value is not None and attribute not in sub._non_persistent_buffers_set:
                yield f"{place}.{attribute}", sub, attribute


def slots_to_save(model: Any, adapter_name: str) -> list[Slot]:
    """:func:`adapter_slots` of an adapter that there is. ValueError where there is none, or where
    it has no tensors: what would be saved holds nothing, and what is loaded goes nowhere."""
    if adapter_name not in model.peft_config:
        raise ValueError(
            f"no adapter named {adapter_name!r}; there are {sorted(model.peft_config)}"
        )
    slots = list(adapter_slots(model, adapter_name))
    if not slots:
        raise ValueError(
            f"the model holds no tensors of the adapter {adapter_name!r}. Was it merged or "
            "unloaded? (If HF PEFT made it, as for `peftkern.fuse`, use peft's functions.)"
        )
    return slots


def adapter_slots(model: nn.Module, adapter_name: str) -> Iterator[Slot]:
    """Every tensor that belongs to the adapter, found by structure and never by name."""
    encoders: Any = model._modules.get("prompt_encoder") or {}
    if adapter_name in encoders:
        yield prompt_slot(f"prompt_encoder.{adapter_name}", encoders[adapter_name])
    for name, module in walk(model):
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            continue  # what it has is another module's
        if isinstance(module, BaseTunerLayer):
            for attribute in module.adapter_layer_names:
                store = getattr(module, attribute)
                if adapter_name not in store:
                    continue
                at = f"{name}.{attribute}"
                if isinstance(store, nn.ParameterDict):
                    yield Slot(f"{at}.{adapter_name}", clean(at), store, adapter_name)
                    continue
                inner = f"{at}.{adapter_name}"
                for key, owner, last in tensors_of(store[adapter_name], inner):
                    # files hold a magnitude as the parameter that it was in HF PEFT's first DoRA
                    rest = "" if attribute == "lora_magnitude_vector" else key[len(inner) :]
                    yield Slot(key, clean(at + rest), owner, last)
            for attribute, buffers in module._saved_buffers():
                if adapter_name in buffers:
                    at = f"{name}.{attribute}"
                    yield Slot(f"{at}.{adapter_name}", clean(at), buffers, adapter_name)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            inner = f"{name}.modules_to_save.{adapter_name}"
            for key, owner, last in tensors_of(module.modules_to_save[adapter_name], inner):
                yield Slot(key, clean(name + key[len(inner) :]), owner, last)


def clean(key: str) -> str:
    """A name without what torch.compile, FSDP and checkpointing put in front of wrapped modules."""
    for wrapper in WRAPPERS:
        if wrapper in key:
            key = key.replace(wrapper, "")
    return key
