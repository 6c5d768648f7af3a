"""DeBERTa and DeBERTa-v2: attention whose scores also read the distance of query and key.

    score(i, j) = (q_i · k_j + q_i · K[δ(i - j)] + k_j · Q[δ(i - j)]) / s

with the model's own buckets δ, tables K and Q, and s = sqrt(D · terms) (He et al., 2021, arXiv
2006.03654). Prefix token j stands at position j and own token t at P + t, so the distance to the
prefix is P + t - j, and a prefix made of the keys of P tokens acts as those tokens do in front of
the others. DeBERTa-v2's convolution over hidden states, in models that have it, does not see the
prefix: a prefix is keys and values and has no hidden states.

DeBERTa's attention module does not use transformers' AttentionInterface. A hook before each layer
passes an object in place of the distances, which holds the prefix of the layer; the attention's
``forward`` looks for that object.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.prefix_attention import prefix_attention
from .state import PrefixState


class Behind:
    """Passed as a layer's ``relative_pos``: the tokens come after the prefix of ``slot``."""

    def __init__(self, distances: Tensor | None, state: PrefixState, slot: int) -> None:
        self.distances = distances  # [1, T, T], in buckets; None without relative attention
        self.state = state
        self.slot = slot


def why_not(config: Any) -> str | None:
    """The reason that a model of this configuration takes no prefix; None when it takes one."""
    if getattr(config, "talking_head", False):
        return "its heads mix their scores (talking_head)"
    return None


def stand_before(attention: nn.Module) -> None:
    """Replace the forward of ``attention`` by one that looks for :class:`Behind`."""
    attention.forward = functools.partial(_forward, attention)


def step_aside(attention: nn.Module) -> None:
    """Undo :func:`stand_before`, unless somebody has wrapped it since."""
    if getattr(attention.__dict__.get("forward"), "func", None) is _forward:
        del attention.__dict__["forward"]


def enter(slot: int, kwargs: dict[str, Any], state: PrefixState) -> dict[str, Any]:
    """The keywords to call a layer with in place of ``kwargs``."""
    return {**kwargs, "relative_pos": Behind(kwargs.get("relative_pos"), state, slot)}


def _forward(
    attention: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Any = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """hidden_states [B, T, d], attention_mask [B, 1, T, T] -> [B, T, H · D], weights or None."""
    if not isinstance(relative_pos, Behind):
        own = type(attention).forward
        return own(
            attention, hidden_states, attention_mask, output_attentions, query_states,
            relative_pos, rel_embeddings,
        )  # fmt: skip
    if query_states is not None:
        raise ValueError("a prefix is for layers that attend to their own hidden states")
    state = relative_pos.state
    state.hit(relative_pos.slot)
    query, key, value = _heads(attention, hidden_states)
    prefix_key, prefix_value = state.pair(relative_pos.slot, key, value)
    scale = 1 / math.sqrt(query.shape[-1] * _terms(attention))
    B, H, T, _ = query.shape
    bias = query.new_zeros(B, H, T, state.virtual + T)
    if attention.relative_attention and rel_embeddings is not None:
        by_key, by_query = _tables(attention, attention.pos_dropout(rel_embeddings))
        where = _where(attention, relative_pos.distances, state.virtual, T, query.device)
        bias = scale * _of_distances(query, key, prefix_key, by_key, by_query, where)
    hidden = ~attention_mask.bool()
    own_bias = bias[..., state.virtual :].masked_fill(hidden, torch.finfo(bias.dtype).min)
    output = prefix_attention(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        scale=scale,
        causal=False,
        bias=torch.cat([bias[..., : state.virtual], own_bias], dim=-1),
        dropout=attention.dropout.p if attention.training else 0.0,
        no_prefix=state.no_prefix,
        return_weights=output_attentions,
    )
    output, weights = output if isinstance(output, tuple) else (output, None)
    return output.transpose(1, 2).flatten(2), weights


def _heads(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [B, H, T, D] each."""
    B, T, H = *hidden.shape[:2], attention.num_attention_heads
    if hasattr(attention, "in_proj"):  # DeBERTa: one product, the three of a head side by side
        joined = attention.in_proj(hidden).view(B, T, H, -1).transpose(1, 2)
        query, key, value = joined.chunk(3, dim=-1)
        return query + _bias(attention.q_bias, H), key, value + _bias(attention.v_bias, H)
    projections = (attention.query_proj, attention.key_proj, attention.value_proj)
    query, key, value = (p(hidden).view(B, T, H, -1).transpose(1, 2) for p in projections)
    return query, key, value


def _bias(bias: Tensor, heads: int) -> Tensor:
    return bias.view(heads, 1, -1)


def _terms(attention: Any) -> int:
    """The number of products in the sum that makes a score, as the models count them."""
    kinds = attention.pos_att_type
    return 1 + (len(kinds) if hasattr(attention, "in_proj") else len({"c2p", "p2c"} & {*kinds}))


def _tables(attention: Any, rel_embeddings: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """K and Q [H, 2n, D] for distances from -n to n - 1; None for a term the model lacks."""
    if hasattr(attention, "in_proj"):
        names = {"c2p": "pos_proj", "p2c": "pos_q_proj"}
    elif attention.share_att_key:
        names = {"c2p": "key_proj", "p2c": "query_proj"}
    else:
        names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    rows = rel_embeddings[: 2 * _span(attention)]
    by_key, by_query = (
        getattr(attention, name)(rows).unflatten(-1, (attention.num_attention_heads, -1))
        if kind in attention.pos_att_type
        else None
        for kind, name in names.items()
    )
    return (
        None if by_key is None else by_key.transpose(0, 1),
        None if by_query is None else by_query.transpose(0, 1),
    )


def _span(attention: Any) -> int:
    """n, where the tables' rows are for distances from -n to n - 1."""
    return getattr(attention, "pos_ebd_size", attention.max_relative_positions)


def _where(
    attention: Any, distances: Tensor | None, virtual: int, T: int, device: torch.device
) -> Tensor:
    """The tables' row for each query and key, int64 [T, P + T]."""
    assert distances is not None
    steps = torch.arange(T, device=device)[:, None] + virtual
    front = steps - torch.arange(virtual, device=device)
    buckets = getattr(attention, "position_buckets", -1)
    if buckets > 0:
        bucket_of = sys.modules[type(attention).__module__].make_log_bucket_position
        front = bucket_of(front, buckets, attention.max_relative_positions).long()
    n = _span(attention)
    return (torch.cat([front, distances.view(T, T)], dim=1) + n).clamp(0, 2 * n - 1)


def _of_distances(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor,
    by_key: Tensor | None,
    by_query: Tensor | None,
    where: Tensor,
) -> Tensor:
    """The scores' part by distance, q · K[δ] + k · Q[δ], [B, H, T, P + T]; ``where`` holds δ."""
    B, H, T, _ = query.shape
    P = prefix_key.shape[-2]
    total = query.new_zeros(B, H, T, P + T)
    if by_key is not None:
        products = query @ by_key.transpose(-1, -2)  # [B, H, T, 2n]
        total = total + products.gather(-1, where.expand(B, H, -1, -1))
    if by_query is not None:
        parts = []
        for keys, rows in ((prefix_key, where[:, :P]), (key, where[:, P:])):
            products = keys @ by_query.transpose(-1, -2)  # [(B,) H, keys, 2n]
            index = rows.T.expand(*products.shape[:-1], -1)
            parts.append(products.gather(-1, index).transpose(-1, -2).expand(B, H, T, -1))
        total = total + torch.cat(parts, dim=-1)
    return total
