"""Base products in fp8, of copies of X and dY that the Triton kernels write (:mod:`.fp8_copies`).

    forward     S and X8 in one pass; Y_i = X8 W8_iᵀ; Y_i + S_i B_iᵀ + bias_i
    backward    dS_i, dB_i and dY8_i in one pass; dX = Σ dY8_i W8_i in one product; and in a pass
                over X dA_i and dX + Σ dS_i A_i

torch's product in fp8 adds to nothing, so the low-rank part is added behind it: a pass that reads
and writes Y, where a sum of two matrices would read two and write a third.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import fp8_rows
from ..kernels.expand import expand, low_rank_grad_input
from ..kernels.fp8_rows import Fp8Rows
from ..kernels.grad_a import grad_a
from ..kernels.grad_xa import fits, grad_xa
from ..kernels.shrink import shrink
from . import fp8_copies
from .bases import fp8_products
from .projection import Plain, Projection, ProjectionGrad


def forward(
    x: Tensor,
    members: list[Projection],
    scales: list[float],
    words: list[Tensor | None],
    drawn: Any,
    apart: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """(S [M, sum r], Y_i of each projection) of x [M, K], which is quantised once.

    ``apart``: Y_i without S_i B_iᵀ and bias.
    """
    copy = fp8_rows.empty(*x.shape, x.device)
    s = shrink(x, [m.A for m in members], scales, words, draw=drawn, copy=copy)
    if apart:
        ws = [fp8_copies.weight(m.weight) for m in members]
        return s, [fp8_products.product_of(copy.q, copy.scales, w, s.dtype) for w in ws]
    columns = s.split([m.A.shape[0] for m in members], 1)
    return s, [product(copy, m, c) for m, c in zip(members, columns, strict=True)]


def product(copy: Fp8Rows, m: Projection, s: Tensor) -> Tensor:
    """Y [M, N] in S's dtype, of X in fp8 and S [M, r]."""
    y = fp8_products.product_of(copy.q, copy.scales, fp8_copies.weight(m.weight), s.dtype)
    found: Tensor = expand(s, m.B, m.bias, add=y)
    return found


def plain(copy: Fp8Rows, part: Plain, dtype: torch.dtype) -> Tensor:
    """Y [M, N] in ``dtype`` of a linear without an adapter, of X in fp8."""
    y: Tensor = fp8_products.product_of(copy.q, copy.scales, fp8_copies.weight(part.weight), dtype)
    return y if part.bias is None else y.add_(part.bias)


def backward_order(
    members: list[ProjectionGrad], needs_x: bool, given: list[Tensor] | None, how: str | None
) -> str | None:
    """:func:`.fp8_copies.order` of a backward; without dX it has no base product."""
    if not needs_x:
        return how
    found = fp8_copies.order([m.w for m in members], how)
    if found == fp8_copies.ORDER and given is not None and any(m.copy is None for m in members):
        return "joined"  # dY was made by operations that write no copy
    return found


def rooms(members: list[ProjectionGrad]) -> list[Fp8Rows]:
    """The copies of every dY, side by side in one matrix: those made already, or room for them."""
    if members[0].copy is not None:
        return [m.copy for m in members]
    dy = members[0].dy
    found = fp8_rows.side_by_side(dy.shape[0], [m.dy.shape[1] for m in members], dy.device)
    return list(found)


def grads(
    x: Tensor, members: list[ProjectionGrad], copies: list[Fp8Rows], ds: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """(dX [M, K], dA_i of those that need it) from dY_i in fp8, dS_i and x."""
    As, bits = [m.A for m in members], [m.bits for m in members]
    wanted = [i for i, m in enumerate(members) if m.needs_a]
    dtypes = [As[i].dtype for i in wanted]
    if len(wanted) == len(members) and fits([a.shape[0] for a in As]):
        base = grad_input(members, copies, ds[0].dtype)
        dx, found = grad_xa(x, ds, As, bits, add=base, out_dtypes=dtypes)
        return dx, list(found)
    das: list[Tensor | None] = [None] * len(members)
    if wanted:
        some = [ds[i] for i in wanted], [bits[i] for i in wanted]
        for i, da in zip(wanted, grad_a(x, *some, out_dtypes=dtypes), strict=True):
            das[i] = da
    return grad_x(members, copies, ds), das


def grad_x(members: list[ProjectionGrad], copies: list[Fp8Rows], ds: list[Tensor]) -> Tensor:
    """dX [M, K] from dY_i in fp8 and dS_i."""
    base = grad_input(members, copies, ds[0].dtype)
    As, bits = [m.A for m in members], [m.bits for m in members]
    found: Tensor = low_rank_grad_input(ds, As, bits, add=base)
    return found


def grad_input(members: list[ProjectionGrad], copies: list[Fp8Rows], dtype: torch.dtype) -> Tensor:
    """Σ dY_i W_i [M, K], one product in fp8."""
    ws = [fp8_copies.weight(m.w) for m in members]
    whole = fp8_rows.joined(copies)
    return fp8_products.grad_input_of(whole.q, whole.scales, ws, dtype)
