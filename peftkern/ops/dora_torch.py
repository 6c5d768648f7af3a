"""DoRA's linear on torch's products, forward and backward; :mod:`.dora` says what it computes.

Shapes: x [M, K], w [K, N] (a view), bias [N] or None, A [r, K], B [N, r], gain [N] at least
float32, S [M, r], Y and Z [M, N], P = drop(x) w, and c = scale / (1 - p).

    S = (x ∘ mask) Aᵀ · c           Z = P + S Bᵀ
    p = 0:  Y = gain ∘ Z + bias
    p > 0:  Y = x w + bias + (gain - 1) ∘ P + gain ∘ (S Bᵀ)

The gain scales the r columns of B, and the result of dYᵀS, rather than a copy of dY: products of
the low-rank part then round as little as LoRA's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend as _backend
from .bits import pack_bits, unpack_bits
from .torch_backend import _drop, _drop_fused, _mm_to, _scaled_mm, low_rank_dtype

_BLOCK = 1 << 18  # elements that a step over rows holds in float32


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    scale: float,
    p: float,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Y, S, Z (None unless ``keep_z``) in x's dtype (S: the low-rank part's), and the mask."""
    if p == 0.0:
        z, s, _ = _backend.active.forward(x, w, None, A, B, scale, 0.0)
        return scale_columns(z, gain, bias, keep_z), s, z if keep_z else None, None
    low = low_rank_dtype(x, A)
    dropped, keep, factor = (_drop_fused if x.is_cuda else _drop)(x.to(low), p)
    bits = pack_bits(keep)
    s = _scaled_mm(dropped, A.to(low).t(), scale * factor)
    product = torch.mm(dropped.to(x.dtype), w).to(low).mul_(factor)
    del dropped, keep
    bt = B.to(low).t()
    z = torch.addmm(product, s, bt).to(x.dtype) if keep_z else None
    y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    y = torch.addmm(y.to(low), s, bt * gain.to(low))
    return y.addcmul_(product, (gain - 1).to(low)).to(x.dtype), s, z, bits


def scale_columns(z: Tensor, gain: Tensor, bias: Tensor | None, keep_z: bool) -> Tensor:
    """gain ∘ z + bias, rounded once; in z's memory unless that is kept."""
    y = torch.empty_like(z) if keep_z else z
    if bias is None:
        return torch.mul(z, gain, out=y)
    return torch.addcmul(bias, z, gain, out=y)


def backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    s: Tensor | None,
    z: Tensor | None,
    bits: Tensor | None,
    scale: float,
    p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dX, dA, dB (``needs`` says which), and the sums over rows of dY ∘ Z [N] where z is given.
    Without dA, only shape and dtype of x are asked for."""
    needs_x, needs_a, needs_b = needs
    low = low_rank_dtype(x, A)
    dyl, K = dy.to(low), w.shape[0]
    db = dx = da = None
    if needs_b and s is not None:
        db = (_mm_to(dyl.t(), s, B.dtype) * gain[:, None]).to(B.dtype)
    scaled, sums = scale_gradient(dy, gain if p == 0.0 else gain - 1, z, needs_x)
    if not (needs_x or needs_a):
        return None, None, db, sums
    ds = _scaled_mm(dyl, (B * gain[:, None]).to(low), scale / (1.0 - p))
    mask = unpack_bits(bits, K, low) if bits is not None else None
    if scaled is not None:
        dx = torch.mm(ds, A.to(low))
        if mask is None:
            dx = _add_mm(dx, scaled, w)
        else:
            dx = _add_mm(dx, scaled.mul_(1.0 / (1.0 - p)), w)
            dx = _add_mm(dx.mul_(mask), dy, w)
        dx = dx.to(x.dtype)
    if needs_a:
        xl = x.to(low)
        da = _mm_to(ds.t(), xl if mask is None else mask.mul_(xl), A.dtype)
    return dx, da, db, sums


def _add_mm(dx: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    """dx + dy wᵀ, in dx's memory."""
    if dx.dtype == dy.dtype:
        return dx.addmm_(dy, w.t())
    return dx.add_(torch.mm(dy, w.t()))


def scale_gradient(
    dy: Tensor, factor: Tensor, z: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dY with column n times factor[n], in dY's dtype, when ``wanted``; sums over rows of dY ∘ Z
    [N] in factor's dtype, when z is given), from one pass over dY and no third matrix."""
    out = torch.empty_like(dy) if wanted else None
    if z is None:
        return (torch.mul(dy, factor, out=out) if out is not None else None), None
    sums = factor.new_zeros(dy.shape[1])
    step = max(1, _BLOCK // max(1, dy.shape[1]))
    for at in range(0, dy.shape[0], step):
        rows = dy[at : at + step].to(factor.dtype)
        sums += (rows * z[at : at + step]).sum(0)
        if out is not None:
            torch.mul(rows, factor, out=out[at : at + step])
    return out, sums
