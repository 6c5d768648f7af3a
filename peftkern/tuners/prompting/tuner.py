"""Prompt learning: what :class:`PeftModel` keeps and gives for prefixes and virtual tokens.

The base model itself is not changed, but for heads that train in full. What the prompts are stands
in ``prompts.py``, what a call does with them in ``calls.py``.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...configs.prompt_learning import PromptLearningConfig
from ...utils.module_tree import get_submodules
from ...utils.places import replace
from ..modules_to_save import (
    CONTAINERS,
    ModulesToSaveWrapper,
    find_modules_to_save,
    wrap_modules_to_save,
)
from ..p_tuning import PromptEncoder, PromptEncoderConfig
from ..prefix_tuning import PrefixEncoder, PrefixTuningConfig
from ..prompt_tuning import PromptEmbedding, PromptTuningConfig
from .encoder import BasePromptEncoder
from .prompts import Prompts, divide, innermost
from .room import Room
from .sizes import attention_layers, has_config, infer_sizes


def _make_encoder(config: Any, word_embeddings: nn.Module | None) -> BasePromptEncoder:
    if isinstance(config, PrefixTuningConfig):
        return PrefixEncoder(config)
    if isinstance(config, PromptEncoderConfig):
        return PromptEncoder(config)
    assert isinstance(config, PromptTuningConfig)
    if word_embeddings is None:
        raise ValueError("prompt tuning needs a model with input embeddings")
    return PromptEmbedding(config, word_embeddings)


def _names_inside(model: Any) -> list[str]:
    """Names of the adapters of a PeftModel that a prompt is put on; none for another model."""
    inside: Any = model if isinstance(model, Prompts) else None
    return [] if inside is None else list(inside.peft_config)


class PromptLearning(Prompts):
    """Mixed into :class:`PeftModel`; used when its adapters are prompts.

    Attributes:
        prompt_tokens: {adapter name: indices of its virtual tokens}.
    """

    prompt_tokens: dict[str, Tensor]
    _prefix_injection: Any = None
    _room: Room

    # ---------------------------------------------------------------- what it stands on

    @property
    def transformer_backbone_name(self: Any) -> str:
        """Name of the first transformers model among the base model's children."""
        from transformers import PreTrainedModel

        for name, module in self.base_model.named_children():
            if isinstance(module, PreTrainedModel):
                return name
        raise AttributeError(f"{type(self.base_model).__name__} has no backbone as a child")

    @property
    def word_embeddings(self: Any) -> nn.Module:
        """The model's input embeddings, as they are now."""
        base = innermost(self)
        try:
            found = base.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            found = None
        if found is None:
            raise AttributeError(f"{type(base).__name__} has no input embeddings")
        return found

    # ---------------------------------------------------------------- adapters

    def _start_prompts(self: Any, model: nn.Module, config: PromptLearningConfig) -> None:
        """Become a model of prompts around ``model``."""
        inner = [m for m in model.modules() if hasattr(m, "prompt_encoder")]
        if inner:
            raise ValueError(
                "the model has prompt learning adapters already; load further ones with "
                "`add_adapter` or `load_adapter`"
            )
        self.base_model = model
        self.prompt_encoder = nn.ModuleDict()
        self.prompt_tokens = {}
        self._peft_config: dict[str, Any] = {}
        base = innermost(model)
        if hasattr(base, "prepare_inputs_for_generation"):  # a name that HF PEFT's callers know
            self.base_model_prepare_inputs_for_generation = base.prepare_inputs_for_generation

    def _setup_prompt_encoder(self: Any, adapter_name: str) -> None:
        """Build the encoder, heads and injection of an adapter in ``peft_config``.

        Raises:
            ValueError, TypeError: as ``add_adapter``. The model is then as it was.
        """
        config = self.peft_config[adapter_name]
        base: Any = innermost(self)
        model: Any = self.base_model
        if adapter_name in _names_inside(model):
            raise ValueError(
                f"`adapter_name`: {adapter_name!r} is the name of an adapter of the model inside; "
                "a prompt on top of it needs another, so that both can be saved"
            )
        words = getattr(self, "word_embeddings", None)
        draft = copy.copy(config)
        draft.__dict__.update(infer_sizes(config, base, words))
        room = Room(base, decoder=isinstance(config, PrefixTuningConfig))
        room.check(draft.num_virtual_tokens, 1)
        heads = self._heads_of(draft)
        encoder = _make_encoder(draft, words)
        place = next((base if words is None else words).parameters()).device
        if place.type != "meta":  # where the embeddings are, as the prompt goes with them
            encoder.to(place)
        active = adapter_name in self.active_adapters
        flags = [(p, p.requires_grad) for p in model.parameters()]
        try:
            if isinstance(config, PrefixTuningConfig) and has_config(base):
                self._inject(draft)  # of another kind of model, a call says that it takes no prefix
            if not self.prompt_encoder and not isinstance(model, Prompts):
                # the first; a LoRA model inside has frozen what it adapts, and goes on training
                model.requires_grad_(False)
            wrap_modules_to_save(model, adapter_name, heads, config.inference_mode, activate=active)
        except BaseException:
            for module in self._heads():
                module.delete_adapter(adapter_name)
            self._remove_prompts(only_empty=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        config.__dict__.update(draft.__dict__)
        self._room = room
        encoder.requires_grad_(active and not config.inference_mode)
        self.prompt_encoder[adapter_name] = encoder
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.prompt_tokens[adapter_name] = torch.arange(total)

    def _heads_of(self: Any, config: PromptLearningConfig) -> list[str]:
        """Names of the modules that ``modules_to_save`` matches, all of which can be trained."""
        keys = find_modules_to_save(self.base_model, config.modules_to_save)
        for key in keys:
            _, module, _ = get_submodules(self.base_model, key)
            if isinstance(module, CONTAINERS):
                raise TypeError(
                    f"modules_to_save cannot be applied to `{key}`: a {type(module).__name__} has "
                    "no forward of its own"
                )
            wrapper = module if isinstance(module, ModulesToSaveWrapper) else None
            if wrapper is not None and not wrapper._get_available_adapters() <= set(
                self.peft_config
            ):
                raise ValueError(
                    f"`{key}` trains with the adapter below already: a prompt on top of a LoRA "
                    "adapter cannot have heads (modules_to_save) in common with it"
                )
        return keys

    def _inject(self: Any, config: PromptLearningConfig) -> None:
        """Have the attention layers ready for prefixes of this adapter's length too."""
        from ..prefix_tuning import way

        P, heads = config.num_virtual_tokens, config.num_attention_heads
        assert P is not None and config.token_dim is not None and heads is not None
        always_visible = getattr(config, "prefix_always_visible", False)
        base = innermost(self)
        if self._prefix_injection is not None:
            # not made anew: another thread may be in a forward with the hooks that there are
            if not way.again(self._prefix_injection, base):
                self._prefix_injection.allow(P, always_visible)
                return
        with way.choosing:
            if self._prefix_injection is not None:
                if not way.again(self._prefix_injection, base):  # another thread was here first
                    self._prefix_injection.allow(P, always_visible)
                    return
                self._prefix_injection.remove()
                self._prefix_injection = None  # if none can be chosen, the next call says so too
            self._prefix_injection = way.choose(
                base,
                num_layers=attention_layers(config, base),
                kv_heads=heads,
                head_dim=config.token_dim // heads,
                num_virtual_tokens=P,
                always_visible=always_visible,
                divide=functools.partial(divide, model=base),
            )

    def _heads(self: Any) -> list[ModulesToSaveWrapper]:
        """The modules that train in full with these adapters (or with none any more)."""
        wrappers = (m for m in self.base_model.modules() if isinstance(m, ModulesToSaveWrapper))
        return [m for m in wrappers if m._get_available_adapters() <= set(self.peft_config)]

    def _set_prompt(self: Any, adapter_name: str, inference_mode: bool) -> None:
        self.active_adapter = adapter_name
        for name, encoder in self.prompt_encoder.items():
            encoder.requires_grad_(name == adapter_name and not inference_mode)
        for module in self._heads():
            names = [adapter_name] if adapter_name in module._get_available_adapters() else []
            module.set_adapter(names, inference_mode=inference_mode)

    def _delete_prompt(self: Any, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        for module in self._heads():
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        del self.prompt_encoder[adapter_name]
        del self.prompt_tokens[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        rest = list(self.peft_config)
        if not rest:
            self.active_adapter = []
            return
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
            f"{rest[0]}.",
            stacklevel=3,
        )
        self._set_prompt(rest[0], self.peft_config[rest[0]].inference_mode)

    def _remove_prompts(self: Any, only_empty: bool = False) -> None:
        """Give the base model back as it was before the first prompt; ``only_empty``: only where no
        adapter is left."""
        if self._prefix_injection is not None and not (only_empty and self.prompt_encoder):
            self._prefix_injection.remove()
            self._prefix_injection = None
        heads = {id(m) for m in self._heads() if not (only_empty and m._get_available_adapters())}
        for module in list(self.base_model.modules()):
            if id(module) in heads:
                replace(self.base_model, module, module.original_module)

    @contextmanager
    def _without_prompts(self: Any) -> Iterator[None]:
        """Within the block calls go to the base model, its original heads included, and without the
        adapters of a LoRA model inside."""
        was = self._adapters_disabled
        heads = [(m, m._disable_adapters) for m in self._heads()]
        inner = isinstance(self.base_model, Prompts)
        with self.base_model.disable_adapter() if inner else nullcontext():
            try:
                self._adapters_disabled = True
                for module, _ in heads:
                    module._disable_adapters = True
                yield
            finally:
                self._adapters_disabled = was
                for module, disabled in heads:
                    module._disable_adapters = disabled

    @contextmanager
    def _loadable(self: Any, adapter_name: str, is_trainable: bool) -> Iterator[None]:
        """Within the block the adapter's encoder can take saved tokens.

        A network cannot be told from the tokens that it made: an adapter that is trained with one
        is frozen as its tokens, as it would be in a model that loads it, unless that fails.
        """
        config = self.peft_config[adapter_name]
        encoder = self.prompt_encoder[adapter_name]
        if not encoder.has_network:
            yield
            return
        config.check_loadable(is_trainable)
        draft = copy.copy(config)
        draft.inference_mode = True
        place = encoder.embedding.weight
        frozen = _make_encoder(draft, None).to(place.device).requires_grad_(False)
        self.prompt_encoder[adapter_name] = frozen
        try:
            yield
        except BaseException:
            self.prompt_encoder[adapter_name] = encoder
            raise
        config.inference_mode = True
        warnings.warn(
            f"The adapter {adapter_name!r} is frozen now: the file holds its prompt, and not the "
            "network that made it.",
            stacklevel=4,
        )
