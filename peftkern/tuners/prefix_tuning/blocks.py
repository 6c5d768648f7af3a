"""Prefixes for layers that compute attention themselves, through their cache object and mask.

These are Bloom, Falcon, GPT-J, GPT-Neo, CodeGen, MPT and others; Doge and DiffLlama, which change
the keys before they call transformers' AttentionInterface; and DeBERTa, by another mechanism
(deberta.py).

Their attention asks one object for the keys of earlier tokens, and adds one mask. A hook before
each layer hands it an object that puts the prefix before those keys, and a mask that is P columns
wider. The cache itself never holds the prefix. transformers checkpoints the layer's ``forward``,
which runs after the hook, so a replay is given the same objects.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...utils.private import attention_name
from ...utils.versions import cache_name, cache_of, in_checkpoint
from . import deberta
from .families import Family, at
from .masks import prefix_visible
from .positions import tokens_of
from .state import PrefixState


class PrefixedPast:
    """A stand-in for a layer's cache: takes new keys, returns those of prefix, past and new."""

    def __init__(self, past: Any, state: PrefixState, slot: int) -> None:
        self.past = getattr(past, "self_attention_cache", past)
        self.state = state
        self.slot = slot

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.past is not None:
            key, value = self.past.update(key, value, *args, **kwargs)
        self.state.hit(self.slot)
        prefix_key, prefix_value = self.state.pair(self.slot, key, value)
        B = key.shape[0]
        return (
            torch.cat([prefix_key.expand(B, -1, -1, -1), key], dim=2),
            torch.cat([prefix_value.expand(B, -1, -1, -1), value], dim=2),
        )

    def get_seq_length(self, *args: Any) -> Any:
        return 0 if self.past is None else self.past.get_seq_length(*args)


def why_not_always_visible(attentions: tuple[nn.Module, ...]) -> str | None:
    """The reason that these layers' window cannot spare the prefix; None when it can.

    GPT-Neo's local attention selects keys by their number, the prefix included.
    """
    if any(getattr(a, "attention_type", "") == "local" for a in attentions):
        return "its local attention counts the prefix (prefix_always_visible)"
    return None


def prepare(
    family: Family, stack: PreTrainedModel, kwargs: dict[str, Any], state: PrefixState
) -> None:
    """Check the mask of a call of ``stack`` and, for Falcon, build its bias over P + S tokens."""
    mask = kwargs.get("attention_mask")
    tokens = tokens_of(kwargs)
    B, T = tokens.shape[:2]
    static = getattr(cache_of(stack, kwargs), "is_compileable", False)
    if isinstance(mask, Tensor) and mask.dim() == 2 and not static:
        if mask.shape[1] != state.past + T:
            raise ValueError(
                f"attention_mask covers {mask.shape[1]} tokens, the sequence has {state.past + T}: "
                f"give a mask of the tokens alone, without the {state.virtual} virtual ones"
            )
    alibi = getattr(stack, "use_alibi", False)
    if static and (alibi or stack.config.model_type == "gpt_neo"):
        raise ValueError(
            f"{type(stack).__name__} takes the length of a static cache for that of the sequence, "
            "with a prefix or without: use a dynamic cache"
        )
    if alibi:  # the model rounds it to bfloat16: built over P + S positions, as in HF PEFT
        if mask is None:
            mask = torch.ones(B, int(state.past) + T, dtype=torch.long, device=tokens.device)
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions; {type(stack).__name__} counts its "
                "bias by distance over a mask [batch, tokens]"
            )
        whole = torch.cat([mask.new_ones(B, state.virtual), mask], dim=1)
        build = sys.modules[type(stack).__module__].build_alibi_tensor
        state.alibi = build(whole, stack.num_heads, dtype=_dtype(stack))


def _dtype(stack: PreTrainedModel) -> torch.dtype:
    return stack.get_input_embeddings().weight.dtype


