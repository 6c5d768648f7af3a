"""Attention over a prefix and a sequence's own keys, in one softmax: one operation.

    O = softmax(scale · Q [Kp; K]ᵀ) [Vp; V]          (Li and Liang, 2021)

The prefix is never concatenated to the own keys and, where it is shared, never copied over the
batch; its gradients come out summed over the batch. For the backward it keeps Q, K, V, Kp, Vp, O
and one number a row. The implementations, in the order in which they are asked:

- the Triton kernel (:func:`why_not_kernel`);
- blocks of one softmax over both sources (:mod:`.prefix_blocked`): long float32 queries on a CPU;
- the vendor's attention for each part, merged (:mod:`.prefix_merge`).

What none of them takes is computed as HF PEFT does (:mod:`.prefix_concat`); why is logged once.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autocast, prefix_blocked, prefix_concat, prefix_merge
from .prefix_rule import Rule, check

_noted: set[str] = set()


def why_not_kernel(query: Tensor) -> str | None:
    """Why a call does not go to the Triton kernel of ``kernels/``; None when it does.

    The place to connect it: an implementation is a module with ``forward`` and ``backward`` of the
    signatures in :mod:`.prefix_merge`, and :func:`_choose` returns it.
    """
    return "the Triton kernel is not connected to this operation"


def why_concat(
    *,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    return_weights: bool,
) -> str | None:
    """Why a call is computed on concatenated keys, as far as its options say; else None."""
    if bias is not None:
        return "an attention bias"
    if softcap is not None:
        return f"softcap {softcap}"
    if sinks is not None:
        return "attention sinks"
    if dropout > 0.0:
        return "dropout on the attention weights"
    if return_weights:
        return "the attention weights are asked for"
    return None


def _unit(x: Tensor) -> Tensor:
    """With unit stride along D, which the vendor's attention takes for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _note(reason: str) -> None:
    if reason not in _noted and not torch.compiler.is_compiling():
        _noted.add(reason)
        logging.getLogger("peftkern").info(
            "prefix attention runs on concatenated keys and values: %s", reason
        )


def _choose(query: Tensor, key: Tensor, rule: Rule) -> ModuleType | str:
    """The implementation for a call without bias, softcap, sinks, dropout or weights, or why none
    takes it."""
    if not torch.compiler.is_compiling() and prefix_blocked.why_not(query, key, rule) is None:
        return prefix_blocked
    reason = prefix_merge.why_not(query, rule)
    return prefix_merge if reason is None else reason


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        keep: Tensor | None,
        no_prefix: Tensor | None,
        offset: int | Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        implementation: ModuleType,
    ) -> Tensor:
        rule = Rule(scale, causal, offset, keep, window, no_prefix)
        o, lse = implementation.forward(query, key, value, prefix_key, prefix_value, rule)
        moving = offset if isinstance(offset, Tensor) else None
        ctx.save_for_backward(
            query, key, value, prefix_key, prefix_value, o, lse, keep, no_prefix, moving
        )
        ctx.settings = (scale, causal, None if moving is not None else offset, window)
        ctx.implementation = implementation
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, o, lse, keep, no_prefix, moving = ctx.saved_tensors
        scale, causal, offset, window = ctx.settings
        offset = moving if moving is not None else offset
        rule = Rule(scale, causal, offset, keep, window, no_prefix)
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            return (*_differentiable_backward(do, inputs, rule, needs), *[None] * 7)
        return (*ctx.implementation.backward(do, *inputs, o, lse, rule, needs), *[None] * 7)


