"""The attention function that transformers calls in place of a model's own implementation.

It is registered once for each implementation that it replaces (the original). Modules that carry a
slot number (``SLOT``) attend to their prefix as well; all other modules, and all calls without a
prefix, go to the original, with the mask that it would have been given.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.prefix_attention import prefix_attention
from ...utils.private import attention_name, upcast_attention
from ...utils.versions import sdpa_ignores_softcap
from .masks import MaskSpec, prefix_mask, prefix_visible
from .state import PrefixState

KEYWORD = "peftkern_prefix"
SLOT = "_peftkern_prefix_slot"
_NAME = "peftkern_prefix_"
REGISTERED: set[str] = set()

# Keywords that reach the attention function and do not change what it computes.
_NEUTRAL = frozenset(
    "position_ids position_embeddings cache_position use_cache cache past_key_values layer_past "
    "output_attentions output_hidden_states output_router_logits return_dict num_items_in_batch "
    "token_type_ids logits_to_keep max_length_q max_length_k layer_idx head_dim "
    "deterministic".split()
)
# How a batch is packed. The mask holds this too, if position_ids were given with these keywords.
_PACKED = frozenset("cu_seq_lens_q cu_seq_lens_k seq_idx".split())


def register(original: str) -> str:
    """Register an attention and a mask function in place of ``original``; returns their name.

    transformers looks for words in such a name ("sdpa", "flash", "/", ...), so it contains the
    original's name in hexadecimal. From it a copied or unpickled model finds the original.
    """
    name = _NAME + original.encode().hex()
    REGISTERED.add(name)
    AttentionInterface.register(name, functools.partial(attention, original))
    AttentionMaskInterface.register(name, functools.partial(prefix_mask, original))
    return name


def original_of(name: str | None) -> str | None:
    """The original's name, given one that :func:`register` returned; None for any other name."""
    if name is None or not name.startswith(_NAME):
        return None
    return bytes.fromhex(name[len(_NAME) :]).decode()