def enter(
    family: Family,
    block: nn.Module,
    slot: int,
    hidden: Tensor,
    kwargs: dict[str, Any],
    state: PrefixState | None,
    config: Any,
) -> dict[str, Any]:
    """The keywords to call a layer with in place of ``kwargs``.

    ``hidden`` [B, T, d] is the layer's input, ``config`` that of the module that owns the layers.
    """
    kwargs = dict(kwargs)
    if family.block == "relative_pos":
        if state is None or state.prefixes[slot] is None:
            return kwargs
        return deberta.enter(slot, kwargs, state)
    name = cache_name(block)
    assert name is not None
    past = kwargs.get(name)
    if in_checkpoint(block):
        past = None  # a replay would write to the cache twice; transformers drops it here too
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
    kwargs[name] = past
    if state is None or state.prefixes[slot] is None:
        return kwargs
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError(
            f"{type(block).__name__} attends to an encoder through the cache that its prefix goes "
            "through: prefix tuning supports it as a decoder alone"
        )
    kwargs[name] = PrefixedPast(past, state, slot)
    own = kwargs.get("attention_mask")
    inverted = family.block == "position_bias"  # MPT's mask is True where nothing is seen
    if own is None:
        reason = f"{type(block).__name__} was called without a mask [B, 1, T, S]"
        own = _left_out(family, at(block, family.attention), hidden, state, config, reason)
        if own is None:
            return kwargs
    if not isinstance(own, Tensor) or own.dim() != 4:
        raise RuntimeError(f"{type(block).__name__} was called with a mask that is no [B, 1, T, S]")
    alibi = kwargs.get("alibi") if family.block == "alibi" else None
    if alibi is not None and state.alibi is not None:  # Falcon
        whole = state.alibi.view(own.shape[0], -1, 1, state.alibi.shape[-1])
        head_dim = at(block, family.attention).head_dim
        laid = state.once((own,), lambda: _with_alibi(own, whole, head_dim, state))
        return {**kwargs, "alibi": whole, "attention_mask": laid}
    window = getattr(config, family.window or "", None)
    kwargs["attention_mask"] = state.once((own,), lambda: _wider(own, state, inverted, window))
    if alibi is not None:
        rows = own.shape[0]
        kwargs["alibi"] = state.once((alibi,), lambda: _bloom(alibi, rows, state))
    return kwargs


def _left_out(
    family: Family, attention: Any, hidden: Tensor, state: PrefixState, config: Any, reason: str
) -> Tensor | None:
    """The mask [B, 1, T, S] of own tokens that transformers left out as not needed.

    None when attention needs no mask with the prefix either.

    Raises:
        RuntimeError: says ``reason``; this file does not know the mask that the attention takes.
    """
    B, T = hidden.shape[:2]
    how = None if config is None else attention_name(config)
    # True: without a mask tokens see those after them (eager attention hides keys by masks alone)
    both = how in (None, "eager") or not getattr(attention, "is_decoder", True)
    all_seen = both or T == 1
    if all_seen and state.no_prefix is None and family.window is None:
        return None
    if isinstance(state.past, Tensor):
        raise RuntimeError(reason)
    S = state.past + T
    seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=hidden.device)
    seen = (seen if all_seen else seen.tril(state.past)).expand(B, -1, -1, -1)
    if how == "sdpa":
        return seen
    if how not in (None, "eager"):
        raise RuntimeError(reason)
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros((), dtype=hidden.dtype, device=hidden.device).where(seen, lowest)


def _wider(own: Tensor, state: PrefixState, inverted: bool, window: int | None = None) -> Tensor:
    """The mask ``own`` [B, h, T, S] with P columns in front, [B, h, T, P + S].

    The new columns are visible except in rows without a prefix, and outside a token's window.
    """
    B, h, T, _ = own.shape
    visible: Any = 0.0
    hidden: Any = torch.finfo(own.dtype).min if own.is_floating_point() else True
    if own.dtype == torch.bool:
        # numbers, as a tracer cannot record a bool as the value to fill with
        visible, hidden = (0.0, True) if inverted else (1.0, False)
    front = torch.full((B, h, T, state.virtual), visible, dtype=own.dtype, device=own.device)
    if window is not None and not state.always_visible:
        seen = prefix_visible(
            state.virtual, T, state.past, window, state.positions, True, own.device
        )
        front = front.masked_fill(~seen, hidden)
    if state.no_prefix is not None:
        front = front.masked_fill(state.no_prefix[:, None, None, None], hidden)
    return torch.cat([front, own], dim=-1)


def _bloom(alibi: Tensor, batch: int, state: PrefixState) -> Tensor:
    """Bloom's ``alibi`` [B * H, 1, S] with the prefix's part in front, [B * H, 1, P + S].

    It is slope * position. Only differences matter, so prefix token j gets slope * (j - P) and the
    own tokens keep theirs.
    """
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads = alibi.shape[0] // batch
    two = torch.ones(1, 2, device=alibi.device)
    slopes = build_alibi_tensor(two, heads, torch.float32)[:, 0, 1]  # [H]
    steps = torch.arange(-state.virtual, 0, device=alibi.device)
    front = (slopes[:, None] * steps).repeat(batch, 1)[:, None].to(alibi.dtype)
    return torch.cat([front, alibi], dim=-1)


def _with_alibi(own: Tensor, alibi: Tensor, head_dim: int, state: PrefixState) -> Tensor:
    """The mask [B, H, T, P + S] with ``alibi`` [B, H, 1, P + S] in it, as Falcon makes one."""
    lowest = torch.finfo(own.dtype).min
    hidden = torch.nn.functional.pad(own == lowest, (state.virtual, 0), value=False)
    if state.no_prefix is not None:
        hidden[..., : state.virtual] |= state.no_prefix[:, None, None, None]
    return (alibi / math.sqrt(head_dim)).masked_fill(hidden, lowest)
