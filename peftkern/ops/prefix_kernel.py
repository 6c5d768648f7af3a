"""Prefix attention on the Triton kernels of ``kernels/``.

Signatures are those of :mod:`.prefix_merge`, with one more gradient, that of the sinks. It imports
triton, so it is only imported when the kernels may run. They run with their default configs: no
tuning table has entries for them.
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
from ..utils.private import in_transform
from .device import on_its_device
from .prefix_rule import Needs, Rule

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def refusal(like: Tensor, D: int, training: bool) -> str | None:
    """The reason that the kernels take no call with this head dimension D; None when they may.

    The activations have the dtype and the device of ``like``.
    """
    if not (like.is_cuda or INTERPRET.value):
        return f"the tensors are on {like.device.type}, and Triton's interpreter is off"
    if like.dtype not in DTYPES:
        return f"dtype {like.dtype}"
    if D > MAX_HEAD_DIM:
        return f"head dimension {D} is above {MAX_HEAD_DIM}"
    return declines(like.dtype, D) if training else None


def why_not(q: Tensor, training: bool) -> str | None:
    """The reason that the kernels do not take a call on q [B, H, T, D]; None when they do."""
    kind: Any = type(q)
    if kind not in _PLAIN:
        return f"tensors of {kind.__name__}"
    if in_transform():
        return "a transform of torch.func, or forward-mode AD"
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
    """(O [B, H, T, D], lse [B, H, T]); lse is -inf where a query sees nothing."""
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
    """(dQ, dK, dV, dKp, dVp, gradient of the sinks, or None without sinks).

    The kernels make all of them at once; those that ``needs`` does not ask for become None.
    """
    grads = attend_backward(do, q, k, v, kp, vp, o, lse, **_options(rule))
    found = [g if need else None for g, need in zip(grads, needs, strict=False)]
    return (*found, grads.sinks)
