"""A mixture's gate and its gradients as float64 torch formulas, in a route's order of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import experts_reference
from .experts_route import Route
from .mlp_reference import apply


def hidden(
    gu: Tensor, name: str, layout: str, clamp: tuple[float, float, float] | None = None
) -> Tensor:
    """H [P, I] of GU [P, 2·I] (or [P, I] alone) by torch's operations in GU's dtype.

    Of a clamped gate a number at a limit has the gradient of one within it, as in the kernels.
    """
    if layout == "alone":
        return apply(gu, name)
    g, u = gu.chunk(2, 1) if layout == "halves" else (gu[:, ::2], gu[:, 1::2])
    if clamp is None:
        return apply(g, name) * u
    alpha, limit, plus = clamp
    # not clamp, whose gradient at its limits is 1 up to torch 2.13 and 0 from 2.14 on
    g = torch.where(g > limit, limit, g)
    u = torch.where(u > limit, limit, torch.where(u < -limit, -limit, u))
    return g * torch.sigmoid(alpha * g) * (u + plus)


def gate(
    gu: Tensor,
    route: Route,
    name: str,
    layout: str,
    As: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] = (1.0,),
    keep: Tensor | None = None,
    clamp: tuple[float, float, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(H [P, I], S [P, r] or None without ``As``); ``keep`` is the mask, bool [P, I]."""
    h = hidden(gu.double(), name, layout, clamp)
    if As is None:
        return h, None
    return h, experts_reference.shrink(h, route, As, scales, False, keep)


def gate_grad(
    dh0: Tensor,
    gu: Tensor,
    route: Route,
    name: str,
    layout: str,
    weights: Tensor,
    b: Tensor | None = None,
    s: Tensor | None = None,
    scale: float = 1.0,
    clamp: tuple[float, float, float] | None = None,
    ds_down: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dGU, dw [P] of pairs, dS, dB [E, N, r], dA' [E, r', I]); None for those not wanted.

    dw and dS are 0 for pairs that are in no group. ``keep`` is the mask of H in dA', bool [P, I].
    """
    last = int(route.offsets[-1])  # rows after it are in no group
    with torch.enable_grad():
        leaf = gu.detach().double().requires_grad_()
        h = hidden(leaf, name, layout, clamp)
        w = weights.double().reshape(-1)[route.pairs.long()]
        [dgu] = torch.autograd.grad(h, leaf, dh0.double() * w[:, None])
    h = h.detach()
    dw = h.new_zeros(route.P)
    dw[route.pairs[:last].long()] = (dh0.double() * h)[:last].sum(1)
    ds = db = da = None
    if b is not None:
        ds = experts_reference.grad_s(dgu, route, b, scale, False)
    if s is not None:
        db = experts_reference.grad_b(dgu, route, s, False)
    if ds_down is not None:
        da = experts_reference.grad_a(ds_down, h, route, False, weights, keep)
    return dgu, dw, ds, db, da
