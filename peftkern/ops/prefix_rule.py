"""The settings and masks of a call of prefix attention, and the check of its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Needs = tuple[bool, bool, bool, bool, bool]  # dQ, dK, dV, dKp, dVp
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Rule(NamedTuple):
    """The keys that each query sees, and the settings of the scores.

    Query is [B, H, T, D], own keys are [B, H_kv, S, D], and the prefix has P keys. A causal query t
    sees own key s iff s <= ``offset`` + t. ``keep`` is bool [B, S] or None (all), ``window`` None
    if it hides nothing, ``no_prefix`` bool [B] or None (all see the prefix). ``softcap`` and
    ``sinks`` [H] change the scores; not every implementation takes them.
    """

    scale: float
    causal: bool
    offset: int | Tensor
    keep: Tensor | None = None
    window: int | None = None
    no_prefix: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def scored(self) -> str | None:
        """The change of the scores besides their scale, in words; None when there is none."""
        if self.softcap is not None:
            return f"softcap {self.softcap}"
        return "attention sinks" if self.sinks is not None else None


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    causal: bool,
    q_offset: int | Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    no_prefix: Tensor | None,
) -> None:
    """Check the arguments of :func:`peftkern.ops.prefix_attention.prefix_attention`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value; both errors name it.
    """
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; allowed: [B, H, T, D]")
    B, H, T, D = query.shape
    if key.dim() != 4 or key.shape[0] != B or key.shape[3] != D:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; allowed: [{B}, H_kv, S, {D}], as query"
        )
    H_kv, S = key.shape[1], key.shape[2]
    if not H_kv or H % H_kv:
        raise ValueError(f"query has {H} heads; allowed: a multiple of key's {H_kv}")
    if value.shape != key.shape:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; allowed: that of key, {tuple(key.shape)}"
        )
    shape = prefix_key.shape
    P = shape[-2] if len(shape) in (3, 4) else 0
    if P < 1 or shape[-1] != D or shape[-3] != H_kv or (len(shape) == 4 and shape[0] != B):
        raise ValueError(
            f"prefix_key has shape {tuple(shape)}; allowed: [{H_kv}, P, {D}], shared by the batch, "
            f"or [{B}, {H_kv}, P, {D}], with P >= 1"
        )
    if prefix_value.shape != shape:
        raise ValueError(
            f"prefix_value has shape {tuple(prefix_value.shape)}; allowed: that of prefix_key, "
            f"{tuple(shape)}"
        )
    dtype, device = query.dtype, query.device
    if not dtype.is_floating_point:
        raise TypeError(f"query has dtype {dtype}; allowed: a floating dtype")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; allowed: query's, {dtype}")
    for name, x in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {x.dtype}; allowed: a floating dtype")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; allowed: query's device, {device}")
    if causal:
        _check_offset(q_offset, B, S, T)
    if keep is not None:
        _flags("keep", keep, (B, S))
    if no_prefix is not None:
        _flags("no_prefix", no_prefix, (B,))
    if bias is not None:
        _check_bias(bias, (B, H, T, P + S), causal, keep, window)
    if window is not None:
        if window < 1:
            raise ValueError(f"window is {window}; allowed: 1 or more, or None")
        if not causal:
            raise ValueError(f"window is {window} with causal=False; allowed: causal=True")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap is {softcap}; allowed: more than 0, or None")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}; allowed: [{H}], one for each head of query"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; allowed: 0 up to, but not including, 1")


def _check_offset(q_offset: int | Tensor | None, B: int, S: int, T: int) -> None:
    if q_offset is None:
        if S < T:
            raise ValueError(
                f"key has {S} rows for {T} rows of query; allowed: as many or more, or a q_offset"
            )
    elif isinstance(q_offset, Tensor):
        if q_offset.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"q_offset has dtype {q_offset.dtype}; allowed: int32, int64")
        if q_offset.numel() != 1 and q_offset.shape != (B,):
            raise ValueError(
                f"q_offset has shape {tuple(q_offset.shape)}; allowed: one element, or [{B}]"
            )
    elif q_offset < 0:
        raise ValueError(f"q_offset is {q_offset}; allowed: 0 or more")


def _flags(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed: torch.bool")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {list(shape)}")


def _check_bias(bias: Tensor, shape: tuple[int, ...], causal: bool, keep: Any, window: Any) -> None:
    if causal or keep is not None or window is not None:
        raise ValueError(
            "bias is given with causal, keep or window; allowed: it stands in their place"
        )
    if bias.dtype != torch.bool and not bias.dtype.is_floating_point:
        raise TypeError(f"bias has dtype {bias.dtype}; allowed: torch.bool or a floating dtype")
    have = tuple(bias.shape)
    fits = len(have) <= 4 and all(
        n in (1, m) for n, m in zip(have[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"bias has shape {have}; allowed: what broadcasts to {list(shape)}")
