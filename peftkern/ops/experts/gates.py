"""A mixture's gate on rows of up's output: H, and the gradient behind it.

    H = act(G) ∘ U        dU = dH ∘ act(G)        dG = dH ∘ U ∘ act'(G)

The clamped gates of gpt-oss and its like are min(G, l)·σ(α·min(G, l)) ∘ (clip(U, -l, l) + c). A
gate without a name is differentiated by autograd, from GU again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..mlp_torch import ACTIVATIONS, _derivative
from .blocks import SharedRows
from .parts import Gate

LAYOUTS = ("halves", "interleaved", "alone")


def parted(gu: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """(G, U) as views of GU [M, N1]; U is None for a gate alone."""
    if layout == "alone":
        return gu, None
    if layout == "interleaved":
        return gu[:, 0::2], gu[:, 1::2]
    g, u = gu.chunk(2, 1)
    return g, u


def clamped(gu: Tensor, layout: str, clamp: tuple[float, float, float]) -> Tensor:
    """H [M, I] of GU [M, 2·I] by the clamped formula, with its constants (α, l, c)."""
    alpha, limit, plus = clamp
    g, u = parted(gu, layout)
    assert u is not None, layout
    g = g.clamp(max=limit)
    return g * torch.sigmoid(alpha * g) * (u.clamp(-limit, limit) + plus)


def _activated(name: str, g: Tensor, scratch: SharedRows | None) -> Tensor:
    """act(G), a new tensor or one of the scratch."""
    if scratch is None or name != "silu":
        return ACTIVATIONS[name](g)
    return torch.ops.aten.silu.out(g, out=scratch.take("act", *g.shape))  # type: ignore[no-any-return]


def hidden(gate: Gate, gu: Tensor, scratch: SharedRows | None = None) -> Tensor:
    """H [M, I]; with ``scratch`` it may be its "act"."""
    if gate.name is None:
        return gate.function(gu)
    g, u = parted(gu, gate.layout)
    h = _activated(gate.name, g, scratch)
    return h if u is None else h.mul_(u)


class Again(NamedTuple):
    """H made again for the backward, and what the gate's gradient needs."""

    h: Tensor  # [M, I], without a graph
    act: Tensor | None  # act(G), where there is U
    graph: tuple[Tensor, Tensor] | None  # (GU, H) of a gate without a name


def hidden_again(gate: Gate, gu: Tensor, scratch: SharedRows | None = None) -> Again:
    """With ``scratch`` H may be its "h", and act(G) its "act"."""
    if gate.name is None:
        with torch.enable_grad():
            leaf = gu.detach().requires_grad_()
            h = gate.function(leaf)
        return Again(h.detach(), None, (leaf, h))
    g, u = parted(gu, gate.layout)
    act = _activated(gate.name, g, scratch)
    if u is None:
        return Again(act, None, None)
    room = None if scratch is None else scratch.take("h", *act.shape)
    return Again(torch.mul(act, u, out=room), act, None)


def gate_grad(
    gate: Gate, gu: Tensor, again: Again, dh: Tensor, scratch: SharedRows | None = None
) -> Tensor:
    """dGU [M, N1] for dH [M, I], which is written over; with ``scratch`` it may be its "dgu"."""
    if again.graph is not None:
        leaf, h = again.graph
        if not h.requires_grad:  # a function without a gradient, such as a constant
            return torch.zeros_like(gu)
        (dgu,) = torch.autograd.grad(h, leaf, dh)
        return dgu
    assert gate.name is not None
    g, u = parted(gu, gate.layout)
    if u is None:
        return _derivative(gate.name, g, dh)
    dgu = torch.empty_like(gu) if scratch is None else scratch.take("dgu", *gu.shape)
    dg, du = parted(dgu, gate.layout)
    assert again.act is not None and du is not None
    torch.mul(dh, again.act, out=du)
    dh.mul_(u)
    if gate.name == "silu":  # without a copy between
        torch.ops.aten.silu_backward.grad_input(dh, g, grad_input=dg)
    else:
        dg.copy_(_derivative(gate.name, g, dh))
    return dgu


def norm_grad(norm: Callable[[Tensor], Tensor], y: Tensor, dn: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(Y), dY) for the gradient dn of norm(Y), row by row [M, N]."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        n = norm(leaf)
    if not n.requires_grad:
        return n, torch.zeros_like(y)
    (dy,) = torch.autograd.grad(n, leaf, dn)
    return n.detach(), dy
