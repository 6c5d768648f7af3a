"""Tiny models with the same prefix: by peftkern's injection, the plain reference, and HF PEFT.

Weights are drawn large, so that attention is sharp, and an error in the prefix, its place or its
order changes the output far beyond rounding. Models are float64, so that nothing else changes it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests import models
from tests.models import LABELS, LAYERS, SEQ2SEQ, VOCAB
from tests.plain_reference import peft_is_right, recomputed, with_prefix
from tests.tiny import loss_of

WIDTH, HEADS, P = 32, 4, 5
_SIZES = {"width": WIDTH, "heads": HEADS, "kv": 2, "std": 0.3}

NAMES = """llama gpt2 bert t5 bart mistral gemma2 gemma3 qwen2 qwen3 qwen3_moe mixtral phi3 opt
gpt_neox gpt_oss roberta electra mbart bloom gptj codegen gpt_neo falcon falcon_mqa falcon_alibi mpt
distilbert modernbert layoutlm stablelm""".split()
TAIL = """phi cohere cohere2 olmo2 granite starcoder2 smollm3 gemma gpt_bigcode qwen2_moe mt5
xlm-roberta marian pegasus blenderbot""".split()
NAMES += TAIL

IN_BLOCKS = ("bloom", "gptj", "gpt_neo", "codegen", "falcon", "falcon_mqa", "falcon_alibi", "mpt")
ENCODERS = ("bert", "roberta", "electra", "distilbert", "xlm-roberta")
WITHOUT_HEADS = ("layoutlm",)  # an encoder that PEFT refuses
# what PEFT has to be told, because it would infer it wrongly or not at all
SIZES = {
    "gpt_bigcode": {"num_attention_heads": 1, "token_dim": WIDTH // HEADS},
    "falcon_mqa": {"num_attention_heads": 1, "token_dim": WIDTH // HEADS},
    "mpt": {"num_attention_heads": HEADS},
}


def task_of(family: str) -> str:
    return "FEATURE_EXTRACTION" if family in WITHOUT_HEADS else models.task_of(family)


def settings(family: str) -> dict[str, Any]:
    # tied, a random model repeats its last token
    return {**_SIZES, **({"tie_word_embeddings": False} if family == "gemma" else {})}


def config(family: str, **own: Any) -> Any:
    return models.config(family, **settings(family), **own)


@functools.cache
def _original(family: str, task: str, implementation: str | None, dtype: torch.dtype) -> nn.Module:
    model = models.build(family, task, 0.3, implementation, **settings(family))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # every row runs to the end
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other has no float64
    return model.to(dtype).eval()


def make(
    family: str,
    task: str | None = None,
    implementation: str | None = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A fresh tiny model; the same weights for the same arguments."""
    return copy.deepcopy(_original(family, task or task_of(family), implementation, dtype))


