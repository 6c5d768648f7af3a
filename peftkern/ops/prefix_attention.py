"""Attention over a prefix and a sequence's own keys in one softmax, as one operation.

    O = softmax(scale · Q [Kp; K]ᵀ) [Vp; V]          (Li and Liang, 2021)

The prefix is not concatenated to the own keys and, if it is shared, not copied over the batch. The
exception is one query row over so few keys that a copy is faster than a second call. Gradients of
a shared prefix are summed over the batch. For the backward Q, K, V, Kp, Vp, O and one number a row
are kept. The first of these implementations that takes the call runs it:

- the Triton kernel (:func:`why_not_kernel`);
- for decoding on a CPU with a window, softcap or sinks, one row (:mod:`.prefix_row`);
- for long float32 queries on a CPU, blocks of one softmax over both sources
  (:mod:`.prefix_blocked`);
- the vendor's attention for each part, merged (:mod:`.prefix_merge`).

All other calls are computed as in HF PEFT (:mod:`.prefix_concat`); the reason is logged once.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..utils.private import in_transform
from . import autocast, prefix_blocked, prefix_concat, prefix_merge, prefix_row, torch_backend
from . import backend as _backend
from .apart import apart
from .notes import note_once
from .prefix_rule import Rule, check
from .tracing import is_tracing

_CONCAT = "prefix attention runs on concatenated keys and values: %s"


def why_not_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    rule: Rule,
    training: bool,
) -> str | None:
    """The reason that a call does not go to the Triton kernel of ``kernels/``; None when it does.

    ``PEFTKERN_BACKEND`` (or ``use_backend``) decides as for LoRA. With ``torch`` no call goes
    there, with ``triton`` every call that the kernel can compute, and with ``auto`` those for which
    it won a race on the device.
    """
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if _backend.active is torch_backend:
        return "the torch backend"
    from . import prefix_kernel

    reason = prefix_kernel.why_not(query, training)
    if reason is not None or _backend.requested() == "triton":
        return reason
    from . import prefix_auto

    return prefix_auto.why_not(
        *(query, key, value, prefix_key, prefix_value, rule, training),
        functools.partial(_by_torch, training=training),
    )


def why_concat(*, bias: Tensor | None, dropout: float, return_weights: bool) -> str | None:
    """The option that makes a call run on concatenated keys, in words; None without one."""
    if bias is not None:
        return "an attention bias"
    if dropout > 0.0:
        return "dropout on the attention weights"
    if return_weights:
        return "the attention weights are asked for"
    return None


# {facts of a call that decide: the implementation, or why none takes it}, see `_torch_choice`
_chosen: dict[tuple[Any, ...], ModuleType | str] = {}


def _torch_choice(query: Tensor, rule: Rule, training: bool) -> ModuleType | str:
    """Torch's implementation for a call without bias, dropout or weights, or why none takes it.

    It is determined once for each kind of call, since every layer of every step asks.
    """
    T = query.shape[2]
    key = (
        *(training, query.device.type, query.dtype, query.shape[-1]),
        T if T < prefix_blocked.ROWS else prefix_blocked.ROWS,
        *(rule.window is None, rule.softcap, rule.sinks is None, type(rule.offset)),
        *(rule.keep is None, rule.no_prefix is None),
        torch.get_num_threads() > prefix_blocked.THREADS,
    )
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(query, rule, training)
    return found


def _choose(query: Tensor, rule: Rule, training: bool) -> ModuleType | str:
    if not training and prefix_row.why_not(query, rule) is None:
        return prefix_row
    if not torch.compiler.is_compiling() and prefix_blocked.why_not(query, rule) is None:
        return prefix_blocked
    reason = prefix_merge.why_not(query, rule)
    return prefix_merge if reason is None else reason


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule, training: bool
) -> Tensor:
    """O of a call without bias, dropout or weights, by one of torch's implementations."""
    # a tracer's symbols for sizes cannot be keys of the lookup
    known = type(q.shape[2]) is int and type(q.shape[3]) is int
    ask = _torch_choice if known and not torch.compiler.is_compiling() else _choose
    chosen = ask(q, rule, training)
    if not isinstance(chosen, str):
        return _run(chosen, q, k, v, kp, vp, rule, training)
    note_once(_CONCAT, chosen)
    return prefix_concat.attend(
        q, k, v, kp, vp, scale=rule.scale, causal=rule.causal, offset=rule.offset, keep=rule.keep,
        window=rule.window, softcap=rule.softcap, sinks=rule.sinks, no_prefix=rule.no_prefix,
    )[0]  # fmt: skip


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _run(
    implementation: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kp: Tensor,
    vp: Tensor,
    rule: Rule,
    training: bool,
) -> Tensor:
    if training:
        scale, causal, offset, keep, window, no_prefix, softcap, sinks = rule
        o: Tensor = _PrefixAttention.apply(  # type: ignore[no-untyped-call]  # it has no types
            q, k, v, kp, vp, sinks, keep, no_prefix, offset, scale, causal, window, softcap,
            implementation,
        )  # fmt: skip
        return o
    if implementation is prefix_merge and q.shape[2] == 1 and rule.no_prefix is None:
        return prefix_merge.decode(q, k, v, kp, vp, rule)
    o, _ = implementation.forward(q, k, v, kp, vp, rule)
    return o


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        sinks: Tensor | None,
        keep: Tensor | None,
        no_prefix: Tensor | None,
        offset: int | Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        implementation: ModuleType,
    ) -> Tensor:
        rule = Rule(scale, causal, offset, keep, window, no_prefix, softcap, sinks)
        o: Tensor
        o, lse = implementation.forward(query, key, value, prefix_key, prefix_value, rule)
        moving = offset if isinstance(offset, Tensor) else None
        ctx.save_for_backward(
            query, key, value, prefix_key, prefix_value, o, lse, keep, no_prefix, sinks, moving
        )
        ctx.settings = (scale, causal, None if moving is not None else offset, window, softcap)
        ctx.implementation = implementation
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, o, lse, keep, no_prefix, sinks, moving = ctx.saved_tensors
        scale, causal, offset, window, softcap = ctx.settings
        offset = moving if moving is not None else offset
        rule = Rule(scale, causal, offset, keep, window, no_prefix, softcap, sinks)
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():  # create_graph=True
            return (*_differentiable_backward(do, inputs, rule, needs), *[None] * 8)
        grads = ctx.implementation.backward(do, *inputs, o, lse, rule, needs[:5])
        # only the kernel takes sinks; it gives their gradient in float32
        extra = grads[5].to(sinks.dtype) if needs[5] else None
        return (*grads[:5], extra, *[None] * 8)


