"""``PromptTuner``: the tuner of prefixes and virtual tokens (prompt learning).

The base model itself is not changed, except for heads that train in full. ``prompts.py`` reads the
prompts, ``calls.py`` applies them in calls.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ...configs.checks import check_once
from ...configs.prompt_learning import PromptLearningConfig
from ...utils.module_tree import get_submodules
from ...utils.places import replace
from ...utils.undo import remember_requires_grad
from ..agreement import added
from ..base_layer import as_names
from ..modules_to_save import (
    CONTAINERS,
    ModulesToSaveWrapper,
    find_modules_to_save,
    wrap_modules_to_save,
)
from ..p_tuning import PromptEncoder, PromptEncoderConfig
from ..prefix_tuning import PrefixEncoder, PrefixTuningConfig
from ..prompt_tuning import PromptEmbedding, PromptTuningConfig
from ..tensor_parallel import check_copied, own_heads, same_on_all_ranks, tensor_parallel
from ..tuner import Decoding
from ..wrapped import Wrapped, innermost
from .calls import decoding, prepare_step, prompted_forward, prompted_generate
from .encoder import BasePromptEncoder
from .prompts import Prompts, divide
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
    """Adapter names of the PeftModel that a prompt is put on; empty for any other model."""
    return list(model.peft_config) if isinstance(model, Wrapped) else []


class PromptTuner(Prompts):
    """The :class:`..tuner.Tuner` of a :class:`peftkern.PeftModel` with prompts.

    It has no parameters. The host has them, as ``prompt_encoder`` ({adapter name: encoder of its
    virtual tokens}) and ``prompt_tokens`` ({adapter name: indices of its virtual tokens}).

    Attributes:
        peft_config: {adapter name: configuration}.
        injection: the way of prefixes into the model; None before the first prefix.
        room: the number of positions that the model has.
    """

    room: Room
    why_no_graph: str | None = "steps with a prompt are not recorded"

    def __init__(self) -> None:
        self.peft_config: dict[str, Any] = {}
        self.injection: Any = None

    # ---------------------------------------------------------------- adapters

    def start(
        self,
        host: Any,
        model: nn.Module,
        adapter_name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        inner = [m for m in model.modules() if hasattr(m, "prompt_encoder")]
        if inner:
            raise ValueError(
                "the model has prompt learning adapters already; load further ones with "
                "`add_adapter` or `load_adapter`"
            )
        host.base_model = model
        host.prompt_encoder = nn.ModuleDict()
        host.prompt_tokens = {}
        base = innermost(model)
        if hasattr(base, "prepare_inputs_for_generation"):  # a name that HF PEFT's callers know
            host.base_model_prepare_inputs_for_generation = base.prepare_inputs_for_generation
        self.peft_config[adapter_name] = config
        self.add(host, adapter_name)

    def base(self, host: Any) -> nn.Module:
        return host.base_model

    def configs(self, host: Any) -> dict[str, Any]:
        return self.peft_config

    def set_configs(self, host: Any, configs: dict[str, Any]) -> None:
        self.peft_config = configs

    def active(self, host: Any) -> list[str]:
        return as_names(host.active_adapter)

    def supports_lora_conversion(self, host: Any, adapter_name: str) -> bool:
        return False

    def add(
        self,
        host: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Build the encoder, heads and injection for an adapter of ``peft_config``.

        Raises:
            ValueError, TypeError: as ``add_adapter``; the model is then as it was.
        """
        config = self.peft_config[adapter_name]
        check_once(config)
        base: Any = innermost(host)
        model: Any = host.base_model
        if adapter_name in _names_inside(model):
            raise ValueError(
                f"`adapter_name`: {adapter_name!r} is the name of an adapter of the model inside; "
                "a prompt on top of it needs another, so that both can be saved"
            )
        words = word_embeddings(host)
        draft = copy.copy(config)

        def prepared() -> tuple[Room, list[str], Any]:
            draft.__dict__.update(infer_sizes(config, base, words))
            room = Room(base, decoder=isinstance(config, PrefixTuningConfig))
            room.check(draft.num_virtual_tokens, 1)
            return room, self._heads_of(host, draft), _make_encoder(draft, words)

        room, heads, encoder = added(base, self.peft_config, adapter_name, prepared)
        place = next((base if words is None else words).parameters()).device
        if place.type != "meta":  # on the embeddings' device, as the prompt is joined to them
            encoder.to(place)
        same_on_all_ranks((*encoder.parameters(), *encoder.buffers()), base)
        active = adapter_name in self.active(host)
        put_flags_back = remember_requires_grad(model)
        try:
            if isinstance(config, PrefixTuningConfig) and has_config(base):
                # for a model of another kind, a call raises the error that it takes no prefix
                self.inject(host, draft)
            if not host.prompt_encoder and not isinstance(model, Wrapped):
                # the first prompt freezes the model; a LoRA model inside has frozen its base
                # already, and its adapters keep training
                model.requires_grad_(False)
            wrap_modules_to_save(model, adapter_name, heads, config.inference_mode, activate=active)
        except BaseException:
            for module in self._heads(host):
                module.delete_adapter(adapter_name)
            self._remove(host, only_empty=True)
            put_flags_back()
            raise
        config.__dict__.update(draft.__dict__)
        self.room = room
        encoder.requires_grad_(active and not config.inference_mode)
        host.prompt_encoder[adapter_name] = encoder
        total = config.num_virtual_tokens * config.num_transformer_submodules
        host.prompt_tokens[adapter_name] = torch.arange(total)

    def _heads_of(self, host: Any, config: PromptLearningConfig) -> list[str]:
        """Names of the modules that ``modules_to_save`` matches; an error when one cannot train."""
        keys = find_modules_to_save(host.base_model, config.modules_to_save)
        check_copied(host.base_model, tensor_parallel(host.base_model), keys)
        for key in keys:
            _, module, _ = get_submodules(host.base_model, key)
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

    def inject(self, host: Any, config: PromptLearningConfig) -> Any:
        """Prepare the attention layers for prefixes of this adapter's length; returns the way."""
        from ..prefix_tuning import way

        P, heads = config.num_virtual_tokens, config.num_attention_heads
        assert P is not None and config.token_dim is not None and heads is not None
        always_visible = getattr(config, "prefix_always_visible", False)
        base = innermost(host)
        head_dim, heads = config.token_dim // heads, own_heads(heads, base)
        # read once: another thread may choose again meanwhile
        found = self.injection
        # not replaced without need: another thread may be in a forward with its hooks
        if found is not None and not way.again(found, base):
            found.allow(P, always_visible)
            return found
        with way.choosing:
            found = self.injection
            if found is not None:
                if not way.again(found, base):  # another thread has chosen meanwhile
                    found.allow(P, always_visible)
                    return found
                found.remove()
                self.injection = None  # if no way works, the next call raises the same error
            self.injection = found = way.choose(
                base,
                num_layers=attention_layers(config, base),
                kv_heads=heads,
                head_dim=head_dim,
                num_virtual_tokens=P,
                always_visible=always_visible,
                divide=functools.partial(divide, model=base),
            )
            return found

    def _heads(self, host: Any) -> list[ModulesToSaveWrapper]:
        """The modules that train in full with these adapters, or whose adapters are all deleted."""
        wrappers = (m for m in host.base_model.modules() if isinstance(m, ModulesToSaveWrapper))
        return [m for m in wrappers if m._get_available_adapters() <= set(self.peft_config)]

    def activate(self, host: Any, adapter_name: str, inference_mode: bool) -> None:
        host.active_adapter = adapter_name
        for name, encoder in host.prompt_encoder.items():
            encoder.requires_grad_(name == adapter_name and not inference_mode)
        for module in self._heads(host):
            names = [adapter_name] if adapter_name in module._get_available_adapters() else []
            module.set_adapter(names, inference_mode=inference_mode)

    def set_requires_grad(self, host: Any, adapter_names: Any, requires_grad: bool) -> None:
        raise TypeError(
            "Setting `requires_grad` is not supported for prompt learning methods like "
            f"{host.peft_type.value}."
        )

    def decoding(self, host: Any, ids: Any, names: Sequence[str] | None) -> Decoding:
        return decoding(self, host, ids, names)

    def check_requests(self, host: Any, names: Sequence[str] | None) -> None:
        raise NotImplementedError(
            f"continuous batching would ignore the prompt of {host.peft_type.value}; allowed: "
            "LoRA. generate() uses the prompt"
        )

    def delete(self, host: Any, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        for module in self._heads(host):
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        del host.prompt_encoder[adapter_name]
        del host.prompt_tokens[adapter_name]
        if adapter_name not in self.active(host):
            return
        rest = list(self.peft_config)
        if not rest:
            host.active_adapter = []
            return
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
            f"{rest[0]}.",
            stacklevel=3,
        )
        self.activate(host, rest[0], self.peft_config[rest[0]].inference_mode)

    def _remove(self, host: Any, only_empty: bool = False) -> None:
        """Restore the base model as it was before the first prompt.

        With ``only_empty`` this is done only when no adapter is left.
        """
        if self.injection is not None and not (only_empty and host.prompt_encoder):
            self.injection.remove()
            self.injection = None
        heads = {
            id(m) for m in self._heads(host) if not (only_empty and m._get_available_adapters())
        }
        for module in list(host.base_model.modules()):
            if id(module) in heads:
                replace(host.base_model, module, module.original_module)

    @contextmanager
    def disabled(self, host: Any) -> Iterator[None]:
        """A context in which calls go to the base model with its original heads.

        The adapters of a LoRA model inside are switched off too.
        """
        heads = [(m, m._disable_adapters) for m in self._heads(host)]
        inner: Any = host.base_model if isinstance(host.base_model, Wrapped) else None
        with nullcontext() if inner is None else inner.disable_adapter():
            try:
                for module, _ in heads:
                    module._disable_adapters = True
                yield
            finally:
                for module, disabled in heads:
                    module._disable_adapters = disabled

    # ---------------------------------------------------------------- calls

    def forward(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return prompted_forward(self, host, kwargs)

    def generate(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return prompted_generate(self, host, args, kwargs)

    def prepare_inputs(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return prepare_step(self, host, None, args, kwargs)

    # ---------------------------------------------------------------- loading

    @contextmanager
    def loading(self, host: Any, adapter_name: str, is_trainable: bool) -> Iterator[None]:
        """A context in which the adapter's encoder can take saved tokens.

        A network's weights do not follow from its tokens. So an encoder with a network is replaced
        by one that holds the tokens and does not train, as in a model that loads the adapter. It
        comes back when loading fails.
        """
        config = self.peft_config[adapter_name]
        encoder = host.prompt_encoder[adapter_name]
        if not encoder.has_network:
            yield
            return
        config.check_loadable(is_trainable)
        draft = copy.copy(config)
        draft.inference_mode = True
        place = encoder.embedding.weight
        frozen = _make_encoder(draft, None).to(place.device).requires_grad_(False)
        host.prompt_encoder[adapter_name] = frozen
        try:
            yield
        except BaseException:
            host.prompt_encoder[adapter_name] = encoder
            raise
        config.inference_mode = True
        warnings.warn(
            f"The adapter {adapter_name!r} is frozen now: the file holds its prompt, and not the "
            "network that made it.",
            stacklevel=5,
        )

    def loaded(self, host: Any, adapter_name: str, is_trainable: bool, first: bool) -> None:
        """Set whether the adapter trains.

        The first adapter of a model is active and trains from now on; others train after
        ``set_adapter``.
        """
        self.peft_config[adapter_name].inference_mode = not is_trainable
        if first and is_trainable:
            host.set_adapter(adapter_name)

    def active_state(self, host: Any) -> Any:
        return None  # an added adapter is never the active one

    def withdraw(self, host: Any, adapter_name: str, active: Any) -> None:
        host.delete_adapter(adapter_name)
        self._remove(host, only_empty=True)

    def take_down(self, host: Any, adapter_name: str, model: nn.Module, kept: bool) -> None:
        self._remove(host)


def word_embeddings(host: Any) -> Any:
    """The present input embeddings of the host's model; None when it has none."""
    try:
        return innermost(host).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
