"""The low-rank products on torch's own operations, and the dtype that they run in."""

from __future__ import annotations

import torch
from torch import Tensor

from .bases.weight import BaseWeight


def low_rank_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype of the low-rank products.

    On CUDA it is the activations', so that float32 adapters in a bf16 model run on the matrix
    units. Elsewhere it is the adapter's, as in HF PEFT, which costs nothing without matrix units.
    """
    return x.dtype if x.is_cuda else A.dtype


def base_product(x: Tensor, w: Tensor, y: Tensor | None = None) -> Tensor:
    """x w for a base weight [K, N], dense or quantised; added to ``y`` in its memory if given."""
    # a call of isinstance for a class of tensors costs five times as much
    if w.__class__ is BaseWeight:
        return w.product(x, y)
    return torch.mm(x, w) if y is None else y.addmm_(x, w)


def base_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w + bias [M, N], a new tensor, for a base weight [K, N], dense or quantised."""
    if w.__class__ is BaseWeight:
        y = w.product(x)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, w) if bias is None else torch.addmm(bias, x, w)


def in_dtype(dtype: torch.dtype, t: Tensor) -> Tensor:
    """``t`` in ``dtype``; skips a call of ``to`` without effect, which costs half a microsecond."""
    return t if t.dtype is dtype else t.to(dtype)


def scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """a b · alpha [M, r], with the factor applied before the one rounding to the result's dtype."""
    if a.is_cpu:
        # MKL is several times faster with the small r as rows than as columns; the result is a
        # transposed view, which later products take without a copy
        if alpha == 1.0:  # small products take a third less time so
            return torch.mm(b.t(), a.t()).t()
        out = a.new_empty((b.shape[1], a.shape[0]))
        return torch.addmm(out, b.t(), a.t(), beta=0, alpha=alpha).t()
    out = a.new_empty((a.shape[0], b.shape[1]))
    return torch.addmm(out, a, b, beta=0, alpha=alpha)


def mm_to(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in ``dtype``, without rounding to a narrower one in between."""
    if a.dtype != dtype and a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    a, b = in_dtype(dtype, a), in_dtype(dtype, b)
    if a.is_cpu and b.shape[1] < a.shape[0]:  # as in scaled_mm
        return torch.mm(b.t(), a.t()).t().contiguous()
    return torch.mm(a, b)
