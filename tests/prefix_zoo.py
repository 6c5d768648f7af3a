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
import pytest
import torch
import transformers as tf
from torch import Tensor

import peftkern
from peftkern.utils.versions import cache_name
from tests.plain_reference import is_encoder, peft_is_right, recomputed, with_prefix
from tests.prefix_models import (
    _ABSENT,
    LABELS,
    LAYERS,
    VOCAB,
    WIDTH,
    P,
    _bart,
    _bert,
    _decoder,
    inputs,
    split,
)
from tests.prefix_models import (
    HEADS as H,
)
from tests.tiny import loss_of

_AS_DECODER = {"is_decoder": True, "tie_word_embeddings": False}


def _led() -> Any:
    config = _bart(tf.LEDConfig)
    config.attention_window = [4, 4]
    config.max_encoder_position_embeddings = config.max_decoder_position_embeddings = 64
    return config


def _bigbird_pegasus() -> Any:
    config = _bart(tf.BigBirdPegasusConfig)
    config.attention_type = "original_full"
    return config


def _seamless(cls: type) -> Any:
    config = cls(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        speech_encoder_layers=1,
        t2u_encoder_layers=1,
        t2u_decoder_layers=1,
        max_position_embeddings=64,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_hidden_layers=LAYERS,
    )
    config.pad_token_id, config.decoder_start_token_id = 0, 3
    return config


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
    "eurobert": (
        "FEATURE_EXTRACTION",
        lambda: _decoder(tf.EuroBertConfig, mask_token_id=3, num_key_value_heads=2),
    ),
    # whose attention is not reached: through the cache
    "roformer": ("TOKEN_CLS", lambda: _bert(tf.RoFormerConfig, embedding_size=WIDTH)),
    "roformer decoder": (
        "CAUSAL_LM",
        lambda: _bert(tf.RoFormerConfig, embedding_size=WIDTH, **_AS_DECODER),
    ),
    "ctrl": (
        "CAUSAL_LM",
        lambda: tf.CTRLConfig(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=WIDTH,
            dff=24,
            n_layer=LAYERS,
            n_head=H,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            pad_token_id=0,
            num_labels=LABELS,
            tie_word_embeddings=False,
        ),
    ),
    "jetmoe": (
        "CAUSAL_LM",
        lambda: _decoder(
            tf.JetMoeConfig,
            num_attention_heads=_ABSENT,
            kv_channels=8,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "recurrent_gemma": (
        "CAUSAL_LM",
        lambda: _decoder(
            tf.RecurrentGemmaConfig,
            lru_width=WIDTH,
            attention_window_size=32,
            block_types=["recurrent", "attention"],
            num_key_value_heads=1,
            tie_word_embeddings=False,
            max_position_embeddings=_ABSENT,
        ),
    ),
    "big_bird": (
        "TOKEN_CLS",
        lambda: _bert(tf.BigBirdConfig, attention_type="original_full", use_bias=True),
    ),
    "llama4": (
        "CAUSAL_LM",
        lambda: _decoder(
            tf.Llama4TextConfig,
            intermediate_size_mlp=24,
            num_local_experts=2,
            num_experts_per_tok=1,
            head_dim=8,
            attention_chunk_size=32,
        ),
    ),
    "mvp": ("SEQ_2_SEQ_LM", lambda: _bart(tf.MvpConfig)),
    "led": ("SEQ_2_SEQ_LM", _led),
    "bigbird_pegasus": ("SEQ_2_SEQ_LM", _bigbird_pegasus),
    "seamless_m4t": ("SEQ_2_SEQ_LM", lambda: _seamless(tf.SeamlessM4TConfig)),
    "seamless_m4t_v2": ("SEQ_2_SEQ_LM", lambda: _seamless(tf.SeamlessM4Tv2Config)),
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


HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def pairs_of(model: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values that a model with a prefix has in front, for each layer."""
    config = model.peft_config["default"]
    two = config.num_transformer_submodules == 2
    return split(weight_of(model), config.num_attention_heads, config.num_layers, two)


def oracle(ours: Any, family: str, task: str | None = None) -> Any:
    """What to call for the right output: HF PEFT's model with the same prefix, or where HF PEFT is
    none (:func:`peft_is_right`) the prefix in the cache of the model itself."""
    task = task or FAMILIES[family][0]
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
    task = task or FAMILIES[family][0]
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


def real(batch: dict[str, Any], logits: Tensor) -> Tensor:
    """The logits of tokens that are no padding."""
    mask = batch.get("attention_mask")
    seen = mask is not None and logits.dim() == 3 and logits.shape[1] == mask.shape[1]
    return logits[mask.bool()] if seen else logits


def gradient(
    model: Any, batch: dict[str, Any], run: Callable[..., Any] | None = None
) -> tuple[Any, Tensor]:
    """The output of a call, and the gradient that its loss (or what :func:`tests.tiny.loss_of`
    makes of it) gives the prefix of ``model``; ``run``: the call is one of this."""
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
