"""Tiny mixtures of experts, and adapters for them in the format of transformers 4."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from tests.models import INNER, LAYERS, WIDTH, build

EXPERTS = 4
# the names of a layer's experts module in each family
EXPERTS_OF = {
    "mixtral": "mlp.experts",
    "qwen3_moe": "mlp.experts",
    "llama4": "feed_forward.experts",
    "gpt_oss": "mlp.experts",
}
IDS = torch.arange(3, 23).view(2, 10)


@functools.cache
def _original(family: str) -> Any:
    return build(family, draw=0.2)


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh tiny model; the same weights each time."""
    model = copy.deepcopy(_original(family)).to(dtype)
    return eager(model) if dtype == torch.float64 else model


def eager(model: Any) -> Any:
    """The model with its experts one after the other: torch's grouped product has no float64."""
    model.set_experts_implementation("eager")
    return model


def save_v4_adapter(folder: Path, family: str, r: int = 3) -> None:
    """An adapter with a linear layer for each projection of each expert, and its configuration."""
    g = torch.Generator().manual_seed(1)
    inside, (gate, up, down) = {
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }[family]
    shapes = {f"experts.{e}.{n}": (WIDTH, INNER) for e in range(EXPERTS) for n in (gate, up)}
    shapes |= {f"experts.{e}.{down}": (INNER, WIDTH) for e in range(EXPERTS)}
    places = {f"{inside}.{name}": shape for name, shape in shapes.items()}
    places |= {f"{inside}.gate": (WIDTH, EXPERTS), "self_attn.q_proj": (WIDTH, WIDTH)}
    weights = {}
    for layer in range(LAYERS):
        for name, (k, n) in places.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(r, k, generator=g) * 0.3
            weights[f"{at}.lora_B.weight"] = torch.randn(n, r, generator=g) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [gate, up, down, "gate", "q_proj"]
    peft.LoraConfig(r=r, lora_alpha=5, target_modules=targets).save_pretrained(folder)
