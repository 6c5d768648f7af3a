"""The floor of a mixture of experts: its natural passes, each operand read or written once a pass.

A mixture cannot be one launch as a LoRA linear can: an output of one pass is summed over in full
before the next can use it. What stands between two passes is written once and read once. Forward:

    1. up       X, W_u, A_u, B_u -> GU, S_u           X counts once: a token's k rows share it
    2. gate     GU, A_d -> H, S_d
    3. down     H, S_d, W_d, B_d -> Y of all pairs
    4. combine  Y, w -> Out

Backward, where dA_d and dB_d are made in the passes that have their operands in hand, so that
nobody writes H again:

    5. dH       dOut, W_d, A_d, B_d, S_d, w -> dH, dS_d, dB_d     dOut counts once, as X does
    6. gate     dH, GU, w, B_u, S_u, dS_d -> dGU, dS_u, dB_u, dA_d, dw
    7. dX       dGU, dS_u, W_u, A_u, X -> dX of all pairs, dA_u
    8. combine  dX of all pairs -> dX

The pairs' order is read by each pass that gathers or scatters; making it is not counted. Weights
and factors are those of the experts that have a token. S, dS and what has P rows are in the
activations' dtype, gradients of factors in theirs. A bias is read by the pass that adds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.traffic import Traffic, unit_of


class Mixture(NamedTuple):
    """T tokens of D columns, each with k of E experts [2·I, D] and [D, I], adapters of rank r."""

    T: int
    k: int
    E: int
    D: int
    I: int  # noqa: E741  # as everywhere for mixtures
    r: int
    bias: bool = False
    adapter: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16

    @property
    def P(self) -> int:
        return self.T * self.k

    @property
    def chosen(self) -> int:
        """The experts that get a token, in an even routing."""
        return min(self.E, self.P)


class _Sizes:
    """Bytes of a mixture's tensors; A and B of both linears."""

    def __init__(self, m: Mixture) -> None:
        item, low, E, P, N = m.dtype.itemsize, m.adapter.itemsize, m.chosen, m.P, 2 * m.I
        self.x = m.T * m.D * item  # and Out, dOut, dX
        self.w_up, self.w_down = E * N * m.D * item, E * m.D * m.I * item
        self.bias_up, self.bias_down = (E * n * item * m.bias for n in (N, m.D))
        self.a_up, self.b_up = E * m.r * m.D * low, E * N * m.r * low
        self.a_down, self.b_down = E * m.r * m.I * low, E * m.D * m.r * low
        self.gu, self.h, self.y, self.s = (P * n * item for n in (N, m.I, m.D, m.r))
        self.order, self.routing = P * 4, P * item


def _flops(m: Mixture, passes: int) -> int:
    """Of the base, and of each factor ``passes`` times."""
    low = m.r * (m.D + 2 * m.I) + m.r * (m.I + m.D)
    return 2 * m.P * (3 * m.I * m.D + passes * low)


def forward(m: Mixture) -> list[Traffic]:
    s = _Sizes(m)
    base, low = 2 * m.P * m.D, 2 * m.P * m.r
    passes = (
        ("up", s.x + s.order + s.w_up + s.bias_up + s.a_up + s.b_up, s.gu + s.s,
         base * 2 * m.I + low * (m.D + 2 * m.I)),
        ("gate", s.gu + s.a_down, s.h + s.s, low * m.I),
        ("down", s.h + s.s + s.order + s.w_down + s.bias_down + s.b_down, s.y,
         base * m.I + low * m.D),
        ("combine", s.y + s.routing, s.x, 0),
    )  # fmt: skip
    return _as_traffic(m, passes)


def backward(m: Mixture) -> list[Traffic]:
    """Gradients of X, the routing weights and every factor."""
    s = _Sizes(m)
    base, low = 2 * m.P * m.D, 2 * m.P * m.r
    passes = (
        ("dH", s.x + s.order + s.routing + s.w_down + s.a_down + s.b_down + s.s,
         s.h + s.s + s.b_down, base * m.I + low * (2 * m.D + m.I)),
        ("gate", s.h + s.gu + s.order + s.routing + s.bias_down + s.b_up + 2 * s.s,
         s.gu + s.s + s.b_up + s.a_down + s.routing, low * (4 * m.I + m.I)),
        ("dX", s.gu + s.s + s.order + s.w_up + s.a_up + s.x, s.y + s.a_up,
         base * 2 * m.I + low * (2 * m.D)),
        ("combine", s.y, s.x, 0),
    )  # fmt: skip
    return _as_traffic(m, passes)


def kept(m: Mixture) -> int:
    """Bytes kept for the backward beyond X, the routing and the weights: GU, S, and the order."""
    s = _Sizes(m)
    return s.gu + 2 * s.s + s.order


def _as_traffic(m: Mixture, passes: tuple[tuple[str, int, int, int], ...]) -> list[Traffic]:
    unit = unit_of(m.dtype)
    return [
        Traffic(f"floor, {name}", 1, read, written, flops, unit if flops else "none")
        for name, read, written, flops in passes
    ]
