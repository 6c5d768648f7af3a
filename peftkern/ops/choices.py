"""Whole operations by the name of a way to compute them.

The dispatcher runs these functions; its races and ``benchmarks.gpu`` time them. They draw no random
numbers: masks are arguments, so that every way drops the same elements.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels.decode import MAX_ROWS
from ..kernels.tuning import Key
from . import masks, torch_backend, triton_backend
from .projection import Projection, ProjectionGrad

TORCH = "torch"
KERNELS = "kernels"  # the other way of an MLP's middle, and of a mixture
NOISE = 0.02  # the share of torch's time that another way must save to be preferred


def names(op: str, M: int) -> tuple[str, ...]:
    """The ways to run ``op`` of :data:`kernels.tuning.WHOLE` on M rows, torch first."""
    if op == "mixed":
        return TORCH, "mixed"
    if op in ("mlp_forward", "mlp_backward", "experts", "experts_step"):
        return TORCH, KERNELS
    few = op == "infer" and M <= MAX_ROWS
    return (TORCH, *(triton_backend.INFER if few else triton_backend.PRODUCTS))


def winner(times: dict[str, float]) -> str:
    """The fastest way; torch when no other one is clearly faster."""
    best = min(times, key=lambda name: times[name])
    if TORCH in times and times[best] > (1 - NOISE) * times[TORCH]:
        return TORCH
    return best


def in_graph(key: Key) -> Key:
    """The key of the same call in a CUDA graph.

    It differs only with few rows, where the host's time counts.
    """
    few = key.op in ("infer", "mixed") and key.m <= MAX_ROWS
    return key._replace(graph=True) if few else key


def words_for(x: Tensor, members: list[Projection]) -> list[Tensor | None]:
    """The packed mask of each projection of x [M, K], drawn in their order."""
    return masks.words_of(x, [m.p for m in members])


def forward(
    how: str, x: Tensor, members: list[Projection], words: list[Tensor | None] | None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of each projection; without ``words`` the way draws its masks.

    Every way gives S in x's dtype, so that the backward of any way can follow.
    """
    if how != TORCH:
        return triton_backend.forward(x, members, words, how)
    done = torch_backend.forward(x, members, words)
    return [(y, s if s.dtype == x.dtype else s.to(x.dtype), bits) for y, s, bits in done]


def backward(
    how: str,
    x: Tensor,
    members: list[ProjectionGrad],
    needs_x: bool,
    given: list[Tensor] | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dX, (dA_i, dB_i) of each projection); ``given`` has dS_i made already."""
    if how != TORCH:
        return triton_backend.backward(x, members, needs_x, given, how)
    return torch_backend.backward(x, members, needs_x, given)


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
    """Y for x [..., K]; ``w`` is [N, K], or [K, N] when ``transposed``."""
    if how != TORCH:
        return triton_backend.infer(x, w, bias, A, B, scale, transposed, how)
    return torch_backend.infer(x, w, bias, A, B, scale, transposed)


def infer_group(how: str, x: Tensor, members: list[Projection]) -> list[Tensor]:
    """Y_i for x [..., K] of each projection, without its dropout."""
    if how != TORCH:
        return triton_backend.infer_group(x, members, how)
    return torch_backend.infer_group(x, members)


def mixed(
    how: str, x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any
) -> Tensor:
    """Y for x [M, K], w [N, K] and an adapter for each sample."""
    if how == TORCH:
        return torch_backend.mixed(x, w, bias, adapters, samples)
    return triton_backend.mixed(x, w, bias, adapters, samples)


def tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors in an operation's result, which are all but its masks."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() else []
    return [t for item in result or () for t in tensors(item)]
