"""Attention over a prefix and a sequence's own keys, in one softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float,
    causal: bool,
    q_offset: int | Tensor | None = None,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    no_prefix: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``query`` [B, H, T, D] over P prefix keys and S own keys [B, H_kv, S, D].

    The prefix is [H_kv, P, D], shared by the batch, or [B, H_kv, P, D]; it takes positions
    0..P-1, own key s takes P + s, and query t takes P + ``q_offset`` + t (default S - T).
    ``keep`` [B, S] is False on padding, ``bias`` (float to add, or bool, True = visible),
    broadcastable to [B, H, T, P + S], stands in place of causal, keep and window; position i sees
    j within ``window`` if i - window < j. ``sinks`` [H] are extra logits; ``no_prefix`` [B] marks
    rows without a prefix. Returns [B, H, T, D], and the weights [B, H, T, P + S] if asked for.
    """
    B, H, T, _ = query.shape
    H_kv, S = key.shape[1:3]
    P = prefix_key.shape[-2]
    prefix_key = prefix_key.expand(B, -1, -1, -1)
    prefix_value = prefix_value.expand(B, -1, -1, -1)
    key = torch.cat([prefix_key, key], dim=2).repeat_interleave(H // H_kv, dim=1)
    value = torch.cat([prefix_value, value], dim=2).repeat_interleave(H // H_kv, dim=1)
    if bias is None and (causal or keep is not None or window is not None):
        offset = S - T if q_offset is None else q_offset
        rows = torch.arange(T, device=query.device)[:, None] + offset  # [T, 1]
        columns = torch.arange(-P, S, device=query.device)  # position less P
        bias = torch.ones(1, 1, T, P + S, dtype=torch.bool, device=query.device)
        if causal:
            bias = bias & (columns <= rows)
        if window is not None:
            bias = bias & (columns > rows - window)
        if keep is not None:
            bias = bias & F.pad(keep, (P, 0), value=True)[:, None, None]
    if no_prefix is not None:
        seen = torch.ones(B, P + S, dtype=torch.bool, device=query.device)
        seen[:, :P] = ~no_prefix[:, None]
        seen = seen[:, None, None]
        if bias is None:
            bias = seen
        elif bias.dtype == torch.bool:
            bias = bias & seen
        else:
            bias = bias.masked_fill(~seen, torch.finfo(bias.dtype).min)
    if softcap is None and sinks is None and not return_weights:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale
        )
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
        else:
            scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(B, -1, T, 1)], dim=-1)
    weights = scores.float().softmax(dim=-1).to(query.dtype)[..., : P + S]
    weights = F.dropout(weights, dropout)
    output = weights @ value
    return (output, weights) if return_weights else output
