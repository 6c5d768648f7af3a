"""Tiny models made from configurations, their inputs, and pairs adapted by peftkern and HF PEFT.

The pairs start from the same numbers: one base model is copied, and B, which LoRA starts at zero,
is drawn at random so that the update takes part in every comparison.
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftkern
from tests.models import LABELS, VOCAB, build

# every family with every task that it has a head for
CASES = [
    *[
        ("llama", t)
        for t in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
    ],
    *[
        ("gpt2", t)
        for t in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
    ],
    *[("bert", t) for t in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")],
    *[("t5", t) for t in ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")],
    *[("qwen2", t) for t in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")],
    *[("gemma", t) for t in ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")],
]


@functools.cache
def _original(family: str, task: str | None) -> nn.Module:
    return build(family, task)


def make(family: str, task: str | None = "CAUSAL_LM", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh tiny model; the same weights for the same arguments."""
    return copy.deepcopy(_original(family, task)).to(dtype)


def inputs(
    family: str, task: str | None = "CAUSAL_LM", batch: int = 3, length: int = 7
) -> dict[str, Tensor]:
    """Token ids, a mask with padding in it, and the labels of the task. Same values each time."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (batch, length), generator=g)
    mask = torch.ones_like(ids)
    if batch > 1 and family not in ("gpt2", "t5"):
        mask[1, -2:] = 0
        ids[1, -2:] = 0
    out = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        if family == "t5":  # its classifier reads the state at the end-of-sequence token
            ids[:, -1] = 2
        out["labels"] = torch.randint(0, LABELS, (batch,), generator=g)
    elif task == "TOKEN_CLS":
        out["labels"] = torch.randint(0, LABELS, (batch, length), generator=g)
    elif task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        out["labels"] = torch.randint(3, VOCAB, (batch, length), generator=g)
    elif task == "QUESTION_ANS":
        out["start_positions"] = torch.randint(0, length, (batch,), generator=g)
        out["end_positions"] = torch.randint(0, length, (batch,), generator=g)
    return out


def fill(model: nn.Module, adapter: str | None = None, seed: int = 2) -> None:
    """Random numbers in every adapter weight (of one adapter), the same for the same names."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "lora_" in name and (adapter is None or f".{adapter}" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)


def pair(
    family: str,
    task: str | None = "CAUSAL_LM",
    dtype: torch.dtype = torch.float32,
    autocast_adapter_dtype: bool = True,
    base: Any = None,
    **lora: Any,
) -> tuple[Any, Any]:
    """(peftkern's, HF PEFT's) model with equal weights, LoRA of the given settings in both.

    The numbers are the same in every dtype, up to its rounding: fp32 is judged by float64.
    """
    base = make(family, task, dtype) if base is None else base
    lora = {"r": 4, "lora_alpha": 8, **lora}
    other = copy.deepcopy(base)
    how = {"autocast_adapter_dtype": autocast_adapter_dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type=task, **lora), **how)
        theirs = peft.get_peft_model(other, peft.LoraConfig(task_type=task, **lora), **how)
    for model in (ours, theirs):
        fill(model)
    return ours, theirs


def first(output: Any) -> Tensor:
    """The tensor a comparison is made on: logits, start logits, or hidden states."""
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output[0] if isinstance(output, tuple) else output


def loss_of(output: Any) -> Tensor:
    """The model's loss, or a scalar made of the hidden states where the task has none.

    Of a float64 model in float64, though transformers computes that of a language model in fp32.
    """
    loss, hidden = getattr(output, "loss", None), first(output)
    if loss is not None:
        return loss.double() if hidden.dtype == torch.float64 else loss
    weights = torch.linspace(
        -1, 1, hidden.numel(), dtype=hidden.dtype
    ).cos()  # no symmetry that a norm hides
    return (hidden * weights.view_as(hidden)).mean()


def gradients(
    model: nn.Module, batch: dict[str, Any], seed: int = 5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient, by parameter name; the generator starts from ``seed``."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model(**batch))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, batch: dict[str, Any], seed: int = 5) -> dict[str, Tensor]:
    """All numbers of a training step: the output, the loss and every gradient by its name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**batch)
    loss = loss_of(output)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": first(output).detach(), "loss": loss.detach(), **grads}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refused call must leave as it was: weights, flags, classes, configurations."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "adapters": sorted(getattr(model, "peft_config", None) or {}),
        "active": list(model.active_adapters) if isinstance(model, peftkern.PeftModel) else None,
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """Check a model against :func:`snapshot`, bit for bit."""
    now = snapshot(model)
    assert now["tensors"].keys() == before["tensors"].keys()
    for key, value in before["tensors"].items():
        assert torch.equal(now["tensors"][key], value), key
    for what in ("flags", "classes", "training", "adapters", "active"):
        assert now[what] == before[what], what
