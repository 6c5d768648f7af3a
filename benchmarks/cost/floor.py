"""The floor of a LoRA group: one launch that reads every input and writes every result once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..kernels.traffic import Traffic, unit_of


class Group(NamedTuple):
    """Projections [N_i, K] of one X [M, K], each with an adapter of rank r, dtype ``adapter``."""

    M: int
    K: int
    Ns: tuple[int, ...]
    r: int
    adapter: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16


def _bytes(dtype: torch.dtype, *shapes: tuple[int, int]) -> int:
    return dtype.itemsize * sum(map(math.prod, shapes))


def _floor(g: Group, read: int, written: int, passes: int) -> Traffic:
    """One launch with each low-rank product done ``passes`` times.

    That is one pass forward, and two backward: dS and dB, dA and the low-rank part of dX.
    """
    base = 2 * g.M * g.K * sum(g.Ns)
    low = 2 * g.M * g.r * (g.K * len(g.Ns) + sum(g.Ns)) * passes
    return Traffic("floor", 1, read, written, base + low, unit_of(g.dtype))


def _sizes(g: Group) -> tuple[int, int, int, int, int]:
    """Bytes of X, all W, all A and B, all Y, and S."""
    adapters = [(g.r, g.K)] * len(g.Ns) + [(n, g.r) for n in g.Ns]
    return (
        _bytes(g.dtype, (g.M, g.K)),
        _bytes(g.dtype, *((n, g.K) for n in g.Ns)),
        _bytes(g.adapter, *adapters),
        _bytes(g.dtype, *((g.M, n) for n in g.Ns)),
        _bytes(g.dtype, (g.M, g.r * len(g.Ns))),
    )


def forward(g: Group) -> Traffic:
    """The launch that makes every Y and S; a mask is drawn again and moves no bytes."""
    x, w, adapters, y, s = _sizes(g)
    return _floor(g, x + w + adapters, y + s, passes=1)


def backward(g: Group) -> Traffic:
    """The launch that makes dX, dA and dB from every dY."""
    x, w, adapters, y, s = _sizes(g)
    return _floor(g, x + y + w + adapters + s, x + adapters, passes=2)
