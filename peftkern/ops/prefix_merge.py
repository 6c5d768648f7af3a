"""Attention over a prefix and own keys by the vendor's attention, called once for each part.

Every part has its own softmax; outputs and log-sum-exps are merged,

    w = sigmoid(lse₂ - lse₁),  O = O₁ + w (O₂ - O₁),  lse = log(exp lse₁ + exp lse₂),

and the vendor's backward, called for each part with the *merged* O and lse, returns the part's
exact share: from these arguments it computes P = exp(scores - lse) and dS = P (dP - rowsum(dO O)).

For a shared prefix, the queries of the whole batch are rows of one call. So the prefix is neither
copied nor expanded, and its gradients are summed over the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.private import cpu_flash, cpu_flash_backward, flash, flash_backward
from .prefix_rule import Grads, Needs, Rule

_KNOWS_PARTS = None not in (cpu_flash, cpu_flash_backward, flash, flash_backward)
# True if torch's CPU attention takes fewer key heads than query heads, also in the backward
_KNOWS_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def why_not(q: Tensor, rule: Rule) -> str | None:
    """The reason that the vendor's attention cannot take a call's parts; None when it can."""
    if rule.scored is not None:
        return rule.scored
    if not _KNOWS_PARTS:
        return f"torch {torch.__version__} has no attention that returns its log-sum-exp"
    if rule.window is not None:
        return "a sliding window that hides keys"
    if q.is_cpu:
        return None if _KNOWS_GROUPS else "torch before 2.13: its CPU attention takes no groups"
    if not q.is_cuda:
        return f"no attention that returns its log-sum-exp is known on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype} on CUDA"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head_dim {q.shape[-1]} on CUDA (multiples of 8 up to 256)"
    if rule.keep is not None or isinstance(rule.offset, Tensor):
        return "flash attention on CUDA takes no mask"
    return None


class _Part(NamedTuple):
    """The own keys from ``first`` to before ``last``.

    ``mask`` [B or 1, 1, 1 or T, last - first] is added to the scores.
    """

    first: int
    last: int
    causal: bool
    mask: Tensor | None


def _parts(T: int, S: int, rule: Rule, like: Tensor) -> list[_Part]:
    """The own keys in parts that have no causal mask, or that of a square."""
    offset = rule.offset
    if isinstance(offset, Tensor):
        return [_Part(0, S, False, _mask_at(T, S, offset, rule.keep, like))]
    mask = _additive(rule.keep[:, None, None], like) if rule.keep is not None else None
    if not rule.causal or (T == 1 and offset + 1 >= S):
        spans = [(0, S, False)]
    elif T == 1:
        spans = [(0, min(S, offset + 1), False)]
    elif offset == 0:
        spans = [(0, min(S, T), True)]
    else:
        spans = [(0, min(S, offset), False), (offset, min(S, offset + T), True)]
    return [
        _Part(a, b, causal, mask[..., a:b] if mask is not None else None)
        for a, b, causal in spans
        if a < b
    ]


def _mask_at(T: int, S: int, offset: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:
    """The additive mask [B or 1, 1, T, S] for a causal offset on the device."""
    t = torch.arange(T, device=like.device)[:, None] + offset.reshape(-1, 1, 1, 1)
    seen = torch.arange(S, device=like.device) <= t
    return _additive(seen if keep is None else seen & keep[:, None, None], like)


def _additive(seen: Tensor, like: Tensor) -> Tensor:
    """An additive mask: 0 where seen, else so low that its exp is 0 compared with any score.

    It is not -inf, for which torch's CPU kernel gives a row that sees nothing the log-sum-exp 0:
    the merge would give such a part a weight.
    """
    low = -6e4 if like.dtype == torch.float16 else -1e30
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, low)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """(O [B, H, T, D], lse [B, H, T] in float32 or float64, further values for the backward)."""
    if q.is_cpu:
        o, lse = cpu_flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return o, lse, None
    # written by the operator's schema; it has run under fake tensors, never on a device
    o, lse, *rest = flash(q, k, v, 0.0, causal, False, scale=scale)
    return o, lse, rest[:6]


def _attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor]
    # FlashAttention 2 reads lse as if it were dense, but a folded one is a transposed view
    lse = lse.contiguous()
    if q.is_cpu:
        grads = cpu_flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale)
        return grads
    # has never run on a device; without dropout the random state is not read
    state = torch.empty((), dtype=torch.int64, device=q.device)
    grads = flash_backward(
        do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state,
        scale=scale,
    )  # fmt: skip
    return grads


def _folds(x: Tensor) -> bool:
    """True when batch and rows of x [B, H, T, D] are one dimension in memory."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2)


