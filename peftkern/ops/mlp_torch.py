"""An MLP's middle, from the outputs of gate and up to down's, on torch's own operations.

    H = act(G) ∘ U                      (H = act(G) without up)
    Y = H Wᵀ + bias + c (mask ∘ H) Aᵀ Bᵀ        c = scale / (1 - p), W and the adapter of down

The backward makes H again from G [M, I] and U [M, I], so that neither H nor act(G) is kept:

    dH = dY W + mask ∘ (dS A)                dS = c dY B
    dU = dH ∘ act(G)     dG = dH ∘ U ∘ act'(G)     dA = dSᵀ (mask ∘ H)
    dS_i = c_i dG B_i    dB_i = dGᵀ S_i            for gate's adapter, and so for up's
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.private import is_grad_batch, outputs_are_kept
from . import torch_backend
from .bits import unpack_bits
from .mlp_parts import NONE, Grads, Lows, Member, Shrink, ShrinkGrad, lows_of
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .torch_backend import _add_low_rank, _over_dy
from .torch_products import base_linear, base_product, in_dtype, low_rank_dtype, mm_to, scaled_mm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def hidden(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """H [M, I] of G [M, I] and U [M, I]; ``act`` is a name in :data:`ACTIVATIONS`."""
    h = ACTIVATIONS[act](gate)
    if up is None:
        return h
    return h * up if outputs_are_kept() else h.mul_(up)


def activate(
    gate: Tensor, up: Tensor | None, act: str, down: Shrink | None
) -> tuple[Tensor, Tensor | None]:
    """(H [M, I], S [M, r] of down's adapter or None)."""
    h = hidden(gate, up, act)
    if down is None:
        return h, None
    low = low_rank_dtype(h, down.A)
    dropped = in_dtype(low, h)
    if down.bits is not None:
        dropped = unpack_bits(down.bits, h.shape[1], low).mul_(dropped)
    return h, scaled_mm(dropped, in_dtype(low, down.A).t(), down.factor)


def activate_grad(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ShrinkGrad | None,
    members: tuple[Member | None, Member | None],
) -> Grads:
    """The gradients of :func:`activate`, and dS and dB of gate's and up's adapters."""
    mask = None
    if down is not None and down.bits is not None:
        mask = unpack_bits(down.bits, gate.shape[1], down.ds.dtype)
    da = None if down is None else (down.ds, mask, down.dtype)
    return _activate_grad(dh.clone(), gate, up, act, da, members)


def _activate_grad(
    dh: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: tuple[Tensor, Tensor | None, torch.dtype] | None,
    members: tuple[Member | None, Member | None],
) -> Grads:
    """:func:`activate_grad` with down's mask as numbers; dG is written over dH."""
    da = dup = None
    if up is not None or down is not None:
        h = ACTIVATIONS[act](gate)
        if up is not None:
            dup = dh * h
            dh.mul_(up)
        if down is not None:
            if up is not None:
                h.mul_(up)
            ds, mask, dtype = down
            h = in_dtype(ds.dtype, h)
            da = mm_to(ds.t(), h if mask is None else mask.mul_(h), dtype)
        del h
    dgate = _derivative(act, gate, dh)
    made = [
        (None, None) if m is None or d is None else _of_member(d, m)
        for d, m in zip((dgate, dup), members, strict=True)
    ]
    return Grads(dgate, dup, da, (made[0][0], made[1][0]), (made[0][1], made[1][1]))


def _derivative(act: str, gate: Tensor, da: Tensor) -> Tensor:
    """dG for the gradient of act(G), written over it."""
    aten = torch.ops.aten
    kind, over = "grad_input", {"grad_input": da}
    if is_grad_batch(da):  # its vmap has no rule for operations that write to a given tensor
        kind, over = "default", {}
    out: Tensor
    if act == "silu":
        out = getattr(aten.silu_backward, kind)(da, gate, **over)
    elif act == "relu":
        out = getattr(aten.threshold_backward, kind)(da, gate, 0, **over)
    elif act == "relu2":
        out = da.mul_(F.relu(gate)).mul_(2)
    else:
        form = "tanh" if act == "gelu_tanh" else "none"
        out = getattr(aten.gelu_backward, kind)(da, gate, approximate=form, **over)
    return out


def _of_member(dy: Tensor, m: Member) -> tuple[Tensor, Tensor | None]:
    """(dS, dB if wanted) of gate's or up's adapter."""
    low = low_rank_dtype(dy, m.B)
    dyl = in_dtype(low, dy)
    db = None if m.s is None else mm_to(dyl.t(), m.s, m.B.dtype)
    return scaled_mm(dyl, in_dtype(low, m.B), m.factor), db


def completed(gate: Tensor, up: Tensor | None, inner: Lows) -> tuple[Tensor, Tensor | None]:
    """G and U with the low-rank parts that they are without, new where there are any."""

    def plus(y: Tensor | None, low: Any) -> Any:
        if y is None or low is None:
            return y
        s, B = low
        return torch.addmm(y, s, B.t().to(y.dtype))

    return plus(gate, inner[0]), plus(up, inner[1])


def forward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: Projection | Plain,
    words: list[Tensor | None] | None = None,
    inner: Lows = NONE,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Y [M, N], S [M, r], packed mask) of down; ``words`` has its mask if it is drawn already.

    ``inner``: what G and U are without.
    """
    gate, up = completed(gate, up, inner)
    h = hidden(gate, up, act)
    if isinstance(down, Plain):
        return base_linear(h, down.w, down.bias), None, None
    [done] = torch_backend.forward(h, [down], words)
    return done


def backward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ProjectionGrad | PlainGrad,
    members: tuple[Member | None, Member | None],
    copied: bool = False,
) -> tuple[Grads, Tensor | None]:
    """(gradients of G, U and the adapters' parts that need them; dB [N, r] of down).

    ``copied``, that dG and dU in fp8 would do, changes nothing here.
    """
    gate, up = completed(gate, up, lows_of(members))
    if isinstance(down, PlainGrad):
        dh = base_product(down.dy, down.w.t())
        return _activate_grad(dh, gate, up, act, None, members), None
    low = low_rank_dtype(gate, down.A)
    ds, db = _over_dy(down, low)
    mask = unpack_bits(down.bits, gate.shape[1], low) if down.bits is not None else None
    dh = _add_low_rank(None, ds, in_dtype(low, down.A), mask)
    if low == down.dy.dtype:
        base_product(down.dy, down.w.t(), dh)
    else:
        dh = dh.add_(base_product(down.dy, down.w.t())).to(down.dy.dtype)
    inner = (ds, mask, down.A.dtype) if down.needs_a else None
    return _activate_grad(dh, gate, up, act, inner, members), db
