"""Products in fp8: X and dY quantised to e4m3, and multiplied with the packed weight by torch.

Forward, X [M, K] and W = q ∘ s [N, K]:

    one scale, or one a row    X_m ≈ x8_m · a_m                 Y_mn = a_m s_n Σ_k x8_mk q_nk
    blocks of 128 x 128        X_mj ≈ x8_mj · a_m(j // 128)     the same, block by block of K

Backward, with the same packed weight:

    one scale, or one a row    dY_mn s_n ≈ y8_mn · b_m          dX_mk = b_m Σ_n y8_mn q_nk
    blocks of 128 x 128        as forward, with blocks of N

e4m3 keeps three bits of mantissa: each element of X and dY is off by at most 2^-4 of itself, or by
2^-10 of its scale. The sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fp8_numbers import E4M3, quantised

BLOCK = 128  # of torch's product with block scales
_RESULT = (torch.bfloat16, torch.float16, torch.float32)


def why_not(w: Any) -> str | None:
    """The reason that products with an :class:`.fp8.Fp8` weight do not run in fp8, or None."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return "this torch has no torch.nn.functional.scaled_mm"
    if w.q.dtype != E4M3:
        return f"its weight is {w.q.dtype}, not {E4M3}"
    if w.block is not None and w.block != (BLOCK, BLOCK):
        return f"its blocks are {w.block[0]} x {w.block[1]}, not {BLOCK} x {BLOCK}"
    step = 16 if w.block is None else BLOCK
    if any(size % step for size in w.shape):
        return f"a side of its {w.shape[0]} x {w.shape[1]} weight is no multiple of {step}"
    return _device_why_not(w.device, w.block is not None)


@cache
def _device_why_not(device: torch.device, blocks: bool) -> str | None:
    if device.type == "cpu":
        return "torch's fp8 product is slow on a CPU"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"fp8 products on {device.type} are not known here"
    found = torch.cuda.get_device_capability(device)
    if found < (8, 9):
        return f"compute capability {found[0]}.{found[1]}, and fp8 needs 8.9"
    if blocks:
        if found[0] != 9:
            return f"compute capability {found[0]}.{found[1]}, and torch takes block scales on 9.0"
        version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
        if version < (12, 9):
            return f"CUDA {torch.version.cuda}, and torch takes block scales from 12.9 on"
    return None


def product(x: Tensor, w: Any) -> Tensor:
    """x Wᵀ [M, N] for x [M, K], computed in fp8."""
    if w.block is None:
        q, a = quantised_rows(x)
        return _by_rows(q, a, w.q, _row_scales(w), x.dtype)
    return product_of(*quantised_blocks(x), w, x.dtype)


def grad_input(dy: Tensor, w: Any) -> Tensor:
    """dY W [M, K] for dY [M, N], computed in fp8."""
    if w.block is not None:
        return grad_input_of(*quantised_blocks(dy), [w], dy.dtype)
    turned, scales = w.q.t().contiguous(), _row_scales(w)
    q, a = quantised_rows(dy.float() * scales.reshape(1, -1))
    return _by_rows(q, a, turned, a.new_ones(turned.shape[0], 1), dy.dtype)


def product_of(q: Tensor, a: Tensor, w: Any, dtype: torch.dtype) -> Tensor:
    """The product of :func:`product` for x that is quantised already, in blocks."""
    return _by_blocks(q, a, w.q, w.scale, dtype)


def grad_input_of(q: Tensor, a: Tensor, ws: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Σ dY_i W_i [M, K] in one product, for dY of all weights side by side, quantised in blocks.

    q [M, Σ N_i], a [M, Σ N_i / 128]; the sum is in float32, and rounded once.
    """
    # torch takes the second matrix [N, K] with contiguous columns: one copy of the packed weights
    turned = ws[0].q.new_empty((ws[0].shape[1], q.shape[1]))
    first = 0
    for w in ws:
        turned[:, first : first + w.shape[0]].copy_(w.q.t())
        first += w.shape[0]
    scale = ws[0].scale.t() if len(ws) == 1 else torch.cat([w.scale.t() for w in ws], 1)
    return _by_blocks(q, a, turned, scale, dtype)


def _row_scales(w: Any) -> Tensor:
    scale: Tensor = w.scale.float().reshape(-1, 1)
    return scale if scale.shape[0] == w.shape[0] else scale.expand(w.shape[0], 1)


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x8 [M, K] in e4m3, scales [M, 1] in float32): one scale a row."""
    return quantised(x, (1, x.shape[1]))


def quantised_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x8 [M, K] in e4m3, scales [M, K / 128] in float32): one scale for 128 of a row."""
    return quantised(x, (1, BLOCK))


def _by_rows(q: Tensor, a: Tensor, w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """(q ∘ a) (w ∘ s)ᵀ for q [M, K], a [M, 1], w [N, K], s [N, 1]."""
    kind: Any = torch.nn.functional.ScalingType.RowWise
    return _multiplied(q, w, a, kind, s.t().contiguous(), kind, dtype)


def _by_blocks(q: Tensor, a: Tensor, w: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a [M, K / 128], s [N / 128, K / 128]."""
    kinds: Any = torch.nn.functional.ScalingType
    # torch reads the scales of both sides down their columns, W's from columns of a length that
    # four divides
    s, missing = s.float(), -s.shape[1] % 4
    right = (pad(s, (0, missing)) if missing else s).contiguous().t()
    left = a.t().contiguous().t()
    return _multiplied(q, w, left, kinds.BlockWise1x128, right, kinds.BlockWise128x128, dtype)


def _multiplied(
    q: Tensor, w: Tensor, a: Tensor, kind_a: Any, s: Tensor, kind_s: Any, dtype: torch.dtype
) -> Tensor:
    multiply: Any = torch.nn.functional.scaled_mm
    # a GPU multiplies into bfloat16 with scales of every kind; callers restore x's dtype
    out = torch.bfloat16 if q.is_cuda or dtype not in _RESULT else dtype
    found: Tensor = multiply(q, w.t(), a, kind_a, s, kind_s, output_dtype=out)
    return found