def _fold(x: Tensor) -> Tensor:
    """x [B, H, T, ...] as [1, H, B T, ...]; a view if :func:`_folds`."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


def _unfold(x: Tensor, B: int) -> Tensor:
    """x [1, H, B T, ...] as [B, H, T, ...], a view."""
    rows: Tensor = x.squeeze(0).unflatten(1, (B, -1))
    return rows.transpose(0, 1)


def _over_prefix(q: Tensor, kp: Tensor, vp: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B = q.shape[0]
    if kp.dim() == 3 and _folds(q):
        o, lse, _ = _attend(_fold(q), kp.unsqueeze(0), vp.unsqueeze(0), scale)
        return _unfold(o, B), _unfold(lse, B)
    # a shared prefix has stride 0 over the batch, so it is read in place, not copied
    o, lse, _ = _attend(q, kp.expand(B, -1, -1, -1), vp.expand(B, -1, -1, -1), scale)
    return o, lse


def _mix(o: Tensor, other: Tensor, w: Tensor) -> Tensor:
    """o + w (other - o), in w's dtype: half precision would round w."""
    if o.dtype == w.dtype:
        return o.lerp_(other, w)
    return o.copy_(torch.lerp(o.to(w.dtype), other.to(w.dtype), w))


def forward(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """(O [B, H, T, D], lse [B, H, T]); lse is +inf where a query sees nothing."""
    o, lse = _over_prefix(q, kp, vp, rule.scale)
    if rule.no_prefix is not None:
        lse = lse.masked_fill(rule.no_prefix[:, None, None], -torch.inf)
    for part in _parts(q.shape[2], k.shape[2], rule, q):
        keys, values = k[:, :, part.first : part.last], v[:, :, part.first : part.last]
        o2, lse2, _ = _attend(q, keys, values, rule.scale, part.causal, part.mask)
        o = _mix(o, o2, torch.sigmoid(lse2 - lse).unsqueeze(-1))
        lse = torch.logaddexp(lse, lse2)
    if rule.no_prefix is not None and (rule.keep is not None or isinstance(rule.offset, Tensor)):
        blind = _blind(q.shape[2], k.shape[2], rule)
        # as exp(score - inf) is 0, such a row gets no gradient and gives none
        o, lse = o.masked_fill_(blind.unsqueeze(-1), 0), lse.masked_fill(blind, torch.inf)
    return o, lse


def _blind(T: int, S: int, rule: Rule) -> Tensor:
    """bool [B, 1, T], True for rows that see neither the prefix nor a key of their own."""
    assert rule.no_prefix is not None
    B, device = rule.no_prefix.shape[0], rule.no_prefix.device
    keep = rule.keep
    if keep is None:
        keep = torch.ones(B, S, dtype=torch.bool, device=device)
    if rule.causal:
        offset = torch.as_tensor(rule.offset, device=device)[..., None]
        last = torch.arange(T, device=device) + offset
        so_far = keep.cummax(1).values
        seen = so_far.gather(1, last.clamp(0, S - 1).expand(B, T))
    else:
        seen = keep.any(1, keepdim=True).expand(B, T)
    return (rule.no_prefix[:, None] & ~seen)[:, None]


_FEW = 2**18  # bytes of keys up to which a copy is faster than merging two calls' results


def _is_quicker_joined(k: Tensor, kp: Tensor) -> bool:
    """True when the keys are on a CPU and so few that a copy and one call are faster than two.

    Measured, relative to two calls: for 16 kB of keys a third of the time, for 240 kB half of it,
    for 2 MB five times it.
    """
    if not k.is_cpu or torch.compiler.is_compiling():  # a graph is for any number of keys
        return False
    B, H_kv, S, D = k.shape
    return B * H_kv * (S + kp.shape[-2]) * D * k.element_size() <= _FEW


def decode(q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule) -> Tensor:
    """The O of :func:`forward` for one query row, without ``no_prefix``, in few calls.

    At this size most time goes to the calls, and with few keys even a copy is cheaper.
    """
    B, H, _, D = q.shape
    H_kv, S, scale = k.shape[1], k.shape[2], rule.scale
    mask = None
    if isinstance(rule.offset, Tensor):
        mask = _mask_at(1, S, rule.offset, rule.keep, q)
    else:
        if rule.causal and rule.offset + 1 < S:
            S = rule.offset + 1
            k, v = k[:, :, :S], v[:, :, :S]
        if rule.keep is not None:
            mask = _additive(rule.keep[:, None, None, :S], q)
    G = H // H_kv
    q = q.view(B, H_kv, G, D)  # the heads of a group are rows
    if _is_quicker_joined(k, kp):
        P = kp.shape[-2]
        keys, values = (
            torch.cat([x.expand(B, -1, -1, -1), own], 2) for x, own in ((kp, k), (vp, v))
        )
        mask = None if mask is None else F.pad(mask, (P, 0))
        o, _, _ = _attend(q, keys, values, scale, mask=mask)
        return o.reshape(B, H, 1, D)
    o, lse, _ = _attend(q, k, v, scale, mask=mask)
    if kp.dim() == 3:  # batch and group change places, as views: the prefix is read once a group
        kp, vp = (x.unsqueeze(0) if G == 1 else x.expand(G, -1, -1, -1) for x in (kp, vp))
        o2, lse2, _ = _attend(q.transpose(0, 2), kp, vp, scale)
        o2, lse2 = o2.transpose(0, 2), lse2.transpose(0, 2)
    else:
        o2, lse2, _ = _attend(q, kp, vp, scale)
    return _mix(o, o2, torch.sigmoid(lse2 - lse).unsqueeze(-1)).reshape(B, H, 1, D)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor,
    vp: Tensor,
    o: Tensor,
    lse: Tensor,
    rule: Rule,
    needs: Needs,
) -> Grads:
    """(dQ, dK, dV, dKp, dVp), with None for those that ``needs`` does not ask for.

    For a shared prefix the last two are summed over the batch.
    """
    needs_q, needs_k, needs_v, needs_kp, needs_vp = needs
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dkp: Tensor | None = None
    dvp: Tensor | None = None
    if needs_q or needs_kp or needs_vp:
        seen = lse
        if rule.no_prefix is not None:  # as exp(score - inf) is 0, the prefix has no gradient
            seen = lse.masked_fill(rule.no_prefix[:, None, None], torch.inf)
        dq, dkp, dvp = _over_prefix_backward(do, q, kp, vp, o, seen, rule.scale)
    if needs_q or needs_k or needs_v:
        own, dk, dv = _over_own_backward(do, q, k, v, o, lse, rule)
        dq = own if dq is None else dq.add_(own)
    found = (dq, dk, dv, dkp, dvp)
    dq, dk, dv, dkp, dvp = (g if need else None for g, need in zip(found, needs, strict=True))
    return dq, dk, dv, dkp, dvp


