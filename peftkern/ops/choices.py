"""Whole operations by the name of the way that computes them: what the dispatcher runs, and what
its races and ``benchmarks.gpu`` time. Nothing here draws random numbers: masks are given, so that
which elements are dropped does not depend on the way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.decode import MAX_ROWS
from ..kernels.tuning import Key
from . import torch_backend, triton_backend
from .projection import Projection, ProjectionGrad

TORCH = "torch"
NOISE = 0.02  # what is not faster than torch by more than this is no reason to leave it


def names(op: str, M: int) -> tuple[str, ...]:
    """The ways to run ``op`` of :data:`kernels.tuning.WHOLE` on M rows; torch comes first."""
    if op == "mixed":
        return TORCH, "mixed"
    few = op == "infer" and M <= MAX_ROWS
    return (TORCH, *(triton_backend.INFER if few else triton_backend.PRODUCTS))


def winner(times: dict[str, float]) -> str:
    """The fastest; torch where no other one is clearly faster."""
    best = min(times, key=lambda name: times[name])
    if TORCH in times and times[best] > (1 - NOISE) * times[TORCH]:
        return TORCH
    return best


def in_graph(key: Key) -> Key:
    """The key of the same call in a CUDA graph, which makes a difference where the host's time
    does, with few rows."""
    few = key.op in ("infer", "mixed") and key.m <= MAX_ROWS
    return key._replace(graph=True) if few else key


def words_for(x: Tensor, members: list[Projection]) -> list[Tensor | None]:
    """The packed mask of each projection of x [M, K], drawn in their order."""
    return triton_backend.words_of(x, [m.p for m in members])


def forward(
    how: str, x: Tensor, members: list[Projection], words: list[Tensor | None]
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of each projection; every way gives S in x's dtype, so that the backward
    of any way can follow."""
    if how != TORCH:
        return triton_backend.forward(x, members, words, how)
    done = torch_backend.forward(x, members, words)
    return [(y, s if s.dtype == x.dtype else s.to(x.dtype), bits) for y, s, bits in done]


def backward(
    how: str, x: Tensor, members: list[ProjectionGrad], needs_x: bool
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """dX and (dA_i, dB_i) of each projection."""
    if how != TORCH:
        return triton_backend.backward(x, members, needs_x, how)
    return torch_backend.backward(x, members, needs_x)


def infer(
    how: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    transposed: bool,
) -> Tensor:
    """Y for x [..., K]; ``w`` as stored."""
    if how != TORCH:
        return triton_backend.infer(x, w, bias, A, B, scale, transposed, how)
    return torch_backend.infer(x, w, bias, A, B, scale, transposed)


def mixed(
    how: str, x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any
) -> Tensor:
    """Y for x [M, K], w [N, K] and an adapter for each sample."""
    if how == TORCH:
        return torch_backend.mixed(x, w, bias, adapters, samples)
    return triton_backend.mixed(x, w, bias, adapters, samples)


def tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors in what an operation returned: its mask was given to it."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [t for item in result or () for t in tensors(item)]
