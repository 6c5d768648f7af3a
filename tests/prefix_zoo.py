"""Tiny float64 models of families whose attention is unlike the others', adapted by both libraries.

Weights are drawn wide, so that attention is sharp and the prefix shows far beyond rounding.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor

import peftkern
from tests.prefix_models import WIDTH, P, _bert, _decoder, inputs

_AS_DECODER = {"is_decoder": True, "tie_word_embeddings": False}

# (task, configuration)
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "doge": ("CAUSAL_LM", lambda: _decoder(tf.DogeConfig, keep_window_size=8)),
    "doge window": ("CAUSAL_LM", lambda: _decoder(tf.DogeConfig, sliding_window=7)),
    "diffllama": ("CAUSAL_LM", lambda: _decoder(tf.DiffLlamaConfig, attention_dropout=0.0)),
    "megatron-bert": ("SEQ_CLS", lambda: _bert(tf.MegatronBertConfig)),
    "megatron-bert decoder": ("CAUSAL_LM", lambda: _bert(tf.MegatronBertConfig, **_AS_DECODER)),
    "rembert": ("TOKEN_CLS", lambda: _bert(tf.RemBertConfig, input_embedding_size=WIDTH)),
    "rembert decoder": (
        "CAUSAL_LM",
        lambda: _bert(
            tf.RemBertConfig, input_embedding_size=WIDTH, output_embedding_size=WIDTH, **_AS_DECODER
        ),
    ),
}
CLASSES = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": tf.AutoModel,
}


@functools.cache
def _original(family: str, task: str) -> Any:
    torch.manual_seed(0)
    model = CLASSES[task].from_config(FAMILIES[family][1]()).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "position" not in name:
                weight.normal_(std=0.3)
            elif name.endswith("self_attn.A"):  # Doge keeps the largest of what are equal zeros
                weight.normal_()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # every row runs to the end
    return model.double().eval()


def make(family: str, task: str | None = None) -> Any:
    """A fresh model in eval mode; the same weights for the same arguments."""
    return copy.deepcopy(_original(family, task or FAMILIES[family][0]))


def tuned(library: Any, family: str, task: str | None = None, **more: Any) -> Any:
    """The family's model with a prefix of the same numbers, made by either library."""
    task = task or FAMILIES[family][0]
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


def weight_of(model: Any, adapter: str = "default") -> Tensor:
    return model.prompt_encoder[adapter].embedding.weight


def batch_of(family: str, padding: str | None = None, task: str | None = None) -> dict[str, Any]:
    """A batch of three with labels; "left" or "right" padding, or None for no mask at all."""
    return inputs("", padding, task or FAMILIES[family][0])


def real(batch: dict[str, Any], logits: Tensor) -> Tensor:
    """The logits of tokens that are no padding."""
    mask = batch.get("attention_mask")
    seen = mask is not None and logits.dim() == 3 and logits.shape[1] == mask.shape[1]
    return logits[mask.bool()] if seen else logits


def gradient(model: Any, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    """The output of a call with labels, and the prefix's gradient."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, weight_of(model).grad.clone()
