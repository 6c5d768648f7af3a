"""Pairs of models with prompts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch

import peftkern
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
    """A tiny model with one prompt; equal seeds, so equal first values in both libraries."""
    base = more.pop("base", None)
    base = make(family, task) if base is None else copy.deepcopy(base)
    name = more.pop("adapter_name", "default")
    seed = more.pop("seed", 3)
    config = config_of(library, kind, task, **more)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, config, adapter_name=name)


def prompt_pair(kind: str, family: str = "llama", task: str = "CAUSAL_LM", **more: Any) -> Any:
    """(peftkern's, HF PEFT's)."""
    return tuple(prompt_model(lib, kind, family, task, **more) for lib in (peftkern, peft))