def _differentiable_backward(
    do: Tensor, inputs: list[Tensor], rule: Rule, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as a graph of their own, from the plain formula, for second derivatives."""
    q, k, v, kp, vp = inputs
    B, S, P = q.shape[0], k.shape[2], kp.shape[-2]
    with torch.enable_grad():
        mask = prefix_concat.mask_of(B, q.shape[2], S, P, rule, q.device)
        keys = torch.cat([kp.expand(B, -1, -1, -1), k], 2)
        values = torch.cat([vp.expand(B, -1, -1, -1), v], 2)
        o, _ = prefix_concat.formula(q, keys, values, rule.scale, mask)
        wanted = [i for i in range(5) if needs[i]]
        grads = torch.autograd.grad(o, [inputs[i] for i in wanted], do, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(5)]


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
    """Attention over P prefix keys, which take positions 0 to P - 1, and S own keys, from P on.

    Args:
        query: [B, H, T, D], floating point.
        key, value: [B, H_kv, S, D] in query's dtype; H a multiple of H_kv.
        prefix_key, prefix_value: [H_kv, P, D], shared by the batch, or [B, H_kv, P, D]; cast to
            query's dtype.
        scale: factor of the scores, before softmax (and before ``softcap``).
        causal: own query t sees own key s iff s <= q_offset + t, and the whole prefix.
        q_offset: coordinate of the first query among the own keys, 0 or more; default S - T. An
            int, or an int32/int64 tensor of one element or [B], which the host does not wait for.
        keep: bool [B, S], True where an own key is no padding.
        bias: bool (True = visible) or floating (added to the scores), broadcastable to [B, H, T,
            P + S]; in place of causal, keep and window.
        window: position i sees position j iff i - window < j <= i, the prefix counted as the first
            P positions: it slides out of view. Needs ``causal``.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: [H], a score for each head that takes its share of the softmax and has no value.
        dropout: probability on the weights, in [0, 1); 0 when not training. Drawn by torch's
            generator, as PEFT's is.
        no_prefix: bool [B], True for rows of the batch that see no prefix.
        return_weights: the weights as well.

    Returns:
        [B, H, T, D] in query's dtype (autocast's, where that is on); with ``return_weights`` also
        the weights [B, H, T, P + S]. A row that sees nothing is 0. Differentiable in query, key,
        value and the prefix, twice where ``scaled_dot_product_attention`` is not what runs.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    device = "cpu" if query.is_cpu else "cuda" if query.is_cuda else autocast.elsewhere(query)
    if device and torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check(
        query, key, value, prefix_key, prefix_value, causal=causal, q_offset=q_offset, keep=keep,
        bias=bias, window=window, softcap=softcap, sinks=sinks, dropout=dropout,
        no_prefix=no_prefix,
    )  # fmt: skip
    if prefix_key.dtype != query.dtype:
        prefix_key = prefix_key.to(query.dtype)
    if prefix_value.dtype != query.dtype:
        prefix_value = prefix_value.to(query.dtype)
    query, key, value = _unit(query), _unit(key), _unit(value)
    prefix_key, prefix_value = _unit(prefix_key), _unit(prefix_value)
    T, S, P = query.shape[2], key.shape[2], prefix_key.shape[-2]
    offset: int | Tensor = 0
    if causal:
        offset = S - T if q_offset is None else q_offset
        # the last position that any query has is P + offset + T - 1, at most P + S - 1
        last = P + (S if isinstance(offset, Tensor) else offset + T)
        if window is not None and last <= window:
            window = None
    reason = why_concat(
        bias=bias, softcap=softcap, sinks=sinks, dropout=dropout, return_weights=return_weights
    )
    if reason is None and not query.numel():
        reason = "an empty query"
    implementation: ModuleType | None = None
    if reason is None:
        rule = Rule(scale, causal, offset, keep, window, no_prefix)
        chosen = _choose(query, key, rule)
        if isinstance(chosen, str):
            reason = chosen
        else:
            implementation = chosen
    if implementation is None:
        assert reason is not None
        _note(reason)
        out, weights = prefix_concat.attend(
            query, key, value, prefix_key, prefix_value, scale=scale, causal=causal, offset=offset,
            keep=keep, bias=bias, window=window, softcap=softcap, sinks=sinks, dropout=dropout,
            no_prefix=no_prefix, weights=return_weights,
        )  # fmt: skip
        if not return_weights:
            return out
        assert weights is not None
        return out, weights
    if torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or prefix_key.requires_grad
        or prefix_value.requires_grad
    ):
        return _PrefixAttention.apply(
            query, key, value, prefix_key, prefix_value, keep, no_prefix, offset, scale, causal,
            window, implementation,
        )  # fmt: skip
    if T == 1 and implementation is prefix_merge and no_prefix is None:
        return prefix_merge.decode(query, key, value, prefix_key, prefix_value, rule)
    return implementation.forward(query, key, value, prefix_key, prefix_value, rule)[0]
