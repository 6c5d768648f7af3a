"""The LoRA linear on torch's own matrix products: the fallback, which runs on every device.

Forward and backward take a list of projections of one x, also when there is only one.

Shapes: x [M, K], w [K, N] (a view), bias [N] or None, A [r, K], B [N, r], S [M, r], Y [M, N].

    S = (x ∘ mask) Aᵀ · c        c = scale / (1 - p)
    Y = S Bᵀ + bias, then Y += x w      (hybrid order: the base product accumulates onto the update)

The mask is drawn exactly as ``torch.nn.functional.dropout`` draws it, so that on a CPU the same
seed drops the same elements as in HF PEFT. It is kept as one bit per element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.reference import reference_bits
from ..utils.private import outputs_are_kept
from .bases.weight import BaseWeight
from .bits import pack_bits, unpack_bits
from .mixed_torch import mixed as mixed
from .projection import Projection, ProjectionGrad
from .torch_products import base_linear, base_product, in_dtype, mm_to, scaled_mm
from .torch_products import low_rank_dtype as low_rank_dtype

# Projections of one x without gradients are computed together up to this many rows. Here each is as
# fast alone: nothing is launched, and nothing can be shared but the host's time of a few calls.
group_rows = 0
# up to this many rows an extra pass over Y costs less than two more views, as host time dominates
_FEW_ROWS = 32


def why_not(x: Tensor, A: Tensor) -> str | None:
    """The reason that a compiler gets the plain formula and no operator of this backend."""
    return "torch's own products, which the compiler fuses with their neighbours"


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """(x with dropped elements 0, bool mask of those kept, factor that is still to be applied).

    The mask is drawn as in torch's dropout on a CPU.
    """
    noise = torch.empty_like(x).bernoulli_(1.0 - p)
    keep = noise.bool()
    return noise.mul_(x), keep, 1.0 / (1.0 - p)


def _drop_fused(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """The same by torch's dropout on CUDA, one kernel that also applies the factor."""
    return *torch.native_dropout(x, p, True), 1.0


