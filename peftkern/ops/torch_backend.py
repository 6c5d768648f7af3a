"""The LoRA linear on torch's own matrix products: runs on every device, and is the fallback
everywhere.

Shapes: x [M, K], w [K, N] (a view), bias [N] or None, A [r, K], B [N, r], S [M, r], Y [M, N].

    S = (x ∘ mask) Aᵀ · c        c = scale / (1 - p)
    Y = S Bᵀ + bias, then Y += x w      (hybrid order: the base product accumulates onto the update)

The mask is drawn exactly as ``torch.nn.functional.dropout`` draws it, so that on a CPU the same
seed drops the same elements as HF PEFT, and is kept as one bit per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.reference import reference_bits
from .bits import pack_bits, unpack_bits
from .projection import Part

# up to this many rows the extra pass over Y costs less than two more views (host time dominates)
_FEW_ROWS = 32


def why_not(x: Tensor, A: Tensor) -> str | None:
    """Why a compiler gets no operator of this backend, but the plain formula."""
    return "torch's own products, which the compiler fuses with their neighbours"


def low_rank_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the low-rank products.

    On CUDA the activation dtype, so that float32 adapters under a bf16 model run on the matrix
    units; elsewhere the adapter's, which is what HF PEFT does and costs nothing where there are
    none.
    """
    return x.dtype if x.is_cuda else A.dtype


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """a b · alpha [M, r], with the factor applied before the one rounding to the result's dtype."""
    if a.is_cpu:
        # MKL is several times faster with the small r as rows than as columns; the result is a
        # transposed view, which every later product takes as it is
        out = a.new_empty((b.shape[1], a.shape[0]))
        return torch.addmm(out, b.t(), a.t(), beta=0, alpha=alpha).t()
    out = a.new_empty((a.shape[0], b.shape[1]))
    return torch.addmm(out, a, b, beta=0, alpha=alpha)


def _mm_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in ``dtype``, without rounding to a narrower one on the way."""
    if a.dtype != dtype and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if a.is_cpu and b.shape[1] < a.shape[0]:  # as in _scaled_mm
        return torch.mm(b.t(), a.t()).t().contiguous()
    return torch.mm(a, b)


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """(x with dropped elements 0, which are kept, the factor still to be applied), drawn as torch's
    dropout draws on a CPU."""
    noise = torch.empty_like(x).bernoulli_(1.0 - p)
    keep = noise.bool()
    return noise.mul_(x), keep, 1.0 / (1.0 - p)


def _drop_fused(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """The same in the one kernel that torch's dropout is on CUDA, which scales as well."""
    return *torch.native_dropout(x, p, True), 1.0


