"""``Slot``: a tensor of an adapter in a model, with its place and its name on disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tuners.base_layer import BaseTunerLayer, walk
from ..tuners.modules_to_save import ModulesToSaveWrapper
from ..tuners.p_tuning import PromptEncoder
from ..tuners.prefix_tuning import PrefixEncoder
from ..tuners.prompting.encoder import BasePromptEncoder
from ..tuners.trainable_tokens import TrainableTokensLayer
from ..utils.gathering import has_hooks, held_in, is_whole, unwrapped
from ..utils.private import WRAPPERS
from ..utils.shards import whole

PROMPT_KEY = "prompt_embeddings"
PREFIX = "base_model.model."
HOW_TO_GATHER = (
    "Gather the parameters (deepspeed.zero.GatheredParameters, summon_full_params of FSDP, or "
    "accelerator.get_state_dict) around the call that saves"
)


class _Fields(NamedTuple):
    model_key: str
    key: str
    owner: nn.Module
    attribute: str


class Slot(_Fields):
    """One tensor of an adapter: its names in the model and on disk, and the module that has it."""

    @property
    def in_base(self) -> bool:
        """True for a tensor of the base model, whose name contains no adapter's name."""
        return self.model_key == self.key

    @property
    def model_keys(self) -> list[str]:
        """Names in a state dict of the tensors that are needed to save this one."""
        return [clean(self.model_key)]

    @property
    def tensor(self) -> Tensor:
        owner: Any = self.owner
        found: Tensor | None = held_in(owner, self.attribute)
        if found is None:
            found = owner._buffers[self.attribute]
        return found

    @property
    def refuses(self) -> str | None:
        """The reason that no saved tensor can be loaded here; None when one can."""
        return None

    def saved(self, state_dict: dict[str, Tensor] | None) -> Tensor:
        """The tensor for the file, from the model or from its state dict (with cleaned names)."""
        return self.tensor.detach() if state_dict is None else state_dict[clean(self.model_key)]

    def assign(self, value: Tensor) -> None:
        """Replace the present tensor, which may be on the meta device, by ``value``."""
        owner, old = self.owner, self.tensor
        if self.attribute in owner._parameters:
            owner._parameters[self.attribute] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            owner._buffers[self.attribute] = value


class PromptSlot(Slot):
    """The slot of an adapter's virtual tokens; a file holds them as the encoder computes them.

    ``model_key`` is the encoder's name, ``owner`` its embedding, ``attribute`` the weight of that.
    """

    encoder: BasePromptEncoder  # or the module that FSDP1 has put around it
    config: Any

    @property
    def model_keys(self) -> list[str]:
        at = clean(self.model_key)
        return [f"{at}.{name}" for name in self._weights()]

    @property
    def refuses(self) -> str | None:
        if not self.encoder.has_network:
            return None
        return (
            f"`{PROMPT_KEY}` cannot be loaded into `{self.model_key}`, which makes its prompt with "
            "a network: the file holds the prompt, from which the network cannot be told"
        )

    def _weights(self) -> dict[str, Tensor]:
        return {clean(name): weight for name, weight in self.encoder.named_parameters()}

    def saved(self, state_dict: dict[str, Tensor] | None) -> Tensor:
        if state_dict is None:
            encoder, embedding = self.encoder, self.encoder.embedding
            if not has_hooks(encoder) and is_whole(embedding):
                return encoder.prompt().detach()
            weights = self._weights()
        else:
            at = clean(self.model_key)
            weights = {name: state_dict[f"{at}.{name}"] for name in self._weights()}
        # all processes gather; then none calls the encoder, in which FSDP would gather
        weights = {name: whole(weight) for name, weight in weights.items()}
        rows = weights["embedding.weight"]
        if rows.dim() != 2:
            raise ValueError(
                f"the model holds only a part of `{self.model_key}` "
                f"{tuple(rows.shape)}: {HOW_TO_GATHER}. Nothing was written."
            )
        return rows if len(weights) == 1 else _through_network(self.encoder, self.config, weights)


def _through_network(encoder: Any, config: Any, weights: dict[str, Tensor]) -> Tensor:
    """The prompt that an encoder with a network makes of these weights, in a plain copy of it."""
    kind = next(c for c in type(unwrapped(encoder)).__mro__ if c in (PrefixEncoder, PromptEncoder))
    settings = copy.copy(config)
    settings.inference_mode = False
    with torch.device("meta"):
        made = kind(settings)
    made.load_state_dict(weights, assign=True)
    prompt: Tensor = made.train(encoder.training).prompt()
    return prompt.detach()


def prompt_slot(name: str, encoder: Any, config: Any) -> PromptSlot:
    """The slot of the encoder that has the name ``name`` in the model."""
    slot = PromptSlot(name, PROMPT_KEY, unwrapped(encoder.embedding), "weight")
    slot.encoder, slot.config = encoder, config
    return slot


def tensors_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    for name, sub in module.named_modules():
        place = f"{prefix}.{name}" if name else prefix
        for attribute, value in [*sub._parameters.items(), *sub._buffers.items()]:
            if value is not None and attribute not in sub._non_persistent_buffers_set:
                yield f"{place}.{attribute}", sub, attribute


def slots_to_save(model: Any, adapter_name: str) -> list[Slot]:
    """:func:`adapter_slots` as a list that is not empty.

    Raises:
        ValueError: an unknown adapter, or one without tensors: nothing could be saved or loaded.
    """
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
    """Every tensor of the adapter, found by the kinds of modules and never by names."""
    encoders: Any = model._modules.get("prompt_encoder") or {}
    if adapter_name in encoders:
        yield prompt_slot(
            f"prompt_encoder.{adapter_name}",
            encoders[adapter_name],
            model.peft_config[adapter_name],  # type: ignore[index]
        )
    for name, module in walk(model):
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            continue  # its tensors belong to another module
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
                    # HF PEFT's first DoRA had the magnitude as a parameter: files keep that name
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
    """A name without the parts that torch.compile, FSDP and checkpointing add when they wrap."""
    for wrapper in WRAPPERS:
        if wrapper in key:
            key = key.replace(wrapper, "")
    return key
