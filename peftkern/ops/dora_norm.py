"""The norms that DoRA divides by, without the whole matrix in memory.

    n_i = ‖w_i + scale · b_i A‖        (Liu et al., 2024, eq. 5; one norm for each output)

W is read once, a block at a time, and each block's sum with the update stays in cache. The norms
also follow from ‖w‖², W Aᵀ and A Aᵀ with as many operations. But when the update cancels most of a
row, those terms cancel too, and lose twice as many digits as the row itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autocast, torch_backend
from . import backend as _backend
from .bases.weight import dense
from .tracing import is_recording

# elements of W in a block: on a CPU the block and its sum fit in a core's cache; larger elsewhere,
# as a GPU needs fewer launches
_BLOCK_CPU, _BLOCK_ELSEWHERE = 1 << 18, 1 << 25


def row_norms(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool = False
) -> Tensor:
    """Norms [N] of the rows of W + scale · B A, in float32 (float64 for float64 weights).

    Args:
        weight: [N, K], or [K, N] when ``transposed``; floating point.
        A: [r, K].
        B: [N, r].
        scale: factor of the update.
        transposed: layout of ``weight``.

    The result has no graph: DoRA takes the norm for a constant (section 4.3 of the paper).
    """
    if autocast.is_on(weight):  # its products would be rounded to a narrow dtype
        with torch.autocast(weight.device.type, enabled=False):
            return row_norms(weight, A, B, scale, transposed)
    weight = dense(weight)
    with torch.no_grad():
        if not is_recording() and _backend.active is not torch_backend:
            from . import dora_triton

            if dora_triton.why_no_norms(weight, A, B) is None:
                return dora_triton.norms(weight, A, B, scale, transposed)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A, B = A.to(wide), B.to(wide)
        dim = 0 if transposed else 1
        if is_recording() or weight.is_meta:  # a compiler divides the work by itself
            update = (A.t() @ B.t()) if transposed else (B @ A)
            # also detached: torch.jit.trace does not record that gradients are off
            norms: Tensor = torch.linalg.vector_norm(weight.to(wide) + scale * update, dim=dim)
            return norms.detach()
        size = _BLOCK_CPU if weight.is_cpu else _BLOCK_ELSEWHERE
        step = max(1, size // max(1, weight.shape[1]))
        if not transposed:
            # A is used whole, B in blocks of its rows
            found = [
                torch.linalg.vector_norm(torch.addmm(part.to(wide), rows, A, alpha=scale), dim=1)
                for part, rows in zip(weight.split(step), B.split(step), strict=True)
            ]
            return torch.cat(found) if len(found) != 1 else found[0]
        bt = B.t()
        total = weight.new_zeros(weight.shape[1], dtype=wide)
        for part, columns in zip(weight.split(step), A.split(step, dim=1), strict=True):
            part = torch.addmm(part.to(wide), columns.t(), bt, alpha=scale)
            total += part.square_().sum(0)
        return total.sqrt_()


def expert_norms(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool = False
) -> Tensor:
    """Norms [E, N] of the rows of W_e + scale · B_e A_e of E experts, as :func:`row_norms`.

    Args:
        weight: [E, N, K], or [E, K, N] when ``transposed``; floating point.
        A: [E, r, K].
        B: [E, N, r].
        scale: factor of the updates.
        transposed: layout of ``weight``.
    """
    with torch.no_grad():
        if not is_recording():
            experts = zip(weight, A, B, strict=True)
            return torch.stack([row_norms(w, a, b, scale, transposed) for w, a, b in experts])
        if autocast.is_on(weight):
            with torch.autocast(weight.device.type, enabled=False):
                return expert_norms(weight, A, B, scale, transposed)
        # a graph has one product, however many experts
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        A, B = A.to(wide), B.to(wide)
        update = A.mT @ B.mT if transposed else B @ A
        dim = 1 if transposed else 2
        norms: Tensor = torch.linalg.vector_norm(weight.to(wide) + scale * update, dim=dim)
        return norms.detach()


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n [N], in the wider dtype of both, with a graph to ``magnitude``.

    It is 0 where the norm is 0: a row of zeros has no direction, and its outputs are always 0.
    """
    # not where(…, magnitude / norms): there the gradient of unused elements would be nan
    return magnitude / torch.where(norms == 0, torch.inf, norms)
