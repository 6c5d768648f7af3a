"""The parts that the kernels of prefix attention share: the checked problem, functions on tiles.

Coordinates inside the kernels are those of the own keys: own key s is at s, prefix key p at p - P,
and own query t at q_offset + t. With these, one comparison for causal order and one for the sliding
window serve both sources.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from . import checks
from .common import device_function, next_pow2, precision

MAX_HEAD_DIM = 256
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@device_function
def tile(base, index, ok, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows ``index`` [R] of a matrix with D columns, [R, BLOCK_D]; 0 if not ok and past D."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    at = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [R, BLOCK_D]
    mask = ok[:, None]  # [R, 1]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@device_function
def store_tile(base, index, ok, stride, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store ``x`` [R, BLOCK_D] to these rows, as :func:`tile` loads them; x has base's dtype."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    at = base + index.to(tl.int64)[:, None] * stride + d[None, :]  # [R, BLOCK_D]
    mask = ok[:, None]  # [R, 1]
    if D != BLOCK_D:
        mask = mask & (d < D)[None, :]
    tl.store(at, x, mask=mask)


@device_function
def tanh(x):
    """tanh(x) in fp32, exact to a few units in the last place.

    The interpreter has no libdevice, and the quotient alone is inexact for small x. The
    coefficients are a fit to tanh(x) / x on |x| <= 0.6.
    """
    z = x * x
    small = 0.0207444676 - 0.0058527958 * z
    small = 0.133315258 + z * (-0.0537618561 + z * small)
    small = x * (1.0 + z * (-0.333332695 + z * small))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))  # the tensor comes first, or it becomes a constexpr
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -large, large))


@device_function
def scores(products, scale, softcap, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr):
    """The scores from the products Q Kᵀ, in the unit of :func:`power`.

    That is base 2 for two-byte inputs, which saves a multiplication for each element, and natural
    for fp32, which saves two roundings (there they would be visible).
    """
    if NATURAL:
        unit = 1.0
    else:
        unit = LOG2E
    if SOFTCAP:
        out = tanh(products * (scale / softcap)) * (softcap * unit)
    else:
        out = products * (scale * unit)
    return out


@device_function
def power(x, NATURAL: tl.constexpr):
    if NATURAL:
        out = tl.exp(x)
    else:
        out = tl.exp2(x)
    return out


@device_function
def logarithm(x, NATURAL: tl.constexpr):
    if NATURAL:
        out = tl.log(x)
    else:
        out = tl.log2(x)
    return out


@device_function
def from_natural(x, NATURAL: tl.constexpr):
    """A natural logarithm (or score) converted to the unit of :func:`power`."""
    if not NATURAL:
        x = x * LOG2E
    return x


@device_function
def to_natural(x, NATURAL: tl.constexpr):
    if not NATURAL:
        x = x * LN2
    return x


@device_function
def visible(query, key, ok, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """int1, True where a query sees a key; query, key (coordinates) and ``ok`` are broadcast."""
    see = ok
    if CAUSAL:
        see = see & (key <= query)
    if WINDOW:
        see = see & (key > query - window)
    return see


@device_function
def offset_of(b, q_offset_at, q_offset, offset_stride):
    """The q_offset of row b of the batch, read from device memory if it was given as a tensor."""
    if q_offset_at is None:
        out = q_offset
    else:
        out = tl.load(q_offset_at + b * offset_stride).to(tl.int32)
    return out


@device_function
def kept(keep, n, ok, own):
    """``ok`` [N] without padding: int1, True for keys n that ``keep`` keeps.

    ``keep`` is int8, at this row of the batch; None means no padding. It is for own keys: with
    ``own`` 0 it is not read.
    """
    if keep is not None:
        # `own` is made a block, as triton 3.9's interpreter takes no mask of a block and a scalar
        ok = ok & (tl.load(keep + n, mask=ok & (n * 0 + own != 0), other=1) != 0)
    return ok


class Problem(NamedTuple):
    """The checked arguments of a call.

    ``prefix_key`` and ``prefix_value`` are [1 or B, H_kv, P, D]; all tensors have unit stride along
    D; ``keep`` [B, S] and ``no_prefix`` [B] are int8.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix_key: torch.Tensor
    prefix_value: torch.Tensor
    keep: torch.Tensor | None
    no_prefix: torch.Tensor | None
    sinks: torch.Tensor | None
    q_offset_at: torch.Tensor | None
    q_offset: int
    window: int | None
    scale: float
    softcap: float
    causal: bool
    shared: bool  # True: one prefix for the whole batch

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """(B, H, H_kv, T, S, P, D)."""
        B, H, T, D = self.q.shape
        return B, H, self.k.shape[1], T, self.k.shape[2], self.prefix_key.shape[2], D

    def offsets(self) -> tuple[torch.Tensor | None, int, int]:
        """(tensor, number, stride): the arguments of :func:`offset_of`."""
        at = self.q_offset_at
        return at, self.q_offset, at.stride(0) if at is not None and at.numel() > 1 else 0

    def meta(self) -> dict[str, object]:
        """The constexprs that all kernels have in common."""
        return dict(
            D=self.q.shape[3], BLOCK_D=max(16, next_pow2(self.q.shape[3])), CAUSAL=self.causal,
            WINDOW=self.window is not None, SOFTCAP=self.softcap > 0,
            NATURAL=self.q.dtype == torch.float32, PRECISION=precision(self.q.dtype),
        )  # fmt: skip

    def rows_like_q(self) -> torch.Tensor:
        """An empty tensor for O or dQ: [B, H, T, D], a view of [B, T, H, D], as layers need it."""
        B, H, T, D = self.q.shape
        return self.q.new_empty((B, T, H, D)).transpose(1, 2)


