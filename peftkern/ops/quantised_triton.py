"""Quantised base weights on the Triton kernels: what takes a call, and the products.

Up to :data:`.MAX_ROWS` rows without gradients run on ``kernels/decode_quantised.py``, which reads
the packed weight alone. In all other products ``kernels/dequantise.py`` makes W dense in one launch
and the vendor's product takes it: as its memory is freed at once, torch's allocator gives the same
block to every layer of a size. No race decides here: :func:`few_rows` and :func:`readable` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import checks
from ..kernels.decode_quantised import MAX_ROWS, decode_quantised
from ..kernels.dequantise import dequantise
from ..kernels.quantised import Quantised, why_not
from . import device, fp8_copies, torch_products
from .bases.weight import BaseWeight, Packed, multiplied
from .notes import note_once
from .projection import Projection

_NOTE = "a quantised weight is dequantised by its owner: %s"
# kinds of calls that have run, so that their kernels are loaded: a CUDA graph's capture forbids it
_loaded: set[object] = set()


def readable(packed: Packed, dtype: torch.dtype) -> Quantised | str:
    """The weight as kernels read it for products in ``dtype``, or the reason that they do not."""
    if dtype not in checks.DTYPES:
        return f"products are in {dtype}"
    if not checks.can_launch(packed.device):
        return f"it is on {packed.device.type}"
    found = packed.for_kernels(dtype)
    return found if isinstance(found, str) else why_not(found) or found


def few_rows(x: Tensor, members: list[Projection]) -> list[Quantised] | str:
    """What :func:`decode_quantised` takes for x [M, K], or why this call is no such one.

    All members have quantised weights of one layout, and their owner multiplies in x's dtype.
    """
    if x.shape[0] > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    ws: list[Quantised] = []
    for m in members:
        w = m.weight
        if w.__class__ is not BaseWeight:
            return "a weight is dense"
        if m.transposed or w.turned:
            return "a weight is [K, N]"
        packed = w.packed
        compute = packed.compute_dtype(x.dtype)
        if compute != x.dtype:
            return f"its owner multiplies in {compute}"
        found = readable(packed, x.dtype)
        if isinstance(found, str):
            return found
        if ws and found.layout != ws[0].layout:
            return "the layouts of a group differ"
        ws.append(found)
    return ws


def infer(x: Tensor, members: list[Projection]) -> list[Tensor] | None:
    """Y_i [..., N_i] for few rows of x [..., K]; None where :func:`few_rows` declines.

    While a CUDA graph is captured it declines kinds of calls that have not run before.
    """
    if members[0].weight.__class__ is not BaseWeight:
        return None
    x2 = x.reshape(-1, x.shape[-1])
    ws = few_rows(x2, members)
    if isinstance(ws, str):
        return None
    As, Bs = [m.A for m in members], [m.B for m in members]
    sizes = [(w.shape, a.shape[0], a.dtype, b.dtype) for w, a, b in zip(ws, As, Bs, strict=True)]
    biases = [m.bias for m in members]
    kind = x2.device, x2.dtype, x2.shape, ws[0].layout, *sizes, *[c is None for c in biases]
    if not device.is_loaded(kind, x, _loaded):
        note_once("in a CUDA graph a quantised weight is dequantised: %s", "never called before")
        return None
    ys = decode_quantised(x2, ws, As, Bs, [m.scale for m in members], biases)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _numbers(w: BaseWeight, dtype: torch.dtype) -> Tensor | None:
    """W as the product takes it, in ``dtype``; None where its owner has to dequantise it."""
    found = readable(w.packed, dtype)
    if isinstance(found, str):
        note_once(_NOTE, found)
        return None
    made: Tensor = dequantise(found, dtype)
    return made.t() if w.turned else made


def dense(w: Tensor) -> Tensor:
    """``w`` itself, or the numbers of a quantised weight, made now."""
    if w.__class__ is not BaseWeight:
        return w
    made = _numbers(w, w.dtype)
    return w.dense() if made is None else made


def base_product(x: Tensor, w: Tensor, y: Tensor | None = None) -> Tensor:
    """x w for a base weight [K, N], dense or quantised; added to ``y`` in its memory if given."""
    if w.__class__ is not BaseWeight:
        return torch_products.base_product(x, w, y)
    made = _numbers(w, w.packed.compute_dtype(x.dtype))
    return w.product(x, y) if made is None else multiplied(x, made, y)


def base_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w + bias [M, N], a new tensor, for a base weight [K, N], dense or quantised."""
    if w.__class__ is not BaseWeight:
        return torch_products.base_linear(x, w, bias)
    y = base_product(x, w)
    return y if bias is None else y.add_(bias)


def describe(packed: Packed, dtype: torch.dtype) -> str:
    """How kernels read a weight in a layer of this dtype, in words, for ``explain``."""
    if (words := fp8_copies.describe(packed)) is not None:
        return words
    compute = packed.compute_dtype(dtype)
    found = readable(packed, compute)
    if isinstance(found, str):
        return f"dequantised by its owner ({found})"
    if compute != dtype:
        return f"dequantised by a kernel, M<={MAX_ROWS} too, as its owner multiplies in {compute}"
    return f"M<={MAX_ROWS} decode_quantised, else dequantised by a kernel"
