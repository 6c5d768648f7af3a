"""A quantised weight [N, K] as kernels read it: tensors, and a :class:`Layout` that says how.

    w[n, k] = value(q[n, k]) · scale(n, k)

One record serves NF4 and FP4 (bitsandbytes), int8, fp8, int4 in groups (GPTQ, AWQ, packed rows) and
MXFP4 and NVFP4: the layouts are constants, so each compiles to code of its own. :func:`dense` is
the float64 formula; the kernels' function is :func:`.quantised_tile.quantised_tile`, and
:mod:`.quantised_formats` makes records of what owners keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import is_power_of_two
from .common import cdiv

_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # where the i-th of eight columns is, in a word's 4-bit fields
VALUES = ("code", "e2m1", "int", "int8", "e4m3")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # FP4 of the OCP microscaling formats
ORDERS = ("low", "high", "awq")
SCALES = ("float", "e4m3", "e8m0", "nested")
_WORDS = {torch.uint8: 2, torch.int32: 8}  # 4-bit numbers in a word


class Layout(NamedTuple):
    """How the words of a quantised weight become numbers; constants of a compiled kernel.

    Attributes:
        number: what a number is: "code" (an index into a table of 16), "e2m1" (FP4 of 4 bits),
            "int" (4 bits less a zero point), "int8" or "e4m3" (a byte each).
        per: 4-bit numbers in a word (2 or 8), or 1 for bytes.
        along: the axis on which they are neighbours, "k" or "n".
        order: which 4 bits of a word the first of them has: "low", "high", or "awq" for AWQ's order
            of eight.
        rows, columns: the block that shares a scale; 0 for all rows, or all columns.
        flat: blocks of ``columns`` numbers run on from row to row.
        scale: what a scale is: "float", "e4m3", "e8m0" (a byte, 2 ** (byte - 127)), or "nested"
            (statistics that are quantised themselves, as bitsandbytes does).
        zero: a constant zero point; what is added to those of ``zeros`` if these are given.
        wraps: packed zero points keep 4 bits after that sum, so that 15 and 1 are 0; False: 16.
        zero_per: zero points in a word of ``zeros``, neighbours along n in ``order``; 1 for none.
        through: the dtype in which the owner computes W, when that is not the wanted one.
        factor: a constant factor, multiplied last.
        overall: how the scales take ``overall``: "times" or "over".
        inner: scales in a block of nested statistics.
        word: the dtype of scales that are loaded as words of 32 bits; made by launches alone.
    """

    number: str
    per: int = 1
    along: str = "k"
    order: str = "low"
    rows: int = 1
    columns: int = 0
    flat: bool = False
    scale: str = "float"
    zero: int = 0
    wraps: bool = True
    zero_per: int = 1
    through: str = ""
    factor: float = 1.0
    overall: str = "times"
    inner: int = 256
    word: str = ""


class Quantised(NamedTuple):
    """A weight [N, K]: its tensors as a kernel takes them, any strides, and their layout.

    Attributes:
        shape: (N, K).
        layout: how the tensors are read.
        bits: words [N, K], divided by ``per`` on the axis that they run along: uint8 or int32 for
            4-bit numbers, int8, or float8_e4m3fn.
        scales: [blocks of rows, blocks of columns]; ``flat``: [1, blocks]; in nested statistics the
            uint8 indices, contiguous.
        code: the table of 16 numbers, fp32.
        zeros: zero points [blocks of columns, N / zero_per], int32 for packed ones.
        groups: the block of columns of each k, int32 [K] (GPTQ's act-order).
        overall: one fp32 number for all scales (NVFP4).
        inner_scales, inner_code, offset: of nested statistics: scale = inner_code[index] ·
            inner_scales[block of scales] + offset; fp32 [blocks], [256] and one number.
    """

    shape: tuple[int, int]
    layout: Layout
    bits: Tensor
    scales: Tensor
    code: Tensor | None = None
    zeros: Tensor | None = None
    groups: Tensor | None = None
    overall: Tensor | None = None
    inner_scales: Tensor | None = None
    inner_code: Tensor | None = None
    offset: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[2:]

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which a product has to read."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)


# --------------------------------------------------------------------------------- what is valid


def why_not(w: Quantised) -> str | None:
    """The reason that kernels do not read such a weight; None when they do."""
    (N, K), f = w.shape, w.layout
    if f.number == "e4m3" and w.bits.dtype == torch.float8_e4m3fnuz:
        return "fp8 of AMD's kind (e4m3fnuz)"
    if f.along == "k" and K % f.per:
        return f"its {K} inputs are no multiple of {f.per}, and words run on from row to row"
    if f.along == "n" and N % f.per:
        return f"its {N} outputs are no multiple of {f.per}"
    if f.flat and not is_power_of_two(f.columns):
        return f"blocks of {f.columns}, no power of two, that run on from row to row"
    return None


def checked(name: str, w: Any) -> Quantised:
    """``w``, checked to be a weight that kernels read.

    Raises:
        TypeError: it is no :class:`Quantised`, or a tensor has another dtype than its layout says.
        ValueError: a tensor has another shape, is missing, or :func:`why_not` has a reason.
    """
    if not isinstance(w, Quantised):
        raise TypeError(f"{name} is a {type(w).__name__}; allowed: a Quantised weight")
    f, (N, K) = w.layout, w.shape
    constants: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("number", f.number, VALUES), ("order", f.order, ORDERS), ("scale", f.scale, SCALES),
        ("along", f.along, ("k", "n")), ("overall", f.overall, ("times", "over")),
    )  # fmt: skip
    for field, given, words_allowed in constants:
        if given not in words_allowed:
            allowed = ", ".join(words_allowed)
            raise ValueError(f"{name}.layout.{field} is {given!r}; allowed: {allowed}")
    four = f.number in ("code", "e2m1", "int")
    dtypes = _WORDS if four else [torch.int8 if f.number == "int8" else torch.float8_e4m3fn]
    if w.bits.dtype not in dtypes and w.bits.dtype != torch.float8_e4m3fnuz:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}.bits has dtype {w.bits.dtype}; allowed: {allowed}")
    reason = why_not(w)
    if reason is not None:
        raise ValueError(f"{name} is not read by kernels: {reason}")
    per = _WORDS.get(w.bits.dtype, 1)
    if f.per != per:
        raise ValueError(
            f"{name}.layout.per is {f.per}; allowed: {per}, as bits are {w.bits.dtype}"
        )
    words = (N, K // per) if f.along == "k" else (N // per, K)
    _shape(f"{name}.bits", w.bits, words)
    if f.flat:
        blocks = (1, cdiv(N * K, f.columns))
    elif w.groups is not None:
        blocks = (N, w.scales.shape[1])
        _shape(f"{name}.groups", w.groups, (K,))
    else:
        blocks = (cdiv(N, f.rows) if f.rows else 1, cdiv(K, f.columns) if f.columns else 1)
    _shape(f"{name}.scales", w.scales, blocks)
    needed = {
        "code": (f.number == "code", (16,)),
        "inner_code": (f.scale == "nested", (256,)),
        "inner_scales": (f.scale == "nested", (cdiv(w.scales.numel(), f.inner),)),
        "offset": (f.scale == "nested", None),
    }
    for field, (wanted, shape) in needed.items():
        t: Tensor | None = getattr(w, field)
        if (t is None) == wanted:
            state = "missing" if t is None else "given"
            raise ValueError(f"{name}.{field} is {state}, for a layout {f.number}, {f.scale}")
        if t is not None:
            _shape(f"{name}.{field}", t, tuple(t.shape) if shape is None else shape)
            if t.dtype != torch.float32:
                raise TypeError(f"{name}.{field} has dtype {t.dtype}; allowed: float32")
    if f.scale == "nested" and not (w.scales.dtype == torch.uint8 and w.scales.is_contiguous()):
        raise ValueError(
            f"{name}.scales are {w.scales.dtype}, strides {w.scales.stride()}; allowed for nested "
            "statistics: contiguous uint8"
        )
    if f.scale == "nested" and not is_power_of_two(f.inner):
        raise ValueError(f"{name}.layout.inner is {f.inner}; allowed: a power of two")
    if w.zeros is not None:
        _shape(f"{name}.zeros", w.zeros, (w.scales.shape[1], N // f.zero_per))
    return w


def _shape(name: str, t: Tensor, want: tuple[int, ...]) -> None:
    if tuple(t.shape) != want:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: {want}")


# ------------------------------------------------------------------------------------ the reference


def numbers(w: Quantised) -> Tensor:
    """value(q) [N, K] in float64, before scales."""
    f, bits = w.layout, w.bits
    if f.per == 1:
        return bits.double()
    q = _unpacked(bits, f.per, f.order, 1 if f.along == "k" else 0)
    if f.number == "e2m1":
        return e2m1_table(bits.device).double()[q]
    if f.number == "code":
        assert w.code is not None
        table: Tensor = w.code.double()
        return table[q]
    zero: Any = f.zero
    if w.zeros is not None:
        z = w.zeros
        if f.zero_per > 1:
            z = _unpacked(z, f.zero_per, f.order, 1)
        z = z + f.zero
        if f.zero_per > 1 and f.wraps:
            z = z & 15
        zero = z.double().t()[:, _column_blocks(w)]
    values: Tensor = q.double() - zero
    return values


def e2m1_table(device: torch.device) -> Tensor:
    """The 16 numbers of FP4 e2m1, fp32: positive ones first."""
    positive = torch.tensor(_E2M1, dtype=torch.float32, device=device)
    return torch.cat([positive, -positive])


def _unpacked(words: Tensor, per: int, order: str, axis: int) -> Tensor:
    at = torch.tensor(_AWQ if order == "awq" else range(per), device=words.device)
    at = at.flip(0) if order == "high" else at
    q = (words.movedim(axis, -1).long()[..., None] >> (4 * at)) & 15
    return q.flatten(-2).movedim(-1, axis)


def _column_blocks(w: Quantised) -> Tensor:
    """The block of columns of each k [K]."""
    if w.groups is not None:
        return w.groups.long()
    k = torch.arange(w.shape[1], device=w.device)
    return k // w.layout.columns if w.layout.columns else k * 0


def scales(w: Quantised, dtype: torch.dtype = torch.float64) -> Tensor:
    """scale(n, k) [N, K], each operation rounded to ``dtype``."""
    (N, K), f, s = w.shape, w.layout, w.scales
    if f.scale == "nested":
        assert w.inner_code is not None and w.inner_scales is not None and w.offset is not None
        block = torch.arange(s.numel(), device=s.device) // f.inner
        s = w.inner_code.to(dtype)[s.long().flatten()] * w.inner_scales.to(dtype)[block]
        s = (s + w.offset.to(dtype).flatten()).view(w.scales.shape)
    elif f.scale == "e8m0":
        s = s.view(torch.uint8)
        s = torch.exp2(s.to(dtype) - 127).masked_fill(s == 255, float("nan"))
    else:
        s = s.to(dtype)
    if w.overall is not None:
        every = w.overall.to(dtype).flatten()
        s = s * every if f.overall == "times" else s / every
    if f.flat:
        at = torch.arange(N * K, device=s.device) // f.columns
        return s.flatten()[at].view(N, K)
    n = torch.arange(N, device=s.device)
    n = n // f.rows if f.rows else n * 0
    return s[n][:, _column_blocks(w)]


def dense(w: Quantised, dtype: torch.dtype = torch.float64) -> Tensor:
    """W [N, K]: in float64 the exact formula, else operations in fp32, rounded, as owners do."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = numbers(w).to(wide) * scales(w, wide)
    if w.layout.factor != 1.0:
        out = out * w.layout.factor
    if w.layout.through and dtype != torch.float64:
        out = out.to(getattr(torch, w.layout.through))
    return out.to(dtype)
