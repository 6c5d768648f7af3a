"""DoRA's linear on torch's products, forward and backward; :mod:`.dora` has its formula.

Shapes: x [M, K], w [K, N] (a view), bias [N] or None, A [r, K], B [N, r], gain [N] at least
float32, S [M, r], Y and V [M, N], P = drop(x) w, and c = scale / (1 - p).

    S = (x ∘ mask) Aᵀ · c
    p = 0:  V = x w + S Bᵀ + bias     Y = gain ∘ V + (1 - gain) ∘ bias
    p > 0:  V = P + S Bᵀ              Y = x w + bias + (gain - 1) ∘ P + gain ∘ (S Bᵀ)

V is plain LoRA's output at p = 0. If the low-rank part has a wider dtype than x (float32 adapters
under bf16, on a CPU), V leaves out S Bᵀ, which it would round, and then

    Y = V + (gain - 1) ∘ (V - bias) + gain ∘ (S Bᵀ)

While the gain is 1 and B is 0, as at the start of training, Y is the base layer's output bit for
bit. The gain scales the r columns of B, and the result of dYᵀS, and not a copy of dY: so products
of the low-rank part round as little as LoRA's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.private import is_grad_batch, outputs_are_kept
from . import backend as _backend
from .bases.weight import dense
from .bits import pack_bits, unpack_bits
from .projection import Projection, ProjectionGrad
from .torch_backend import _drop, _drop_fused
from .torch_products import base_linear, low_rank_dtype, mm_to, scaled_mm

_BLOCK = 1 << 18  # elements in float32 of a block of rows


def forward(
    x: Tensor, member: Projection, gain: Tensor, keep_v: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(Y in x's dtype, S, V or None without ``keep_v``, the mask)."""
    _, bias, A, B, scale, p, _ = member
    w, low = dense(member.w), low_rank_dtype(x, A)
    if p == 0.0 and low == x.dtype:
        [(v, s, _)] = _backend.active.forward(x, [member])
        return scale_columns(v, gain, bias, keep_v), s, v if keep_v else None, None
    bt, g = B.to(low).t(), gain.to(low)
    y = base_linear(x, w, bias)
    if p == 0.0:
        s = scaled_mm(x.to(low), A.to(low).t(), scale)
        wide = y.to(low)
        product = wide if bias is None else wide - bias.to(low)
        wide = _add_scaled(torch.addmm(wide, s, bt * g), product, g - 1)
        return wide.to(x.dtype), s, y if keep_v else None, None
    dropped, keep, factor = (_drop_fused if x.is_cuda else _drop)(x.to(low), p)
    bits = pack_bits(keep)
    s = scaled_mm(dropped, A.to(low).t(), scale * factor)
    product = torch.mm(dropped, w.to(low))
    product = product * factor if outputs_are_kept() else product.mul_(factor)
    del dropped, keep
    kept = torch.addmm(product, s, bt) if keep_v else None
    y = _add_scaled(torch.addmm(y.to(low), s, bt * g), product, (gain - 1).to(low))
    return y.to(x.dtype), s, kept, bits


def _add_scaled(y: Tensor, product: Tensor, factor: Tensor) -> Tensor:
    """y + factor ∘ product, in y's memory unless it is kept."""
    return y.addcmul(product, factor) if outputs_are_kept() else y.addcmul_(product, factor)


def scale_columns(v: Tensor, gain: Tensor, bias: Tensor | None, keep_v: bool) -> Tensor:
    """gain ∘ (v - bias) + bias, rounded once; in v's memory unless ``keep_v``."""
    y = torch.empty_like(v) if keep_v or outputs_are_kept() else v
    if bias is None:
        return torch.mul(v, gain, out=y)
    return torch.addcmul((1 - gain) * bias, v, gain, out=y)


def backward(
    x: Tensor,
    member: ProjectionGrad,
    bias: Tensor | None,
    gain: Tensor,
    v: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dA, dB, sums), with None for each gradient that is not wanted.

    The sums [N] over rows of dY ∘ Z are None without ``v``. Z is the factor of the gain: V, at
    p = 0 without its bias. Without dA only the shape and dtype of x are used.
    """
    dy, w, A, B, s, bits, scale, p, needs_a, needs_b, _ = member
    w, low = dense(w), low_rank_dtype(x, A)
    dyl, K = dy.to(low), w.shape[0]
    db = dx = da = None
    if p == 0.0:
        scaled, sums = scale_gradient(dy, gain, v, bias, needs_x)
    else:
        scaled, sums = scale_gradient(dy, gain - 1, v, None, needs_x)
    apart = sums is not None and p == 0.0 and low != x.dtype
    if s is not None and (needs_b or apart):
        outer = mm_to(dyl.t(), s, torch.promote_types(B.dtype, low))  # dYᵀ S
        if sums is not None and apart:
            sums += (outer * B).sum(1)  # the part of Z that V leaves out
        db = (outer * gain[:, None]).to(B.dtype) if needs_b else None
    if not (needs_x or needs_a):
        return None, None, db, sums
    ds = scaled_mm(dyl, (B * gain[:, None]).to(low), scale / (1.0 - p))
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
        da = mm_to(ds.t(), xl if mask is None else mask.mul_(xl), A.dtype)
    return dx, da, db, sums


def _add_mm(dx: Tensor, dy: Tensor, w: Tensor) -> Tensor:
    """dX + dY wᵀ, in dX's memory."""
    if dx.dtype == dy.dtype:
        return dx.addmm_(dy, w.t())
    return dx.add_(torch.mm(dy, w.t()))


def scale_gradient(
    dy: Tensor, factor: Tensor, v: Tensor | None, bias: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dY with column n times factor[n], sums [N] over rows of dY ∘ (V - bias)), from one pass.

    The first is in dY's dtype, and None unless ``wanted``. The second is in factor's dtype, and
    None without ``v``. No third matrix is made.
    """
    if is_grad_batch(dy):  # its vmap has no rule for operations that write to a given tensor
        wide = dy.to(factor.dtype)
        behind = v if v is None or bias is None else v - bias.to(factor.dtype)
        scaled = (wide * factor).to(dy.dtype) if wanted else None
        return scaled, None if behind is None else (wide * behind).sum(0)
    out = torch.empty_like(dy) if wanted else None
    if v is None:
        return (torch.mul(dy, factor, out=out) if out is not None else None), None
    sums = factor.new_zeros(dy.shape[1])
    step = max(1, _BLOCK // max(1, dy.shape[1]))
    for at in range(0, dy.shape[0], step):
        rows = dy[at : at + step].to(factor.dtype)
        part = v[at : at + step]
        if bias is not None:
            part = part - bias.to(factor.dtype)
        sums += (rows * part).sum(0)
        if out is not None:
            torch.mul(rows, factor, out=out[at : at + step])
    return out, sums
