"""Pairs of models with prompts, by peftkern and by HF PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor

import peftkern
from tests.plain_reference import with_prefix, with_prompt
from tests.prefix_models import split
from tests.tiny import make

KINDS = {
    "prompt": ("PromptTuningConfig", {}),
    "sample": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "projection": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
}
PREFIXES = ("prefix", "projection")


def config_of(library: Any, kind: str, task: str = "CAUSAL_LM", P: int = 5, **more: Any) -> Any:
    name, settings = KINDS[kind]
    return getattr(library, name)(
        **{"task_type": task, "num_virtual_tokens": P, **settings, **more}
    )


def prompt_model(
    library: Any, kind: str, family: str = "llama", task: str = "CAUSAL_LM", **more: Any
) -> Any:
    """A tiny model with one prompt; equal seeds, so equal first values in both libraries.

    It is float64, prompt included, unless ``dtype`` or another ``base`` is given.
    """
    base, dtype = more.pop("base", None), more.pop("dtype", torch.float64)
    base = make(family, task, dtype) if base is None else copy.deepcopy(base)
    name = more.pop("adapter_name", "default")
    seed = more.pop("seed", 3)
    config = config_of(library, kind, task, **more)
    torch.manual_seed(seed)
    model = library.get_peft_model(base, config, adapter_name=name)
    model.prompt_encoder.to(base.dtype)
    return model


def prompt_pair(kind: str, family: str = "llama", task: str = "CAUSAL_LM", **more: Any) -> Any:
    """(peftkern's, HF PEFT's)."""
    return tuple(prompt_model(lib, kind, family, task, **more) for lib in (peftkern, peft))


def virtual_tokens(model: Any, name: str = "default") -> Tensor:
    """The present values, as a leaf, of a prompt [P, d] or of a prefix [P, 2 * layers * d]."""
    tokens = model.get_prompt_embedding_to_save(name).detach().clone()
    return tokens[: model.peft_config[name].num_virtual_tokens].requires_grad_()


def plain(kind: str, model: Any, tokens: Tensor) -> Callable[[Any], Callable[..., Any]]:
    """The plain reference of a peftkern model's prompt, for a base model in the parentheses."""
    if kind not in PREFIXES:
        return lambda base: partial(with_prompt, base, tokens)
    config = model.peft_config["default"]
    seq2seq = config.task_type == "SEQ_2_SEQ_LM"
    prefixes = split(tokens, config.num_attention_heads, config.num_layers, seq2seq)
    return lambda base: partial(with_prefix, base, prefixes)
