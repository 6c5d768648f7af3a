"""A prefix and a prompt by transformers alone, without an adapter library.

- A *prefix* is keys and values that are in the model's cache before the first token. The mask also
  covers them (they are always visible), and positions are counted from P. Encoders take no cache
  (from transformers 5.24): there the same keys and values are put in front inside attention.
- A *prompt* is embeddings in front of those of the tokens.

Generation runs the whole sequence again for each token, so that it cannot share a bug of a cache.
:func:`greedy` is such a loop; for beams and sampling, transformers' own loop runs over
:func:`recomputed`. Tests compare with this and with HF PEFT, or with this alone when
:func:`peft_is_right` is False.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers as tf
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Each layer's keys and values, [H, P, D] for all rows or [B, H, P, D] for each of them.
Prefixes = Sequence[tuple[Tensor, Tensor]]

TRANSFORMERS = Version(tf.__version__)
CACHE = "cache" if TRANSFORMERS >= Version("5.24.0.dev0") else "past_key_values"


# Where HF PEFT (0.21) is no oracle: from which transformers on, and why.
_WRONG = {
    "prefix generate": ("5.24", "it looks for past_key_values among what generate() hands on, "
    "where there is `cache`, and puts the prefix in again at each step"),
    "prompt generate": ("5.24", "for the same reason; but not of encoder-decoders"),
    "prefix of a head": ("5.24", "it refuses classifiers, taggers and question answering: they "
    "have no argument past_key_values"),
}  # fmt: skip


def peft_is_right(what: str = "prefix") -> bool:
    """True when HF PEFT's installed version is right, and so is an oracle, for ``what``.

    That is a "prefix" or "prompt" in a forward, "prefix of a head" (any but a language model's), or
    "prefix generate" or "prompt generate" (of decoders).
    """
    assert what in ("prefix", "prompt", *_WRONG), what
    return what not in _WRONG or TRANSFORMERS < Version(_WRONG[what][0] + ".0.dev0")


def with_prefix(model: Any, prefixes: Prefixes, **call: Any) -> Any:
    """The model's output for a call, behind a prefix.

    Args:
        call: of the tokens alone, as without a prefix: ``attention_mask`` [B, T] (of an
            encoder-decoder ``decoder_attention_mask``), ``position_ids`` counted from 0.
    """
    rows = len(next(x for x in call.values() if isinstance(x, Tensor)))
    P = prefixes[0][0].shape[-2]
    pairs = [tuple(x.expand(rows, *x.shape[-3:]) for x in pair) for pair in prefixes]
    mask = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    if is_encoder(model):
        call["position_ids"] = positions(model, call["input_ids"], P)
        with in_attention(model, pairs):
            return model(**call)
    if call.get(mask) is not None:
        call[mask] = F.pad(call[mask], (P, 0), value=1)
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + P
    cache: Any = tf.DynamicCache()
    for layer, pair in enumerate(pairs):
        cache.update(*pair, layer)
    if model.config.is_encoder_decoder:
        cache = tf.EncoderDecoderCache(cache, tf.DynamicCache())
    if takes(model, CACHE):
        return model(**call, **{CACHE: cache})
    # a head that has no such argument and may not hand it on: to the model under it
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, rest: (args, rest | {CACHE: cache}), with_kwargs=True
    )
    try:
        return model(**call)
    finally:
        hook.remove()


def with_prompt(model: Any, prompt: Tensor, **call: Any) -> Any:
    """The model's output for a call, behind a prompt: of P + T tokens, as HF PEFT gives it.

    Args:
        prompt: [P, d], the width of the input embeddings.
        call: of the tokens alone; ``position_ids`` are not handed on, as in HF PEFT.
    """
    ids = call.pop("input_ids")
    call.pop("position_ids", None)
    front, P = prompt.expand(len(ids), -1, -1), len(prompt)
    call["inputs_embeds"] = torch.cat([front, model.get_input_embeddings()(ids)], dim=1)
    fill = {"attention_mask": 1, "token_type_ids": 0}
    if not model.config.is_encoder_decoder and per_token(call.get("labels"), ids):
        fill["labels"] = -100
    for name, value in fill.items():
        if call.get(name) is not None:
            call[name] = F.pad(call[name], (P, 0), value=value)
    return model(**call)


def per_token(labels: Tensor | None, ids: Tensor) -> bool:
    return labels is not None and labels.shape == ids.shape


def is_encoder(model: Any) -> bool:
    """Tokens see those behind them in all attention, and no keys are kept."""
    ways = {m.is_causal for m in model.modules() if hasattr(m, "is_causal")}
    return ways == {False} and not model.config.is_encoder_decoder


def positions(model: Any, ids: Tensor, P: int) -> Tensor:
    """The positions of an encoder's tokens behind P others; models like RoBERTa skip padding."""
    embeddings = model.base_model.embeddings
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        pad = embeddings.padding_idx
        longer = F.pad(ids, (P, 0), value=pad + 1)
        return embeddings.create_position_ids_from_input_ids(longer, pad)[:, P:]
    return torch.arange(P, P + ids.shape[1]).expand_as(ids)


@contextlib.contextmanager
def in_attention(model: Any, pairs: Sequence[Any]) -> Iterator[None]:
    """Within the block the n-th call of attention has the n-th layer's keys and values in front."""
    name, left = model.config._attn_implementation, list(pairs)
    registered = ALL_ATTENTION_FUNCTIONS.get(name)

    def longer(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *a: Any, **rest: Any
    ) -> Any:
        keys, values = left.pop(0)
        if mask is not None:  # bool, or to be added
            mask = F.pad(mask, (keys.shape[-2], 0), value=mask.dtype == torch.bool)
        k, v = torch.cat([keys, k], dim=-2), torch.cat([values, v], dim=-2)
        # what is called eager stands in each model's own file
        plain = registered or sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, q, k, v, mask, *a, **rest)

    ALL_ATTENTION_FUNCTIONS[name] = longer
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
    assert not left, f"attention ran {len(pairs) - len(left)} times for {len(pairs)} layers"


