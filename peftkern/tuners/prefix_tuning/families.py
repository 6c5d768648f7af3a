"""The structure of model families: their layers, self-attention modules and positions.

There are two kinds of families. Most models call their attention through transformers'
``AttentionInterface``; for these only the place of the attention is stated. The others compute it
inside the layer, and get the prefix through the cache object and the mask that their layers are
called with (blocks.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...utils.private import asks_for_attention, forward_of
from . import deberta
from .attention import foreign


@dataclass(frozen=True)
class Family:
    """The attribute paths to the parts of a model family that take a prefix.

    Args:
        layers: path from the module that owns the layers to the list of them.
        attention: path from a layer to its self-attention.
        positions: how tokens are numbered: "ids" (``position_ids``, counted from the cache), "mask"
            (OPT: counted over the mask), "tokens" (RoBERTa: counted over tokens that are not
            padding), "table" (BART: counted inside, at the table ``embed_positions``), "none" (only
            a bias by distance).
        table: path to the learned positions, or the configuration's attribute that bounds them.
        block: for layers that compute attention themselves, the name of their argument for the
            bias by distance ("" without one); None for the others.
        window: for layers with ``block``, the attribute of the configuration that holds the window.
        until_interface: for layers with ``block``: True when newer transformers call this attention
            through the interface; with those, the family is of the first kind.
    """

    layers: str
    attention: str
    positions: str = "ids"
    table: str | None = None
    block: str | None = None
    window: str | None = None
    until_interface: bool = False


_DECODER = Family("layers", "self_attn")
_BERT = Family("encoder.layer", "attention.self", table="embeddings.position_embeddings")
_BERT_BLOCK = replace(_BERT, block="", until_interface=True)
_ROBERTA = Family("encoder.layer", "attention.self", "tokens", "embeddings.position_embeddings")
_BART = Family("layers", "self_attn", "table", "embed_positions")
_T5 = Family("block", "layer.0.SelfAttention", "none")
_GPT2 = Family("h", "attn", table="wpe")
_GPTJ = Family("h", "attn", table="max_position_embeddings", block="", until_interface=True)
_DEBERTA = replace(_BERT, block="relative_pos")

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "opt": Family("layers", "self_attn", "mask", "embed_positions"),
    "gpt_neox": Family("layers", "attention"),
    "bert": _BERT,
    "electra": _BERT,
    "ernie": _BERT,
    "roc_bert": _BERT,
    "bert-generation": _BERT,
    "layoutlm": _BERT,
    "megatron-bert": _BERT_BLOCK,
    "rembert": _BERT_BLOCK,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "xmod": _ROBERTA,
    "distilbert": Family("transformer.layer", "attention", table="embeddings.position_embeddings"),
    "modernbert": Family("layers", "attn"),
    "modernbert-decoder": Family("layers", "attn"),
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA,
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "longt5": _T5,
    "switch_transformers": _T5,
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "pegasus": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "plbart": _BART,
    "pegasus_x": _BART,
    "m2m_100": _BART,
    "nllb-moe": _BART,
    "whisper": Family("layers", "self_attn", table="embed_positions"),
    "bloom": Family("h", "self_attention", "none", block="alibi"),
    "falcon": Family("h", "self_attention", block="alibi"),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neo": Family("h", "attn.attention", table="wpe", block="", until_interface=True),
    "gpt_neox_japanese": Family("layers", "attention", block="", until_interface=True),
    "xglm": Family(
        "layers",
        "self_attn",
        table="max_position_embeddings",
        block="",
        until_interface=True,
    ),
    "eurobert": Family("layers", "self_attn", "none"),  # through its cache positions do not move
    "doge": Family("layers", "self_attn", block="", window="sliding_window"),
    "diffllama": Family("layers", "self_attn", block=""),
    "mpt": Family("blocks", "attn", "none", table="max_seq_len", block="position_bias"),
}


def at(module: Any, path: str) -> Any:
    """The attribute at a dotted path, where a number is an index; None if there is none."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


@dataclass(frozen=True)
class Found:
    """The module that owns the layers, with its layers and their attention modules."""

    stack: PreTrainedModel
    name: str  # name of the stack in the model
    family: Family
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]

    @property
    def configs(self) -> list[Any]:
        """The configurations that name the attention function of these layers.

        Empty for layers that compute attention themselves.
        """
        if self.family.block is not None:
            return []
        named = (self.stack, *(m for m in self.attentions if hasattr(m, "config")))
        return list({id(m.config): m.config for m in named}.values())