def split(weight: Tensor, heads: int, layers: int, seq2seq: bool) -> list[tuple[Tensor, Tensor]]:
    """PEFT's prefix weights [P, 2 * layers * heads * D] as keys and values [heads, P, D] a layer.

    Of an encoder-decoder PEFT reads them in its own order (PREFIX layout of two submodules).
    """
    parts = weight.view(weight.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    step = 4 if seq2seq else 2
    n = 2 * layers
    return [(parts[step * i % n], parts[(step * i + 1) % n]) for i in range(layers)]


class Pair:
    """One model and one prefix: with peftkern's injection, as the plain reference, as HF PEFT's."""

    def __init__(
        self,
        family: str,
        task: str | None = None,
        virtual: int = P,
        peft_too: bool = True,
        implementation: str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.family, self.task = family, task or task_of(family)
        self.seq2seq = family in SEQ2SEQ
        self.model = make(family, self.task, implementation, dtype)
        self.base = make(family, self.task, implementation, dtype)
        config = peft.PrefixTuningConfig(
            task_type=self.task, num_virtual_tokens=virtual, **SIZES.get(family, {})
        )
        self.peft: Any = None
        torch.manual_seed(1)
        if peft_too:
            self.peft = peft.get_peft_model(make(family, self.task, implementation, dtype), config)
            encoder = self.peft.prompt_encoder["default"]
            self.heads, width = config.num_attention_heads, config.token_dim
            self.peft.eval()
        else:
            self.heads, encoder = HEADS, None
            sizes = getattr(self.base.config, "num_key_value_heads", None)
            self.heads = 1 if family == "falcon_mqa" else sizes or HEADS
            width = self.heads * (getattr(self.base.config, "head_dim", None) or WIDTH // HEADS)
        layers = config.num_layers or LAYERS
        weight = torch.randn(virtual, 2 * layers * width).to(dtype)
        if encoder is not None:
            encoder.to(dtype)
            with torch.no_grad():
                encoder.embedding.weight.copy_(weight)
        self.weight = weight.requires_grad_()
        self.layers, self.virtual = layers, virtual
        self.injection = PrefixInjection(
            self.model,
            num_layers=layers,
            kv_heads=self.heads,
            head_dim=width // self.heads,
            num_virtual_tokens=virtual,
        )

    def prefixes(self, weight: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        return split(
            self.weight if weight is None else weight, self.heads, self.layers, self.seq2seq
        )

    def active(self, **more: Any) -> Any:
        return self.injection.active(self.prefixes(), **more)

    def plain(self, **call: Any) -> Any:
        """The plain reference's output."""
        return with_prefix(self.base, self.prefixes(), **call)

    def oracles(self) -> list[tuple[Callable[..., Any], Tensor]]:
        """Those who know what a call gives, each with the weight that its gradient belongs to."""
        found: list[tuple[Callable[..., Any], Tensor]] = [(self.plain, self.weight)]
        head = self.task in ("SEQ_CLS", "TOKEN_CLS")
        if self.peft is not None and peft_is_right("prefix of a head" if head else "prefix"):
            found.append((self.peft, self.peft_weight))
        return found

    def generators(self) -> list[Callable[..., Tensor]]:
        """The ``generate`` of those who know what it gives, by any way of drawing tokens."""
        prefixes = [(k.detach(), v.detach()) for k, v in self.prefixes()]
        plain = recomputed(self.base, lambda model: partial(with_prefix, model, prefixes))
        found: list[Callable[..., Tensor]] = [plain.generate]
        if self.peft is not None and peft_is_right("prefix generate"):
            found.append(self.peft.generate)
        return found

    @property
    def peft_weight(self) -> Tensor:
        return self.peft.prompt_encoder["default"].embedding.weight


def inputs(family: str, padding: str | None = "right", task: str | None = None) -> dict[str, Any]:
    """A batch of three with labels; "left" or "right" padding, or None for no mask at all."""
    task = task or task_of(family)
    g = torch.Generator().manual_seed(3)
    B, T = 3, 9
    ids = torch.randint(3, VOCAB, (B, T), generator=g)
    batch: dict[str, Any] = {"input_ids": ids}
    if padding is not None:
        mask = torch.ones_like(ids)
        for row, n in ((1, 3), (2, 1)):
            where = slice(None, n) if padding == "left" else slice(T - n, None)
            mask[row, where] = 0
        ids[mask == 0] = 0
        batch["attention_mask"] = mask
    if task == "SEQ_CLS":
        batch["labels"] = torch.randint(0, LABELS, (B,), generator=g)
    elif task == "TOKEN_CLS":
        batch["labels"] = torch.randint(0, LABELS, (B, T), generator=g)
    elif task == "SEQ_2_SEQ_LM":
        batch["labels"] = torch.randint(3, VOCAB, (B, 6), generator=g)
    else:
        batch["labels"] = ids.masked_fill(ids == 0, -100)
    return batch


def alone(family: str, **more: Any) -> Pair:
    """A pair without its PEFT half."""
    return Pair(family, peft_too=False, **more)


def sizes(pair: Pair) -> dict[str, int]:
    """The sizes that :class:`PrefixInjection` was given for this pair."""
    injection = pair.injection
    return {
        "num_layers": pair.layers,
        "kv_heads": injection.kv_heads,
        "head_dim": injection.head_dim,
        "num_virtual_tokens": injection.num_virtual_tokens,
    }


def real(batch: dict[str, Any], logits: Tensor) -> Tensor:
    """The logits of real tokens: those of padding are nobody's business."""
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() != 3 or logits.shape[1] != mask.shape[1]:
        return logits
    return logits[mask.bool()]


def numbers(batch: dict[str, Any], output: Any, weight: Tensor) -> dict[str, Tensor]:
    """All that a call gives: logits, the loss, and the gradient of the prefix's weight."""
    gradient = torch.autograd.grad(output.loss, weight)[0]
    return {"logits": real(batch, output.logits), "loss": loss_of(output), "gradient": gradient}