def _over_own_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    S, scale = k.shape[2], rule.scale
    parts = _parts(q.shape[2], S, rule, q)
    if len(parts) == 1 and parts[0].last - parts[0].first == S:
        _, _, causal, mask = parts[0]
        return _attend_backward(do, q, k, v, o, lse, scale, causal, mask)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, last, causal, mask in parts:
        keys, values = k[:, :, first:last], v[:, :, first:last]
        dq2, dk[:, :, first:last], dv[:, :, first:last] = _attend_backward(
            do, q, keys, values, o, lse, scale, causal, mask
        )
        dq.add_(dq2)
    return dq, dk, dv


def _over_prefix_backward(
    do: Tensor, q: Tensor, kp: Tensor, vp: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B = q.shape[0]
    if kp.dim() == 3 and _folds(q):
        do, o, lse = _fold(do), _fold(o), _fold(lse)
        dq, dkp, dvp = _attend_backward(
            do, _fold(q), kp.unsqueeze(0), vp.unsqueeze(0), o, lse, scale
        )
        return _unfold(dq, B), dkp.squeeze(0), dvp.squeeze(0)
    keys, values = kp.expand(B, -1, -1, -1), vp.expand(B, -1, -1, -1)
    dq, dkp, dvp = _attend_backward(do, q, keys, values, o, lse, scale)
    return (dq, dkp.sum(0), dvp.sum(0)) if kp.dim() == 3 else (dq, dkp, dvp)
