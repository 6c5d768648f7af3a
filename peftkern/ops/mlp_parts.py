"""What an MLP's elementwise step takes and gives, for each way that computes it.

Shapes: G (gate's output), U (up's output), H and their gradients [M, I]; S and dS [M, r]; A of down
[r, I]; B of gate and up [I, r]; a packed keep mask int32 [M, ceil(I / 32)].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shrink(NamedTuple):
    """Down's adapter in the forward: S = factor * (mask H) Aᵀ.

    A [r, I] fp32 or the activation's dtype; factor: scale / (1 - p); bits: the mask, or None;
    draw: what the kernel draws it from (kernels.bits.Draw), or None.
    """

    A: Tensor
    factor: float
    bits: Tensor | None
    draw: Any = None


class ShrinkGrad(NamedTuple):
    """Down's adapter in the backward: dA [r, I] = dSᵀ (mask H), in ``dtype``.

    ds [M, r] in the activation's dtype, with the adapter's factor in it.
    """

    ds: Tensor
    bits: Tensor | None
    dtype: torch.dtype


class Member(NamedTuple):
    """The adapter of gate or of up in the backward: dS = factor * dG B and dB = dGᵀ S.

    B [I, r] fp32 or the activation's dtype, whose dtype dB gets; s [M, r] in the activation's
    dtype, or None if dB is not wanted. ``apart``: G (or U) is without S Bᵀ, and s is there.
    """

    B: Tensor
    s: Tensor | None
    factor: float
    apart: bool = False


Low = tuple[Tensor, Tensor]  # S [M, r] and B [I, r] of an adapter whose S Bᵀ is not in G or U yet
Lows = tuple[Low | None, Low | None]  # of gate and of up
NONE: Lows = (None, None)


def lows_of(members: tuple[Member | None, Member | None]) -> Lows:
    """What G and U are without, by the members of a backward."""

    def low(m: Member | None) -> Low | None:
        return (m.s, m.B) if m is not None and m.apart and m.s is not None else None

    return low(members[0]), low(members[1])


class Grads(NamedTuple):
    """The results of the backward; pairs are those of gate and of up.

    dgate, dup [M, I]; da [r, I] of down; ds [M, r] in the activation's dtype; dbs [I, r]. None for
    what was not wanted.
    """

    dgate: Tensor
    dup: Tensor | None
    da: Tensor | None
    ds: tuple[Tensor | None, Tensor | None]
    dbs: tuple[Tensor | None, Tensor | None]
    # dG and dU in fp8 (kernels.fp8_rows.Fp8Rows), side by side; dG and dU may have no numbers then
    copies: Any = (None, None)
