"""Small adapters of every kind, with random numbers in all trained parameters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import peftkern
from tests.tiny import make

WEIGHTS = "adapter_model.safetensors"
_BLOCKS = {"target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}
# every kind of tensor that a file may hold
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["norm", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "kasa": {"kasa_config": {}},
    "blocks": {"use_bdlora": _BLOCKS, "target_modules": ["q_proj", "v_proj"]},
    "monteclora": {"monteclora_config": {}},
    "bias_all": {"family": "gpt2", "bias": "all"},
    "bias_lora_only": {"family": "gpt2", "bias": "lora_only"},
    "prefix": {"config": peftkern.PrefixTuningConfig},
    "prompt": {"config": peftkern.PromptTuningConfig},
    "p_tuning": {"config": peftkern.PromptEncoderConfig},
}


def config_of(kind: str) -> Any:
    settings = {"task_type": "CAUSAL_LM", **KINDS[kind]}
    settings.pop("family", None)
    cls = settings.pop("config", None)
    if cls is not None:
        return cls(num_virtual_tokens=3, **settings)
    return peftkern.LoraConfig(r=4, **settings)


def base_of(kind: str) -> Any:
    return make(KINDS[kind].get("family", "llama"))


def trained(kind: str, name: str = "default") -> Any:
    """A model with an adapter of this kind, random numbers in whatever trains."""
    torch.manual_seed(0)
    model = quietly(peftkern.get_peft_model, base_of(kind), config_of(kind), name)
    randomize(model)
    return model


def randomize(model: Any, seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The call without what it warns of, which another test is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
