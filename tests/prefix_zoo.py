"""Tiny float64 models of any family with a prefix, adapted by both libraries."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftkern
from peftkern.utils.versions import cache_name
from tests import prefix_models
from tests.plain_reference import is_encoder, peft_is_right, recomputed, with_prefix
from tests.prefix_models import P, inputs, split
from tests.prefix_models import real as real  # for the tests
from tests.tiny import loss_of

# the task of an encoder, where it is not to tell classes of texts
_TASKS = {"eurobert": "FEATURE_EXTRACTION"}
_TASKS |= dict.fromkeys(("rembert", "roformer", "big_bird"), "TOKEN_CLS")


def task_of(family: str) -> str:
    return _TASKS.get(family) or prefix_models.task_of(family)


def make(family: str, task: str | None = None) -> Any:
    """A fresh model in eval mode; the same weights for the same arguments."""
    return prefix_models.make(family, task or task_of(family))


def tuned(library: Any, family: str, task: str | None = None, **more: Any) -> Any:
    """The family's model with a prefix of the same numbers, made by either library."""
    task = task or task_of(family)
    config = library.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **more)
    with warnings.catch_warnings():
        if library is peft:
            warnings.simplefilter("ignore")
        model = library.get_peft_model(make(family, task), config)
    with torch.no_grad():
        weight_of(model).normal_(generator=torch.Generator().manual_seed(1))
    return model.double().eval()


def pair(family: str, task: str | None = None, **more: Any) -> tuple[Any, Any]:
    """(peftkern's, HF PEFT's)."""
    return tuned(peftkern, family, task, **more), tuned(peft, family, task, **more)


HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def pairs_of(model: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a model with a prefix has in front, for each layer."""
    config = model.peft_config["default"]
    two = config.num_transformer_submodules == 2
    return split(weight_of(model), config.num_attention_heads, config.num_layers, two)


def oracle(ours: Any, family: str, task: str | None = None) -> Any:
    """The function that gives the right output: HF PEFT's model with the same prefix.

    When HF PEFT is wrong (:func:`peft_is_right`), it is the model with the prefix in its cache.
    """
    task = task or task_of(family)
    if peft_is_right("prefix of a head" if task in HEADS else "prefix"):
        return tuned(peft, family, task)
    base = make(family, task)
    if task in HEADS and cache_name(base.base_model) is None and not is_encoder(base):
        pytest.skip("there is no oracle: it takes no cache, and its attention no other's")
    return lambda **call: with_prefix(base, pairs_of(ours), **call)


def generated(ours: Any, family: str, batch: dict[str, Any], **how: Any) -> Tensor:
    """The tokens that are right, drawn after ``manual_seed(0)``."""
    if peft_is_right("prefix generate"):
        model = tuned(peft, family)
    else:
        run = functools.partial
        model = recomputed(make(family), lambda m: run(with_prefix, m, pairs_of(ours)))
        how["use_cache"] = False
    torch.manual_seed(0)
    return model.generate(**batch, **how)


def weight_of(model: Any, adapter: str = "default") -> Tensor:
    return model.prompt_encoder[adapter].embedding.weight


def batch_of(family: str, padding: str | None = None, task: str | None = None) -> dict[str, Any]:
    """A batch of three with labels; "left" or "right" padding, or None for no mask at all."""
    task = task or task_of(family)
    batch = inputs("", padding, task)
    if task == "FEATURE_EXTRACTION":
        del batch["labels"]
    elif task == "QUESTION_ANS":
        del batch["labels"]
        batch |= {
            "start_positions": torch.tensor([4, 5, 6]),
            "end_positions": torch.tensor([6, 7, 8]),
        }
    return batch


def gradient(
    model: Any, batch: dict[str, Any], run: Callable[..., Any] | None = None
) -> tuple[Any, Tensor]:
    """(output, gradient of the prefix of ``model``) of a call.

    The gradient is that of :func:`tests.tiny.loss_of` the output. With ``run``, that is called
    instead of ``model``.
    """
    weight = weight_of(run if isinstance(run, peft.PeftModel) else model)
    weight.grad = None
    output = (run or model)(**batch)
    loss_of(output).backward()
    assert weight.grad is not None
    return output, weight.grad.clone()


def checkpoints(model: Any, what: str, *args: Any) -> None:
    """ "enable" or "disable" them: transformers 5.23 has a new name, and warns of the old one."""
    new = getattr(model, f"activation_checkpointing_{what}", None)
    (new or getattr(model, f"gradient_checkpointing_{what}"))(*args)