def strides(t: torch.Tensor, shared: bool = False) -> tuple[int, int, int]:
    """(batch, head, row) strides of ``t`` [B, heads, rows, D]; the first is 0 if it is shared."""
    return (0 if shared else t.stride(0), t.stride(1), t.stride(2))


def unit_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _four(name: str, t: torch.Tensor, dims: tuple[int, ...] = (4,)) -> None:
    if not isinstance(t, torch.Tensor) or t.dim() not in dims:
        got = (
            f"shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else f"type {type(t).__name__}"
        )
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name} has {got}; allowed: a tensor of {allowed} dimensions")


def _flags(name: str, t: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Checked flags (bool or int8) as int8, with unit stride along the last dimension."""
    if t is None:
        return None
    if t.dtype not in (torch.bool, torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {t.dtype}; allowed: torch.bool, torch.int8")
    checks.shape(name, t, shape, "one flag each")
    t = t.view(torch.int8)
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_key: torch.Tensor,
    prefix_value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int | torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    no_prefix: torch.Tensor | None = None,
) -> Problem:
    """Check the arguments of :func:`.prefix_attention.attend` and return them as a problem.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        _four(name, t)
    for name, t in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        _four(name, t, (3, 4))
    B, H, T, D = q.shape
    H_kv, S, P = k.shape[1], k.shape[2], prefix_key.shape[-2]
    if q.dtype not in checks.DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in checks.DTYPES)
        raise TypeError(f"q has dtype {q.dtype}; allowed: {allowed}")
    for name, t in (("k", k), ("v", v), ("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if t.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: {q.dtype}, that of q")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q has head dimension {D}; allowed: 1 to {MAX_HEAD_DIM}")
    checks.shape("k", k, (B, H_kv, S, D), "[batch of q, H_kv, S, head dimension of q]")
    checks.shape("v", v, (B, H_kv, S, D), "the shape of k")
    if H_kv < 1 or H % H_kv:
        raise ValueError(f"q has {H} heads; allowed: a multiple of the {H_kv} heads of k")
    shared = prefix_key.dim() == 3
    want = (H_kv, P, D) if shared else (B, H_kv, P, D)
    checks.shape("prefix_key", prefix_key, want, "[H_kv, P, D], or [B, H_kv, P, D]")
    checks.shape("prefix_value", prefix_value, want, "the shape of prefix_key")
    if scale is None:
        scale = D**-0.5
    if window is not None and (not causal or window < 1):
        given = f"{window}" if causal else f"{window} with causal=False"
        raise ValueError(f"window is {given}; allowed: 1 or more, with causal=True, or None")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; allowed: more than 0, or None")
    if sinks is not None:
        checks.shape("sinks", sinks, (H,), "one for each head of q")
        if not sinks.is_floating_point():
            raise TypeError(f"sinks has dtype {sinks.dtype}; allowed: a floating dtype")
        sinks = sinks.contiguous()
    q_offset_at = None
    if isinstance(q_offset, torch.Tensor):
        if q_offset.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"q_offset has dtype {q_offset.dtype}; allowed: torch.int32, int64")
        if q_offset.numel() != 1 and tuple(q_offset.shape) != (B,):
            raise ValueError(
                f"q_offset has shape {tuple(q_offset.shape)}; allowed: one element, or ({B},)"
            )
        q_offset_at, q_offset = q_offset.reshape(-1), 0
    else:
        if q_offset is None:
            q_offset = S - T
        if causal and q_offset < 0:
            raise ValueError(
                f"q_offset is {q_offset}; allowed: 0 or more (its default is S - T, {S} - {T} here)"
            )
    keep = _flags("keep", keep, (B, S))
    no_prefix = _flags("no_prefix", no_prefix, (B,))
    checks.device(
        q=q, k=k, v=v, prefix_key=prefix_key, prefix_value=prefix_value, keep=keep,
        no_prefix=no_prefix, sinks=sinks, q_offset=q_offset_at,
    )  # fmt: skip
    if shared:
        prefix_key, prefix_value = prefix_key[None], prefix_value[None]
    return Problem(
        unit_rows(q), unit_rows(k), unit_rows(v), unit_rows(prefix_key), unit_rows(prefix_value),
        keep, no_prefix, sinks, q_offset_at,
        int(q_offset), window, float(scale), float(softcap or 0.0), bool(causal), shared,
    )  # fmt: skip
