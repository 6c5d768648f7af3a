"""A model with LoRA in every linear layer, which trains for some steps, without HF PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import peftkern
from tests.models import build


def tiny_llama() -> Any:
    """A tiny Llama in training mode, of sizes that do not divide each other."""
    return build("llama", width=48, inner=64, heads=4, kv=2, layers=1, vocab=50).train()


def adapted(base: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **settings
    )
    return peftkern.get_peft_model(copy.deepcopy(base), config)


def train(model: Any, ids: Tensor, steps: int, after: Callable[[], Any] = lambda: None) -> Tensor:
    """The losses of the steps; ``after`` is called after each step.

    With SGD: Adam's steps have their size even where a gradient is noise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        after()
    return torch.stack(losses)
