"""Prefix attention on the Triton kernels of ``kernels/``; signatures as in :mod:`.prefix_merge`,
with one gradient more, that of the sinks.

Imported where those kernels may run, because it imports triton. They run with their default
configs: no tuning table has entries for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.checks import DTYPES
from ..kernels.common import INTERPRET
from ..kernels.prefix_attention import attend
from ..kernels.prefix_backward import attend_backward, declines
from ..kernels.prefix_decode import decode, few_rows
from ..kernels.prefix_tile import MAX_HEAD_DIM
from ..utils.private import transforms_active
from .device import on_its_device
from .prefix_rule import Needs, Rule

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def refusal(like: Tensor, D: int, training: bool) -> str | None:
    """Why no call with activations as ``like`` and head dimension D goes to the kernels; None when
    they may take it."""
    if not (like.is_cuda or INTERPRET.value):
        return f"the tensors are on {like.device.type}, and Triton's interpreter is off"
    if like.dtype not in DTYPES:
        return f"dtype {like.dtype}"
    if D > MAX_HEAD_DIM:
        return f"head dimension {D} is above {MAX_HEAD_DIM}"
    return declines(like.dtype, D) if training else None


def why_not(q: Tensor, training: bool) -> str | None:
    """The same for a call on q [B, H, T, D]."""
    kind: Any = type(q)
    if kind not in _PLAIN:
        return f"tensors of {kind.__name__}"
    if transforms_active():
        return "inside a torch.func transform"
    return refusal(q, q.shape[3], training)


def _options(rule: Rule) -> dict[str, Any]:
    return dict(
        scale=rule.scale, causal=rule.causal, q_offset=rule.offset, keep=rule.keep,
        window=rule.window, softcap=rule.softcap, sinks=rule.sinks, no_prefix=rule.no_prefix,
    )  # fmt: skip


@on_its_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, kp: Tensor, vp: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """O [B, H, T, D] and lse [B, H, T], which is -inf where a query sees nothing."""
    few = few_rows(q.shape[2], q.shape[1] // k.shape[1])
    done: tuple[Tensor, Tensor] = (decode if few else attend)(q, k, v, kp, vp, **_options(rule))
    return done


@on_its_device
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
) -> tuple[Tensor | None, ...]:
    """dQ, dK, dV, dKp, dVp (None for what ``needs`` does not ask for) and, where there are sinks,
    their gradient. The kernels make all of them at once."""
    grads = attend_backward(do, q, k, v, kp, vp, o, lse, **_options(rule))
    found = [g if need else None for g, need in zip(grads, needs, strict=False)]
    return (*found, grads.sinks)
