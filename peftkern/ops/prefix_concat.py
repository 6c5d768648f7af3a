"""Attention over a concatenated prefix and own keys: HF PEFT's formula, with the same numbers.

It takes the calls that other implementations do not: with a bias, dropout or returned weights, and
on torch softcap or sinks with more than one row. It copies the prefix over the batch, and autograd
keeps that copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.private import in_transform
from .prefix_rule import Rule


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float,
    causal: bool,
    offset: int | Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    no_prefix: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(O [B, H, T, D], the weights [B, H, T, P + S] if asked for, else None).

    Arguments are those of :func:`peftkern.ops.prefix_attention.prefix_attention`. Differentiable by
    autograd, and twice unless ``scaled_dot_product_attention`` runs.
    """
    B, H, T, _ = query.shape
    H_kv, S, P = key.shape[1], key.shape[2], prefix_key.shape[-2]
    keys = torch.cat([prefix_key.expand(B, -1, -1, -1), key], 2)
    values = torch.cat([prefix_value.expand(B, -1, -1, -1), value], 2)
    mask = bias
    if bias is not None:
        mask = bias = bias[(None,) * (4 - bias.dim())]
    else:
        rule = Rule(scale, causal, offset, keep, window, no_prefix)
        mask = mask_of(B, T, S, P, rule, query.device)
    if bias is not None and no_prefix is not None:
        mask = _without_prefix(bias, no_prefix, P, S)
    plain = softcap is not None or sinks is not None or weights or in_transform()
    if not plain and query.numel():
        grouped = bool(H != H_kv)
        if grouped and mask is not None and not query.is_cpu:
            # only torch's CPU attention takes groups with a mask without repeated keys
            keys, values = (x.repeat_interleave(H // H_kv, 1) for x in (keys, values))
            grouped = False
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
        return out, None
    return formula(query, keys, values, scale, mask, softcap, sinks, dropout)


def formula(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(O, weights [B, H, T, P + S]) by the definition, operation by operation.

    The softmax is in at least float32, and in the scores' dtype with sinks. With a bool mask, a row
    that sees nothing is 0.
    """
    G = query.shape[1] // keys.shape[1]
    if G > 1:
        keys, values = keys.repeat_interleave(G, 1), values.repeat_interleave(G, 1)
    scores = query @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = None
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], 3)
        # as in models with sinks: softmax in the scores' dtype, after subtracting the maximum
        scores = scores - scores.amax(3, keepdim=True)
        weights = scores.softmax(3)[..., :-1]
    else:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(3, dtype=dtype).to(query.dtype)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    out = weights.to(values.dtype) @ values
    # [B, T, H, D] in memory, as callers read it
    return out.transpose(1, 2).contiguous().transpose(1, 2), weights


def mask_of(B: int, T: int, S: int, P: int, rule: Rule, device: torch.device) -> Tensor | None:
    """bool [B or 1, 1, T or 1, P + S], True where a query sees a key; None when all see all."""
    causal, offset, window = rule.causal, rule.offset, rule.window
    if causal and T == 1 and isinstance(offset, int) and offset + 1 >= S and window is None:
        causal = False  # one row, which sees everything
    seen = None
    if causal or window is not None:
        t = torch.arange(T, device=device)[:, None]
        if isinstance(offset, Tensor):
            t = t + offset.reshape(-1, 1, 1, 1)
        else:
            t = (t + offset)[None, None]
        distance = t - torch.arange(-P, S, device=device)
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
    if rule.keep is not None:
        kept = F.pad(rule.keep, (P, 0), value=True)[:, None, None]
        seen = kept if seen is None else seen & kept
    return seen if rule.no_prefix is None else _without_prefix(seen, rule.no_prefix, P, S)


def _without_prefix(mask: Tensor | None, no_prefix: Tensor, P: int, S: int) -> Tensor:
    seen = ~no_prefix[:, None, None, None] | (torch.arange(P + S, device=no_prefix.device) >= P)
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, -torch.inf)
