"""Prefix attention for decoding on a CPU with a window, softcap or sinks.

It takes one row of query for each sequence, without gradients, in calls that the vendor's attention
does not take. The scores of both sources are side by side in one softmax. Over a shared prefix the
rows of the whole batch are one product, so the prefix is not copied; the keys in a window are a
slice. (Without window, softcap and sinks the merge is as fast.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .prefix_rule import Rule


def why_not(q: Tensor, rule: Rule) -> str | None:
    """The reason that :func:`forward` does not take a call; None when it does."""
    if rule.window is None and rule.scored is None:
        return "the vendor's attention takes it"
    if not q.is_cpu:
        return f"tensors on {q.device.type}"
    if q.shape[2] != 1:
        return "more than one row of query"
    if q.dtype.itemsize < 4:
        return "scores in half precision"
    if rule.no_prefix is not None:
        return "rows that see no prefix"
    if rule.window is not None and isinstance(rule.offset, Tensor):
        return "a window at an offset known to the device alone"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule
) -> tuple[Tensor, None]:
    """(O [B, H, 1, D], None); arguments are those of :mod:`.prefix_merge`."""
    B, H, _, D = q.shape
    H_kv, S, P = k.shape[1], k.shape[2], kp.shape[-2]
    near, first, last = 0, 0, S  # visible: the prefix from near on, own keys from first to last
    hidden: Tensor | None = None
    if isinstance(rule.offset, Tensor):
        hidden = torch.arange(S, device=q.device) > rule.offset.reshape(-1, 1, 1, 1)
    elif rule.causal:
        last = min(S, rule.offset + 1)
        if rule.window is not None:
            far = rule.offset + 1 - rule.window
            near, first = min(P, max(0, P + far)), max(0, far)
    if rule.keep is not None:
        padding = ~rule.keep[:, None, None, first:last]
        hidden = padding if hidden is None else hidden | padding
    if first > 0 or last < S:
        k, v = k[:, :, first:last], v[:, :, first:last]
    if near > 0:
        kp, vp = kp[..., near:, :], vp[..., near:, :]
    q = (q * rule.scale).view(B, H_kv, H // H_kv, D)  # the heads of a group are rows
    own = _rows_by(q, k.mT)
    scores = [own] if near == P else [_rows_by(q, kp.mT), own]
    if rule.softcap is not None:
        scores = [torch.tanh(s / rule.softcap) * rule.softcap for s in scores]
    if hidden is not None:
        scores[-1] = scores[-1].masked_fill(hidden, torch.finfo(q.dtype).min)
    if rule.sinks is not None:
        scores.append(rule.sinks.to(q.dtype).view(H_kv, -1, 1).expand(B, -1, -1, 1))
    weights = torch.softmax(torch.cat(scores, 3), 3)
    if rule.sinks is not None:
        weights = weights[..., :-1]
    if near == P:
        if hidden is not None:  # a row may see nothing
            weights = weights.masked_fill(hidden, 0)
        return _rows_by(weights, v).reshape(B, H, 1, D), None
    front, rest = weights[..., : P - near], weights[..., P - near :]
    return _rows_by(rest, v).add_(_rows_by(front, vp)).reshape(B, H, 1, D), None


def _rows_by(x: Tensor, y: Tensor) -> Tensor:
    """The product [B, H_kv, G, m] of x [B, H_kv, G, n] and y [B, H_kv, n, m] or [H_kv, n, m].

    The latter is the same for the whole batch.
    """
    B, H_kv, G, _ = x.shape
    if y.dim() == 4:
        return torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).view(B, H_kv, G, -1)
    out = torch.bmm(x.transpose(0, 1).flatten(1, 2), y)
    return out.view(H_kv, B, G, -1).transpose(0, 1)