class NotInjectable(ValueError):
    """A model's attention cannot be reached; ``why`` is the reason without the model's name."""

    def __init__(self, model: nn.Module, why: str) -> None:
        super().__init__(f"prefix tuning does not support {type(model).__name__}: {why}")
        self.why = why


def refuse(model: nn.Module, why: str) -> NotInjectable:
    return NotInjectable(model, why)


# The ``model_type`` of models whose injection our tests compare with keys and values in the model's
# cache; for models of images and text, their own and that of the text part. Other models are
# compared when they get their first prefix (check.py).
VERIFIED = frozenset(
    """
    bart bert bert-generation blenderbot blenderbot-small bloom camembert codegen cohere cohere2
    data2vec-text deberta deberta-v2 diffllama distilbert doge electra ernie eurobert falcon gemma
    gemma2 gemma3_text gemma3n_text gemma4_text gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gpt_oss gptj granite layoutlm llama llava longt5 m2m_100 marian mbart megatron-bert mistral
    mixtral modernbert modernbert-decoder mpt mt5 nemotron nllb-moe olmo2 opt pegasus pegasus_x phi
    phi3 plbart qwen2 qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen3 qwen3_moe rembert roberta
    roberta-prelayernorm roc_bert smollm3 stablelm starcoder2 switch_transformers t5 umt5 whisper
    xglm xlm-roberta xlm-roberta-xl xmod
    """.split()
)


def is_verified(model: nn.Module, here: Found) -> bool:
    """True when our tests verify injection into this kind of model and all its parts are as there.

    The model, its layers, attention modules and attention functions must be transformers' own.
    """
    kinds = {getattr(getattr(m, "config", None), "model_type", "") for m in (model, here.stack)}
    parts = (model, here.stack, *here.layers, *here.attentions)
    own = all(_is_transformers_own(part) for part in parts)
    return own and kinds <= VERIFIED and not any(foreign(config) for config in here.configs)


def _is_transformers_own(module: nn.Module) -> bool:
    forward = forward_of(module)
    places = (type(module).__module__, getattr(forward, "__module__", None) or "")
    return all(place.startswith("transformers.") for place in places)


def _candidate(name: str, stack: nn.Module) -> Found | None:
    if not isinstance(stack, PreTrainedModel):
        return None
    family = FAMILIES.get(getattr(stack.config, "model_type", ""), _DECODER)
    layers = at(stack, family.layers)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return None
    attentions = tuple(at(layer, family.attention) for layer in layers)
    if not all(isinstance(a, nn.Module) for a in attentions):
        return None
    if family.until_interface and all(asks_for_attention(a) for a in attentions):
        family = replace(family, block=None)
    return Found(stack, name, family, tuple(layers), attentions)


def find(model: nn.Module, num_layers: int) -> Found:
    """The layers of ``model`` that get a prefix: the decoder's, or the only ones that it has.

    Raises:
        ValueError: names the model's class and why it is not supported.
    """
    config: Any = getattr(model, "config", None)
    found = [f for name, m in model.named_modules() if (f := _candidate(name, m)) is not None]
    if getattr(config, "is_encoder_decoder", False) and len(found) > 1:
        found = [f for f in found if "decoder" in f.name.split(".")]
    # in a model of text and images or sound, the text part
    if len(found) > 1 and hasattr(config, "get_text_config"):
        text = config.get_text_config()
        found = [f for f in found if f.stack.config is text]
    if not found:
        raise refuse(model, "no layers with a self-attention module of a known name were found")
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise refuse(model, f"several parts of it could take the prefix ({names})")
    here = found[0]
    if len(here.layers) != num_layers:
        raise refuse(model, f"num_layers is {num_layers}, it has {len(here.layers)} layers")
    config = here.stack.config
    if getattr(config, "attention_chunk_size", None) is not None:
        raise refuse(model, "its attention works in chunks, in which a prefix has no place")
    if here.family.block == "relative_pos" and (reason := deberta.why_not(config)):
        raise refuse(model, reason)
    if here.family.block is None:
        for layer in here.attentions:
            if not asks_for_attention(layer):
                reason = f"{type(layer).__name__} does not call transformers' AttentionInterface"
                raise refuse(model, reason)
    if here.family.positions == "ids":
        parameters = inspect.signature(here.stack.forward).parameters
        if "position_ids" not in parameters:
            reason = f"{type(here.stack).__name__} takes no position_ids to move by the prefix"
            raise refuse(model, reason)
    return here