def _differentiable_backward(
    do: Tensor, inputs: list[Tensor], rule: Rule, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients by autograd of the plain formula, as a graph, for second derivatives."""
    with torch.enable_grad():
        q, k, v, kp, vp = apart(inputs)  # keys may be values too
        (sinks,) = apart([rule.sinks])
        given = [q, k, v, kp, vp, sinks]
        B, S, P = q.shape[0], k.shape[2], kp.shape[-2]
        mask = prefix_concat.mask_of(B, q.shape[2], S, P, rule, q.device)
        keys = torch.cat([kp.expand(B, -1, -1, -1), k], 2)
        values = torch.cat([vp.expand(B, -1, -1, -1), v], 2)
        o, _ = prefix_concat.formula(
            q, keys, values, rule.scale, mask, softcap=rule.softcap, sinks=sinks
        )
        wanted = [i for i in range(6) if needs[i]]
        leaves: list[Any] = [given[i] for i in wanted]
        grads = torch.autograd.grad(o, leaves, do, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return [found.get(i) for i in range(6)]


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
    """Attention over P prefix keys, at positions 0 to P - 1, and S own keys, from P on.

    Args:
        query: [B, H, T, D], floating point.
        key, value: [B, H_kv, S, D] in query's dtype; H a multiple of H_kv.
        prefix_key, prefix_value: [H_kv, P, D], shared by the batch, or [B, H_kv, P, D]; cast to
            query's dtype.
        scale: factor of the scores, before softmax (and before ``softcap``).
        causal: own query t sees own key s iff s <= q_offset + t, and the whole prefix.
        q_offset: coordinate of the first query among the own keys, 0 or more; default S - T. An
            int, or an int32/int64 tensor of one element or [B], for which the host does not wait.
        keep: bool [B, S], False where an own key is padding.
        bias: bool (True = visible) or floating (added to the scores), broadcastable to [B, H, T,
            P + S]; in place of causal, keep and window.
        window: position i sees position j iff i - window < j <= i. The prefix has the first P
            positions, so it slides out of view. Needs ``causal``.
        softcap: scores become softcap · tanh(score / softcap).
        sinks: [H], for each head a score that takes its share of the softmax and has no value.
        dropout: probability on the weights, in [0, 1); 0 when not training. Drawn by torch's
            generator, as in HF PEFT.
        no_prefix: bool [B], True for rows of the batch that see no prefix.
        return_weights: return the weights too.

    Returns:
        [B, H, T, D] in query's dtype (autocast's when that is on); with ``return_weights`` also the
        weights [B, H, T, P + S]. A row that sees nothing is 0. Differentiable in query, key, value,
        the prefix and sinks, and twice unless ``scaled_dot_product_attention`` runs. Transforms of
        torch.func and forward-mode AD get the formula, operation by operation.

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
    # unit stride along D, which the vendor's attention assumes
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    prefix_key = prefix_key if prefix_key.stride(-1) == 1 else prefix_key.contiguous()
    prefix_value = prefix_value if prefix_value.stride(-1) == 1 else prefix_value.contiguous()
    T, S, P = query.shape[2], key.shape[2], prefix_key.shape[-2]
    offset: int | Tensor = 0
    if causal:
        offset = S - T if q_offset is None else q_offset
        # the last position that any query has is P + offset + T - 1, at most P + S - 1
        last = P + (S if isinstance(offset, Tensor) else offset + T)
        if window is not None and last <= window:
            window = None
    reason = None
    if bias is not None or dropout or return_weights:
        reason = why_concat(bias=bias, dropout=dropout, return_weights=return_weights)
    elif is_tracing():
        reason = "torch.jit.trace or an ONNX export is tracing"
    elif in_transform():
        reason = "a transform of torch.func, or forward-mode AD, follows the plain formula"
    elif not query.numel():
        reason = "an empty query"
    if reason is not None:
        note_once(_CONCAT, reason)
        out, weights = prefix_concat.attend(
            query, key, value, prefix_key, prefix_value, scale=scale, causal=causal, offset=offset,
            keep=keep, bias=bias, window=window, softcap=softcap, sinks=sinks, dropout=dropout,
            no_prefix=no_prefix, weights=return_weights,
        )  # fmt: skip
        if not return_weights:
            return out
        assert weights is not None
        return out, weights
    rule = Rule(scale, causal, offset, keep, window, no_prefix, softcap, sinks)
    inputs = query, key, value, prefix_key, prefix_value
    training = torch.is_grad_enabled() and _needs_gradients(*inputs, sinks)
    if _backend.active is torch_backend:
        return _by_torch(*inputs, rule, training)
    reason = why_not_kernel(*inputs, rule, training)
    if reason is not None:
        note_once("prefix attention does not run on the Triton kernel: %s", reason)
        return _by_torch(*inputs, rule, training)
    from . import prefix_kernel

    return _run(prefix_kernel, *inputs, rule, training)