def draw(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The packed mask [M, ceil(K / 32)] of ``seed`` (int64, one element), on its device.

    The words equal the Triton backend's.
    """
    words: Tensor = reference_bits(M, K, p, seed)
    return words


def forward(
    x: Tensor, members: list[Projection], words: list[Tensor | None] | None = None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y [M, N] in x's dtype, S [M, r], packed mask) of each projection of x [M, K].

    The mask is None when nothing is dropped, and the projection's one of ``words`` if given.
    """
    if words is None:
        return [_forward(x, m, None) for m in members]
    return [_forward(x, m, bits) for m, bits in zip(members, words, strict=True)]


def _forward(
    x: Tensor, member: Projection, words: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight, bias, A, B, scale, p, transposed = member
    w = weight if transposed else weight.t()
    low = low_rank_dtype(x, A)
    dropped, bits = in_dtype(low, x), words
    if words is not None:
        dropped = unpack_bits(words, x.shape[1], low).mul_(dropped)
        scale = scale / (1.0 - p)
    elif p > 0.0:
        dropped, keep, factor = (_drop_fused if x.is_cuda else _drop)(dropped, p)
        bits = pack_bits(keep)
        scale = scale * factor
    s = scaled_mm(dropped, in_dtype(low, A).t(), scale)
    del dropped
    bt = in_dtype(low, B).t()
    if low == x.dtype and not outputs_are_kept():
        y = torch.mm(s, bt) if bias is None else torch.addmm(bias, s, bt)
        return base_product(x, w, y), s, bits
    # The low-rank part has a wider dtype: rounding it to x's before the base product would lose its
    # precision. Or the base product, the most work, is what a selective checkpoint keeps.
    y = base_linear(x, w, bias)
    return torch.addmm(y.to(low), s, bt).to(x.dtype), s, bits


def backward(
    x: Tensor, members: list[ProjectionGrad], needs_x: bool, given: list[Tensor] | None = None
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """(dX [M, K], summed over all projections; (dA [r, K], dB [N, r]) of each).

    Gradients that are not wanted are None. Without dA only the shape and dtype of x are used.
    ``given`` has dS of each projection if it is made already; then dB is not.
    """
    low = low_rank_dtype(x, members[0].A)
    for m in members[1:]:  # the adapters of one MLP or group may have different dtypes
        low = torch.promote_types(low, low_rank_dtype(x, m.A))
    dx, pairs, xl = None, [], in_dtype(low, x)
    for i, m in enumerate(members):
        ds, db = _over_dy(m, low) if given is None else (in_dtype(low, given[i]), None)
        da = None
        mask = unpack_bits(m.bits, x.shape[1], low) if m.bits is not None else None
        if needs_x:
            dx = _add_low_rank(dx, ds, in_dtype(low, m.A), mask)
            if low == m.dy.dtype:
                base_product(m.dy, m.w.t(), dx)
            else:
                dx.add_(base_product(m.dy, m.w.t()))
        if m.needs_a:
            da = mm_to(ds.t(), xl if mask is None else mask.mul_(xl), m.A.dtype)
        pairs.append((da, db))
    return (dx.to(x.dtype) if dx is not None else None), pairs


def _over_dy(m: ProjectionGrad, low: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(dS, dB if wanted) of a projection, by products in ``low``; they need only dY."""
    dyl = in_dtype(low, m.dy)
    db = mm_to(dyl.t(), m.s, m.B.dtype) if m.needs_b and m.s is not None else None
    return scaled_mm(dyl, in_dtype(low, m.B), m.scale / (1.0 - m.p)), db


def _add_low_rank(dx: Tensor | None, ds: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dX + mask ∘ (dS A), in dX's memory, or without dX the update alone."""
    if dx is not None and mask is None:
        return dx.addmm_(ds, A)
    update = torch.mm(ds, A)
    if mask is not None:
        update.mul_(mask)
    return update if dx is None else dx.add_(update)


def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` is [K, N] when ``transposed``."""
    K, count, dtype = x.size(-1), x.numel(), x.dtype
    if w.__class__ is BaseWeight:
        return _infer_quantised(x, w, bias, A, B, scale)
    if A.dtype is dtype and count <= _FEW_ROWS * K and not outputs_are_kept():
        stored = w.t() if transposed else w
        if count == K and dtype is torch.float32 and x.is_cpu:
            # one row: matrix-vector products need no transposed views and cost half the host time
            v = x.view(K)
            y = torch.mv(stored, v) if bias is None else torch.addmv(bias, stored, v)
            y.addmv_(B, torch.mv(A, v), alpha=scale)
            dims = x.dim()  # for 2 and 3 dimensions without the cost of slicing a shape
            if dims == 3:
                return y.view(1, 1, -1)
            return y.unsqueeze_(0) if dims == 2 else y.view(*x.shape[:-1], -1)
        y = linear(x, stored, bias)
        return y.add_(linear(linear(x, A), B), alpha=scale)
    x2 = x.reshape(-1, K)
    y, _, _ = _forward(x2, Projection(w, bias, A, B, scale, 0.0, transposed), None)
    return y.view(*x.shape[:-1], y.shape[-1])


def _infer_quantised(
    x: Tensor, w: BaseWeight, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Y for x [..., K] and a quantised weight w [N, K]."""
    K = x.size(-1)
    if x.numel() == K and x.is_cpu and A.dtype is torch.float32 and x.dtype is torch.float32:
        v = x.reshape(-1)  # as in infer
        row = w.packed.infer_row(v)
        if bias is not None:
            row.add_(bias)
        row.addmv_(B, torch.mv(A, v), alpha=scale)
        return row.view(1, 1, -1) if x.dim() == 3 else row.view(*x.shape[:-1], -1)
    x2, low = x.reshape(-1, K), low_rank_dtype(x, A)
    y = w.packed.infer(x2)
    if bias is not None:
        y.add_(bias)
    update = linear(linear(in_dtype(low, x2), in_dtype(low, A)), in_dtype(low, B))
    y = y.add_(update, alpha=scale) if low == y.dtype else y.to(low).add_(update, alpha=scale)
    return in_dtype(x.dtype, y).view(*x.shape[:-1], y.shape[-1])


def infer_group(x: Tensor, members: list[Projection]) -> list[Tensor]:
    """Y_i [..., N_i] of projections of x [..., K] without gradients; their dropout is left out."""
    return [infer(x, m.weight, m.bias, m.A, m.B, m.scale, m.transposed) for m in members]