def draw(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The packed mask [M, ceil(K / 32)] that belongs to ``seed`` (int64, one element), on its
    device: the same words as the Triton backend's."""
    words: Tensor = reference_bits(M, K, p, seed)
    return words


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Y [M, N] in x's dtype, S [M, r] and the packed mask (None when ``p`` is 0), which is
    ``words`` where they are given."""
    low = low_rank_dtype(x, A)
    dropped, bits = x.to(low), words
    if words is not None:
        dropped = unpack_bits(words, x.shape[1], low).mul_(dropped)
        scale = scale / (1.0 - p)
    elif p > 0.0:
        dropped, keep, factor = (_drop_fused if x.is_cuda else _drop)(dropped, p)
        bits = pack_bits(keep)
        scale = scale * factor
    s = _scaled_mm(dropped, A.to(low).t(), scale)
    del dropped
    bt = B.to(low).t()
    if low == x.dtype:
        y = torch.mm(s, bt) if bias is None else torch.addmm(bias, s, bt)
        return y.addmm_(x, w), s, bits
    # wider low-rank part: rounding it to x's dtype before the base product would lose what it is
    # wide for
    y = torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)
    return torch.addmm(y.to(low), s, bt).to(x.dtype), s, bits


def backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor | None,
    bits: Tensor | None,
    scale: float,
    p: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX [M, K], dA [r, K], dB [N, r] for dY [M, N];
    ``needs`` says which of the three are wanted."""
    needs_x, needs_a, needs_b = needs
    part = Part(dy, w, A, B, s, bits, scale, p, needs_a, needs_b)
    dx, [(da, db)] = group_backward(x, [part], needs_x)
    return dx, da, db


def group_forward(
    x: Tensor, members: list[Any], words: list[Tensor | None] | None = None
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(Y_i, S_i, mask_i) of several projections of one x [M, K]; see :mod:`.lora_group`."""
    given = words if words is not None else [None] * len(members)
    return [
        forward(x, m.w, m.bias, m.A, m.B, m.scale, m.p, bits)
        for m, bits in zip(members, given, strict=True)
    ]


def group_backward(
    x: Tensor, parts: list[Any], needs_x: bool
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
    """One dX [M, K] for all projections, accumulated in place, and (dA_i, dB_i) of each."""
    low = low_rank_dtype(x, parts[0].A)
    dx, pairs, xl = None, [], x.to(low)
    for part in parts:
        dyl = part.dy.to(low)
        da = db = None
        if part.needs_b and part.s is not None:
            db = _mm_to(dyl.t(), part.s, part.B.dtype)
        ds = _scaled_mm(dyl, part.B.to(low), part.scale / (1.0 - part.p))
        mask = unpack_bits(part.bits, x.shape[1], low) if part.bits is not None else None
        if needs_x:
            dx = _add_low_rank(dx, ds, part.A.to(low), mask)
            if low == part.dy.dtype:
                dx.addmm_(part.dy, part.w.t())
            else:
                dx.add_(torch.mm(part.dy, part.w.t()))
        if part.needs_a:
            da = _mm_to(ds.t(), xl if mask is None else mask.mul_(xl), part.A.dtype)
        pairs.append((da, db))
    return (dx.to(x.dtype) if dx is not None else None), pairs


def _add_low_rank(dx: Tensor | None, ds: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """dx + mask ∘ (dS A), in dx's memory where there is one."""
    if dx is not None and mask is None:
        return dx.addmm_(ds, A)
    update = torch.mm(ds, A)
    if mask is not None:
        update.mul_(mask)
    return update if dx is None else dx.add_(update)


def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Tensor:
    """Y for x [..., K] without gradients or dropout; ``w`` as stored,
    [K, N] when ``transposed``."""
    K, count, dtype = x.size(-1), x.numel(), x.dtype
    if A.dtype is dtype and count <= _FEW_ROWS * K:
        stored = w.t() if transposed else w
        if count == K and dtype is torch.float32 and x.is_cpu:
            # one row: matrix-vector products need no transposed views and cost half the host time
            v = x.view(K)
            y = torch.mv(stored, v) if bias is None else torch.addmv(bias, stored, v)
            y.addmv_(B, torch.mv(A, v), alpha=scale)
            dims = x.dim()  # the usual ones without the cost of slicing a shape
            if dims == 3:
                return y.view(1, 1, -1)
            return y.view(1, -1) if dims == 2 else y.view(*x.shape[:-1], -1)
        y = linear(x, stored, bias)
        return y.add_(linear(linear(x, A), B), alpha=scale)
    x2 = x.reshape(-1, K)
    y, _, _ = forward(x2, w if transposed else w.t(), bias, A, B, scale, 0.0)
    return y.view(*x.shape[:-1], y.shape[-1])


def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, samples: Any) -> Tensor:
    """Y [M, N] for x [M, K], w [N, K]: the base product once, then each adapter on the rows of its
    own samples; see :mod:`.lora_mixed`."""
    y = linear(x, w, bias)
    count, T = len(samples), x.shape[0] // max(len(samples), 1)
    by_sample, out = x.view(count, T, x.shape[1]), y.view(count, T, y.shape[1])
    for adapter, rows in zip(adapters, samples.rows(x.device), strict=True):
        if adapter is not None and rows is not None:
            A, B, scale = adapter
            part = by_sample.index_select(0, rows).to(A.dtype)
            out = out.index_add(0, rows, (linear(linear(part, A), B) * scale).to(out.dtype))
    return out.view(y.shape)
