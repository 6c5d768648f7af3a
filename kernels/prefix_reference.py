"""Attention over a prefix and own keys in one softmax, as a float64 torch formula.

Shapes: Q [B, H, T, D]; own K, V [B, H_kv, S, D]; prefix K, V [H_kv, P, D] or [B, H_kv, P, D]; O as
Q; LSE [B, H, T], the natural logarithm of each row's sum. The prefix takes positions 0 to P - 1,
own key s position P + s, own query t position P + q_offset + t.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    T: int,
    S: int,
    P: int,
    *,
    causal: bool = True,
    q_offset: int | Tensor | None = None,
    window: int | None = None,
    keep: Tensor | None = None,
    no_prefix: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """bool [B or 1, 1, T, P + S], True where a query sees a key."""
    offset = torch.as_tensor(S - T if q_offset is None else q_offset, device=device)
    query = P + offset.reshape(-1, 1, 1) + torch.arange(T, device=device)[:, None]  # [B or 1, T, 1]
    key = torch.arange(P + S, device=device)
    see = torch.ones(len(query), T, P + S, dtype=torch.bool, device=device)
    if causal:
        see = see & (key <= query)
    if window is not None:
        see = see & (key > query - window)
    if keep is not None:
        see = see & torch.cat([keep.new_ones(keep.shape[0], P), keep], 1).bool()[:, None]
    if no_prefix is not None:
        see = see & ~(no_prefix.bool()[:, None, None] & (key < P))
    return see[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **mask: object,
) -> tuple[Tensor, Tensor]:
    """(O [B, H, T, D], LSE [B, H, T]), computed in ``dtype``; differentiable.

    A row that sees no key gives 0 and -inf. ``mask``: arguments of :func:`visible`.
    """
    B, H, T, D = q.shape
    group = H // k.shape[1]

    def source(own: Tensor, prefix: Tensor) -> Tensor:
        prefix = prefix.expand(B, *prefix.shape[-3:]).to(dtype)
        return torch.cat([prefix, own.to(dtype)], 2).repeat_interleave(group, 1)

    keys, values = source(k, prefix_key), source(v, prefix_value)
    see = visible(T, k.shape[2], prefix_key.shape[-2], device=q.device, **mask)  # type: ignore[arg-type]
    keys, values = (t.masked_fill(~see.any(2)[..., None], 0) for t in (keys, values))
    scores = q.to(dtype) @ keys.mT * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~see, float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None, None].expand(B, H, T, 1)
        scores = torch.cat([scores, sink], -1)
        values = torch.cat([values, values.new_zeros(B, H, 1, D)], 2)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return weights @ values, lse