Run = Callable[..., Any]  # with_prefix or with_prompt, with its model and prefix or prompt given


@torch.no_grad()
def greedy(model: Any, run: Run, batch: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """(ids, logits [steps, B, V]) of taking the most likely next token ``steps`` times.

    The ids are as ``generate`` returns them.
    """
    config, ids = model.config, batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    seq2seq, counts = config.is_encoder_decoder, takes(model, "position_ids")
    tokens = torch.full((len(ids), 1), config.decoder_start_token_id) if seq2seq else ids
    end, logits = getattr(model.generation_config, "eos_token_id", None), []
    done = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        if seq2seq:
            call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens}
        else:
            call = {"input_ids": tokens, "attention_mask": mask}
            if counts:  # generate counts real tokens alone
                call["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
            mask = F.pad(mask, (0, 1), value=1)
        logits.append(run(**call).logits[:, -1])
        chosen = logits[-1].argmax(-1).masked_fill(done, config.pad_token_id or 0)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if end is not None:
            done = done | (chosen == end)
            if done.all():
                break
    return tokens, torch.stack(logits)


def takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def recomputed(model: Any, run: Callable[[Any], Run]) -> Any:
    """A model whose ``generate`` runs the reference over the whole sequence for each token.

    Not for prompts of encoder-decoders: generate() runs the encoder by itself.

    Args:
        run: of a model, such as ``lambda m: partial(with_prefix, m, prefixes)``.
    """
    outer = copy.deepcopy(model)
    outer.generate = lambda **call: type(model).generate(outer, **call | {"use_cache": False})
    inner = run(model)
    outer.forward = functools.wraps(model.forward)(
        lambda **call: inner(**{k: v for k, v in call.items() if k not in (CACHE, "use_cache")})
    )
    return outer
