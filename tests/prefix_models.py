"""Tiny models with a prefix: peftkern's injection, the plain reference and HF PEFT's way, from the
same numbers.

Weights are drawn wide, so that attention is sharp and the prefix, its place and its order show in
the output far beyond rounding. Models are float64, so that nothing else may show.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn

from peftkern.tuners.prefix_tuning.inject import PrefixInjection
from tests.plain_reference import peft_is_right, recomputed, with_prefix
from tests.tiny import loss_of

VOCAB, WIDTH, HEADS, LAYERS, LABELS, P = 64, 32, 4, 2, 3, 5
_ABSENT = object()  # a setting that a class would keep without having a use for it
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _decoder(cls: type, **more: Any) -> Any:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "num_labels": LABELS,
        **_TOKENS,
    }
    settings |= more
    return cls(**{name: value for name, value in settings.items() if value is not _ABSENT})


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _gpt2(cls: type, **more: Any) -> Any:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    names = {**sizes, **drop, **_TOKENS, "vocab_size": VOCAB, "initializer_range": 0.3}
    return cls(**{**names, "num_labels": LABELS, **more})


def _bert(cls: type, **more: Any) -> Any:
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _decoder(cls, num_key_value_heads=_ABSENT, **drop, **more)


def _bart(cls: type) -> Any:
    each = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 24}
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in each.items()}
    drop = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    rest = {"d_model": WIDTH, "max_position_embeddings": 64, "init_std": 0.3, "vocab_size": VOCAB}
    start = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return cls(**sides, **drop, **rest, **start, **_TOKENS, num_labels=LABELS)


def _t5(cls: type) -> Any:
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 24, "num_heads": HEADS}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return cls(vocab_size=VOCAB, num_layers=LAYERS, dropout_rate=0.0, **sizes, **ids)


def _falcon(**more: Any) -> Any:
    drop = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _decoder(
        tf.FalconConfig, **{"num_key_value_heads": _ABSENT, "num_kv_heads": 2, **drop, **more}
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _decoder(tf.LlamaConfig),
    "gpt2": lambda: _gpt2(tf.GPT2Config),
    "bert": lambda: _bert(tf.BertConfig),
    "t5": lambda: _t5(tf.T5Config),
    "bart": lambda: _bart(tf.BartConfig),
    "mistral": lambda: _decoder(tf.MistralConfig, sliding_window=8),
    "gemma2": lambda: _decoder(
        tf.Gemma2Config,
        head_dim=8,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,  # tied, a random model repeats its last token
    ),
    "gemma3": lambda: _decoder(
        tf.Gemma3TextConfig,
        head_dim=8,
        tie_word_embeddings=False,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen2": lambda: _decoder(tf.Qwen2Config),
    "qwen3": lambda: _decoder(tf.Qwen3Config, head_dim=16),
    "qwen3_moe": lambda: _decoder(tf.Qwen3MoeConfig, head_dim=8, **_MOE),
    "mixtral": lambda: _decoder(tf.MixtralConfig, num_local_experts=4, sliding_window=None),
    "phi3": lambda: _decoder(tf.Phi3Config, resid_pdrop=0.0, embd_pdrop=0.0),
    "opt": lambda: _decoder(
        tf.OPTConfig,
        num_key_value_heads=_ABSENT,
        ffn_dim=24,
        word_embed_proj_dim=WIDTH,
        init_std=0.3,
        dropout=0.0,
    ),
    "gpt_neox": lambda: _decoder(
        tf.GPTNeoXConfig,
        num_key_value_heads=_ABSENT,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    "gpt_oss": lambda: _decoder(
        tf.GptOssConfig,
        head_dim=8,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "roberta": lambda: _bert(tf.RobertaConfig),
    "electra": lambda: _bert(tf.ElectraConfig, embedding_size=WIDTH),
    "mbart": lambda: _bart(tf.MBartConfig),
    "bloom": lambda: _decoder(
        tf.BloomConfig, num_key_value_heads=_ABSENT, n_layer=LAYERS, n_head=HEADS
    ),
    "gptj": lambda: _gpt2(tf.GPTJConfig, rotary_dim=4),
    "codegen": lambda: _gpt2(tf.CodeGenConfig, rotary_dim=4),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
        **_TOKENS,
    ),
    "falcon": lambda: _falcon(new_decoder_architecture=True),
    "falcon_mqa": lambda: _falcon(new_decoder_architecture=False, multi_query=True),
    "falcon_alibi": lambda: _falcon(
        new_decoder_architecture=False, multi_query=False, alibi=True, num_kv_heads=HEADS
    ),
    "mpt": lambda: tf.MptConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_heads=HEADS,
        n_layers=LAYERS,
        max_seq_len=64,
        initializer_range=0.3,
        **_TOKENS,
    ),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=VOCAB,
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=24,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.3,
        num_labels=LABELS,
        pad_token_id=0,
    ),
    "modernbert": lambda: _decoder(
        tf.ModernBertConfig,
        num_key_value_heads=_ABSENT,
        layer_types=["full_attention", "sliding_attention"],
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "layoutlm": lambda: _bert(tf.LayoutLMConfig),
    "stablelm": lambda: _decoder(tf.StableLmConfig),
    "phi": lambda: _decoder(tf.PhiConfig, embd_pdrop=0.0, resid_pdrop=0.0),
    "cohere": lambda: _decoder(tf.CohereConfig, logit_scale=1.0),
    "cohere2": lambda: _decoder(
        tf.Cohere2Config,
        logit_scale=1.0,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "olmo2": lambda: _decoder(tf.Olmo2Config),
    "granite": lambda: _decoder(tf.GraniteConfig),
    "starcoder2": lambda: _decoder(
        tf.Starcoder2Config, sliding_window=8, residual_dropout=0.0, embedding_dropout=0.0
    ),
    "smollm3": lambda: _decoder(tf.SmolLM3Config),
    "gemma": lambda: _decoder(tf.GemmaConfig, head_dim=8, tie_word_embeddings=False),
    "gpt_bigcode": lambda: _gpt2(tf.GPTBigCodeConfig),
    "qwen2_moe": lambda: _decoder(tf.Qwen2MoeConfig, shared_expert_intermediate_size=16, **_MOE),
    "mt5": lambda: _t5(tf.MT5Config),
    "xlm-roberta": lambda: _bert(tf.XLMRobertaConfig),
    "marian": lambda: _bart(tf.MarianConfig),
    "pegasus": lambda: _bart(tf.PegasusConfig),
    "blenderbot": lambda: _bart(tf.BlenderbotConfig),
}
TAIL = tuple(CONFIGS)[list(CONFIGS).index("phi") :]

IN_BLOCKS = (
    "bloom",
    "gptj",
    "gpt_neo",
    "codegen",
    "falcon",
    "falcon_mqa",
    "falcon_alibi",
    "mpt",
)
ENCODERS = ("bert", "roberta", "electra", "distilbert", "xlm-roberta")
WITHOUT_HEADS = ("layoutlm",)  # an encoder that PEFT refuses
SEQ2SEQ = ("t5", "bart", "mbart", "mt5", "marian", "pegasus", "blenderbot")
# what PEFT has to be told, because it would infer it wrongly or not at all
SIZES = {
    "gpt_bigcode": {"num_attention_heads": 1, "token_dim": WIDTH // HEADS},
    "falcon_mqa": {"num_attention_heads": 1, "token_dim": WIDTH // HEADS},
    "mpt": {"num_attention_heads": HEADS},
}
_CLASSES = {
    "FEATURE_EXTRACTION": tf.AutoModel,
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
}


def task_of(family: str) -> str:
    if family in (*ENCODERS, "modernbert"):
        return "SEQ_CLS"
    if family in WITHOUT_HEADS:
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"


@functools.cache
def _original(family: str, task: str, implementation: str | None, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    model = _CLASSES[task].from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
            elif weight.dim() == 2 and family in SEQ2SEQ + ("codegen", "gpt_oss"):
                weight.normal_(std=0.3)  # classes that draw some weights narrower than asked
            elif name.endswith("sinks"):
                weight.normal_()
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
    """What :class:`PrefixInjection` was told for this pair."""
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