def foreign(config: Any) -> str | None:
    """Name of the function that somebody else registered for this configuration's attention.

    None when the attention is transformers' own.
    """
    name = attention_name(config)
    function = ALL_ATTENTION_FUNCTIONS.get(original_of(name) or name)
    while isinstance(function, functools.partial):
        function = function.func
    place = getattr(function, "__module__", None)
    if function is None or str(place).startswith("transformers."):
        return None  # eager attention is not registered: it is in the module of the model's class
    return f"{place}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _implementation(original: str, module: nn.Module) -> Callable[..., Any]:
    if original != "eager":
        return ALL_ATTENTION_FUNCTIONS[original]
    if getattr(module, "reorder_and_upcast_attn", False):  # GPT-2 has a second eager attention
        return lambda module, q, k, v, mask, **_: upcast_attention(module, q, k, v, mask)
    for owner in type(module).__mro__:  # an eager function is in the module of the calling class
        function = getattr(sys.modules.get(owner.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(f"{type(module).__name__} has no eager attention function beside it")


def attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, T, D], key and value [B, H_kv, S, D] -> [B, T, H, D] and the weights or None."""
    state: PrefixState | None = kwargs.pop(KEYWORD, None)
    if state is None and isinstance(attention_mask, MaskSpec):
        state = attention_mask.state  # StableLM, LongT5: no keyword passes, but a mask does
    slot = getattr(module, SLOT, None)
    if state is None or slot is None or state.prefixes[slot] is None:
        if isinstance(attention_mask, MaskSpec):
            attention_mask = attention_mask.unprefixed()
        run = _implementation(original, module)
        return run(module, query, key, value, attention_mask, *args, **kwargs)
    state.hit(slot)
    if original == "sdpa" and kwargs.get("softcap") is not None and sdpa_ignores_softcap():
        del kwargs["softcap"]  # a prefix changes nothing of what the model computes itself
    return _with_prefix(module, query, key, value, attention_mask, state, slot, **kwargs)


def _with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    state: PrefixState,
    slot: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    if rest and not rest.keys() <= _NEUTRAL:
        _refuse_unknown(module, mask, rest)
    prefix_key, prefix_value = state.pair(slot, key, value)
    T, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # one query sees all own keys, causal or not; with a window attention is always causal
    causal = causal and (T > 1 or sliding_window is not None)
    spec = mask if isinstance(mask, MaskSpec) else None
    window, offset = sliding_window, state.past
    visibility: dict[str, Any] = {}
    if spec is not None:
        _check_length(spec, S, state)
        causal, offset = spec.causal, spec.q_offset
        window = spec.window  # the mask's and not the module's, as in a call without a prefix
        visibility["q_offset"] = spec.q_offset - spec.kv_offset
    if state.always_visible and window is not None and _within(window, offset, T):
        window = None  # it hides nothing: neither own keys nor the prefix
    apart = state.always_visible and window is not None  # the window is for own keys alone
    visibility |= {"causal": causal, "window": window}
    own: Tensor | None = None  # mask or bias of the own keys, if `visibility` alone cannot say it
    if spec is not None and spec.plain and position_bias is None and not apart:
        visibility["keep"] = spec.keep()
    elif spec is not None:
        own = spec.visible()
    elif mask is not None:
        own = _checked_mask(mask, S)
    elif position_bias is not None or apart:
        own = _causal_mask(T, S, causal, window if apart else None, query.device)
    if own is not None:
        shared = spec if position_bias is None else None
        bias = None if shared is None else shared.joined
        if bias is None:
            skipped = 0 if spec is None else spec.skipped
            positions = None if state.positions is None else state.positions[:, skipped:]
            past = state.past + skipped
            reach = None if apart else window
            device, visible = query.device, own

            def join() -> Tensor:
                seen = prefix_visible(state.virtual, T, past, reach, positions, causal, device)
                return _with_bias(visible, seen, position_bias, module, state, query)

            if position_bias is None or torch.is_grad_enabled():
                bias = join()  # not shared: a checkpoint's replay must make the same tensors again
            else:  # all layers of T5 share one bias, each layer of UMT5 has its own
                bias = state.once((position_bias, mask), join)
            if shared is not None and not torch.compiler.is_compiling():  # a compiler shares itself
                shared.joined = bias
        visibility = {"causal": False, "bias": bias}
    output = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        no_prefix=state.no_prefix,
        return_weights=state.weights,
        **visibility,
    )
    weights = None
    if isinstance(output, tuple):
        output, weights = output
    return output.transpose(1, 2).contiguous(), weights


def _refuse_unknown(module: nn.Module, mask: Any, rest: dict[str, Any]) -> None:
    given = {name for name, value in rest.items() if value is not None} - _NEUTRAL
    packed = given & _PACKED
    if packed and (not isinstance(mask, MaskSpec) or not mask.plain):
        packed = set()
    unknown = sorted((given - _PACKED) | packed)
    if unknown:
        reason = "; a packed batch needs its position_ids as well" if packed else ""
        raise ValueError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which the "
            f"attention with a prefix does not know{reason}"
        )


def _check_length(mask: MaskSpec, S: int, state: PrefixState) -> None:
    """Raise a ValueError for a mask that covers the prefix too (it would count as own tokens)."""
    width = None if mask.padding is None else mask.padding.shape[-1]
    if mask.kv_length == S:
        if width is None or isinstance(mask.q_offset, Tensor):
            return
        if width in (mask.q_offset + mask.q_length, mask.kv_offset + mask.kv_length):
            return  # the second width: the whole length of a static cache
    own = S if isinstance(mask.q_offset, Tensor) else mask.q_offset + mask.q_length
    raise ValueError(
        f"attention_mask covers {mask.kv_length if width is None else width} tokens, the sequence "
        f"has {own}: give a mask of the tokens alone, without the {state.virtual} virtual ones"
    )


def _within(window: int, offset: int | Tensor, T: int) -> bool:
    """True when T tokens from ``offset`` on, and all before them, fit in one window."""
    return isinstance(offset, int) and offset + T <= window


def _checked_mask(mask: Any, S: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != S:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask reaches the attention as {shape}; with a prefix it must be "
            f"[batch, 1 or heads, queries, {S}], over the tokens alone, without the virtual ones"
        )
    return mask


def _causal_mask(T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    mask = torch.ones(T, S, dtype=torch.bool, device=device)
    mask = mask.tril(S - T) if causal else mask
    return (mask if window is None else mask.triu(S - T - window + 1))[None, None]


def _with_bias(
    own: Tensor,
    seen: Tensor,
    position_bias: Tensor | None,
    module: nn.Module,
    state: PrefixState,
    query: Tensor,
) -> Tensor:
    """The operation's ``bias`` [B, h, T, P + S]: ``seen`` [B, 1, T, P] before ``own``.

    bool when nothing but visibility is given, else a float bias that is added to the scores.
    """
    if own.dtype == torch.bool and position_bias is None:
        return _join(seen, own)
    lowest = torch.finfo(query.dtype).min
    if own.dtype == torch.bool:
        own = torch.zeros((), dtype=query.dtype, device=own.device).where(own, lowest)
    front = torch.zeros((), dtype=own.dtype, device=own.device).where(seen, lowest)
    if position_bias is None:
        return _join(front, own)
    # T5 bins the distance to a key: that of prefix token j to query t is j - (P + past + t).
    holder: Any = (
        module if getattr(module, "has_relative_attention_bias", False) else state.bias_module
    )
    T, P = query.shape[2], state.virtual
    near = holder.compute_bias(T, P, device=query.device, past_seen_tokens=state.past + P)
    return _join(front + near.to(front), own + position_bias)


def _join(front: Tensor, own: Tensor) -> Tensor:
    """``front`` [B, h, T, P] and ``own`` [B, h, T, S] joined; B and h may be 1 in either."""
    lead = torch.broadcast_shapes(front.shape[:-1], own.shape[:-1])
    return torch.cat([front.expand(*lead, -1), own.expand(*lead, -1)], dim=-1)


for _original in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"):
    register(_original)  # a pickled model's configuration holds one of these names
