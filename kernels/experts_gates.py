"""The gates that make H [P, I] of GU, the output of the experts' first linear, on tiles.

GU is [P, 2·I], in which the layout says where G and U are: in "halves" beside each other, or
"interleaved" column by column; or it is G [P, I] "alone", without U. The gates are

    H = act(G) ∘ U                                                     G alone: H = act(G)
    H = silu(α·min(G, l)) / α ∘ (clip(U, -l, l) + c)                   with a clamp (α, l, c)

The second with c = 1 is that of gpt-oss, min(G, l)·σ(α·min(G, l)) ∘ (clip(U, -l, l) + 1), and with
α = 1 and c = 0 that of DeepSeek-V4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from . import checks
from .common import cast, device_function
from .experts_route import Route
from .mlp import activation, both
from .mlp_arguments import ACTIVATIONS

LAYOUTS = ("halves", "interleaved", "alone")


class Clamp(NamedTuple):
    """The constants of a clamped gate: α > 0, the limit l, and the c that is added to U."""

    alpha: float
    limit: float
    plus: float


def constants(clamp: tuple[float, float, float] | None) -> Clamp:
    """The numbers for a kernel, which looks at them only where there is a clamp."""
    return Clamp(1.0, 0.0, 0.0) if clamp is None else Clamp(*map(float, clamp))


def inner_width(columns: int, layout: str) -> int:
    """I of a GU with so many columns."""
    return columns if layout == "alone" else columns // 2


# ---------------------------------------------------------------------------------------- on tiles


@device_function
def load_gate(row, col0, row_ok, width, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    """G and U, each [BLOCK_M, BLOCK_K], of the columns from col0 on of H; both are G if alone.

    ``row`` [BLOCK_M, 1] are pointers to rows of GU, and ``width`` is I.
    """
    if LAYOUT == "interleaved":
        k = 2 * col0 + tl.arange(0, 2 * BLOCK_K)  # [2 * BLOCK_K]
        tile = tl.load(row + k[None, :], mask=row_ok[:, None] & (k < 2 * width)[None, :], other=0.0)
        g, u = tl.split(tl.reshape(tile, (BLOCK_M, BLOCK_K, 2)))
    else:
        k = col0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        ok = row_ok[:, None] & (k < width)[None, :]  # [BLOCK_M, BLOCK_K]
        g = tl.load(row + k[None, :], mask=ok, other=0.0)
        u = g
        if LAYOUT == "halves":
            u = tl.load(row + width + k[None, :], mask=ok, other=0.0)
    return g, u


@device_function
def _factor(u, limit, plus, CLAMPED: tl.constexpr):
    """What act(G) is multiplied with, in fp32; NaN stays."""
    u = u.to(tl.float32)
    if CLAMPED:
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + plus
    return u


@device_function
def gated(g, u, alpha, limit, plus, ACT: tl.constexpr, CLAMPED: tl.constexpr, ALONE: tl.constexpr):
    """H in the dtype of g, rounded where separate operations round."""
    x = g.to(tl.float32)
    if CLAMPED:
        value = activation(alpha * tl.where(x > limit, limit, x), ACT) / alpha
    else:
        value = activation(x, ACT)
    value = cast(value, g.dtype)
    if not ALONE:
        value = cast(value.to(tl.float32) * _factor(u, limit, plus, CLAMPED), g.dtype)
    return value


@device_function
def gated_grad(
    d, g, u, alpha, limit, plus, ACT: tl.constexpr, CLAMPED: tl.constexpr, ALONE: tl.constexpr
):
    """(H, dG, dU) in the dtype of g, of dH in fp32; alone, dU is dG."""
    x = g.to(tl.float32)
    if CLAMPED:
        value, slope = both(alpha * tl.where(x > limit, limit, x), ACT)
        value, slope = value / alpha, tl.where(x > limit, 0.0, slope)
    else:
        value, slope = both(x, ACT)
    h = cast(value, g.dtype)
    if ALONE:
        dg = cast(d * slope, g.dtype)
        du = dg
    else:
        factor, value = _factor(u, limit, plus, CLAMPED), h.to(tl.float32)
        h = cast(value * factor, g.dtype)
        dg = cast(d * factor * slope, g.dtype)
        du = d * value
        if CLAMPED:
            du = tl.where(tl.abs(u.to(tl.float32)) > limit, 0.0, du)
        du = cast(du, g.dtype)
    return h, dg, du


@device_function
def pick(values, at):
    """values[at] of a tuple of scalars or pointers of one type."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(at == i, values[i], found)
    return found


# ------------------------------------------------------------------------------------------ checks


def check_name(name: str, layout: str, clamp: tuple[float, float, float] | None) -> None:
    """Check that there is such a gate."""
    if name not in ACTIVATIONS:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(ACTIVATIONS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if clamp is None:
        return
    if name != "silu" or layout == "alone":
        raise ValueError(
            f"clamp is given with {name!r} and layout {layout!r}; allowed: silu, G with U"
        )
    if len(clamp) != 3 or not clamp[0] > 0 or not clamp[1] >= 0:
        raise ValueError(f"clamp is {tuple(clamp)}; allowed: (alpha > 0, limit >= 0, plus)")


def check_gate(
    gu: torch.Tensor, name: str, layout: str, clamp: tuple[float, float, float] | None
) -> torch.Tensor:
    """GU, checked to fit the gate, with unit strides along its rows."""
    check_name(name, layout, clamp)
    gu = checks.rows("gu", gu)
    if layout != "alone" and gu.shape[1] % 2:
        raise ValueError(f"gu has {gu.shape[1]} columns; allowed: an even number, G and U")
    return gu


def check_rows(name: str, t: torch.Tensor, route: Route) -> None:
    """Check that ``t`` has a row for each pair of the route."""
    if t.shape[0] != route.P:
        raise ValueError(f"{name} has {t.shape[0]} rows; allowed: {route.P}, the route's pairs")
