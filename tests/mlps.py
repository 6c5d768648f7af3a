"""Models with adapters on their MLPs, and what is asked of them."""

from __future__ import annotations

import torch

import peftkern
from tests.models import build
from tests.tiny import pair

MLP = ["gate_proj", "up_proj", "down_proj"]
SAYS = "trains as one operation with its MLP"


def adapted(family="llama", dtype=torch.float64, dropout=0.0, targets=None, **lora):
    """(peftkern's, HF PEFT's) model in training mode."""
    gpt2 = {"fan_in_fan_out": True} if family == "gpt2" else {}
    models = pair(
        family, "CAUSAL_LM", dtype, base=build(family, "CAUSAL_LM").to(dtype),
        lora_dropout=dropout, target_modules=targets or "all-linear", **gpt2, **lora,
    )  # fmt: skip
    return tuple(model.train() for model in models)


def mlps(model):
    return [m for m in model.modules() if hasattr(type(m), "peftkern_mlp_of")]


def words(model):
    return [row.reason for row in peftkern.explain(model) if "MLP" in row.reason]
