"""An fp8 copy of activations, written by a kernel that has a tile of them in registers anyway.

    scale_mj = max |X_m(128 j .. 128 j + 127)| / 448, 1 for zeros        q = e4m3(X / scale)

One scale for 128 of a row, as the vendor's product with block scales takes it; a row's scale would
be known only after the whole row. The numbers are, bit for bit, those of torch's operations in
``peftkern.ops.bases.fp8_numbers``. A block with a NaN is all NaN; one with an infinity is zero,
and NaN where that stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton.language as tl

from . import checks
from .common import INTERPRET, Arch, device_function, row_stride

WIDTH = 128  # columns that share a scale, and those of the tiles that are copied
E4M3 = torch.float8_e4m3fn


class Fp8Rows(NamedTuple):
    """X [M, K] in fp8: q in e4m3, unit stride along rows; scales [M, K / 128] fp32, strides (1, ·).

    The scales of a block of columns lie one after another, as the product reads them.
    """

    q: torch.Tensor
    scales: torch.Tensor

    def columns(self, first: int, last: int) -> Fp8Rows:
        """Columns of it, a view; both are multiples of 128."""
        return Fp8Rows(self.q[:, first:last], self.scales[:, first // WIDTH : last // WIDTH])


def empty(M: int, K: int, device: torch.device) -> Fp8Rows:
    """Room for a copy of X [M, K]; K is a multiple of 128."""
    q = torch.empty((M, K), dtype=E4M3, device=device)
    return Fp8Rows(q, torch.empty((K // WIDTH, M), dtype=torch.float32, device=device).t())


def side_by_side(M: int, Ks: Sequence[int], device: torch.device) -> list[Fp8Rows]:
    """Room for copies of matrices [M, K_i], as columns of one matrix; for :func:`joined`."""
    whole = empty(M, sum(Ks), device)
    ends = list(accumulate(Ks))
    return [whole.columns(end - k, end) for k, end in zip(Ks, ends, strict=True)]


def joined(copies: Sequence[Fp8Rows]) -> Fp8Rows:
    """The whole [M, sum K_i] of which :func:`side_by_side` has made these columns."""
    first, M = copies[0], copies[0].q.shape[0]
    K = sum(c.q.shape[1] for c in copies)
    q = first.q.as_strided((M, K), first.q.stride())
    return Fp8Rows(q, first.scales.as_strided((M, K // WIDTH), (1, M)))


def check(name: str, copy: Fp8Rows | None, shape: tuple[int, int], arch: Arch) -> None:
    """Check the room for a copy of X of this shape.

    Raises:
        TypeError: a dtype is not e4m3, or not fp32 for the scales.
        ValueError: shapes or strides are others than those of :class:`Fp8Rows`, or the device
            cannot convert to fp8.
    """
    if copy is None:
        return
    M, K = shape
    if K % WIDTH:
        raise ValueError(f"{name} is given for {K} columns; allowed: a multiple of {WIDTH}")
    if arch.capability < 89:
        raise ValueError(
            f"{name} is given, and the device has compute capability {arch.capability / 10}; "
            "allowed: 8.9 or more, which convert to fp8"
        )
    for field, t, dtype, size in (
        ("q", copy.q, E4M3, (M, K)),
        ("scales", copy.scales, torch.float32, (M, K // WIDTH)),
    ):
        if t.dtype != dtype:
            raise TypeError(f"{name}.{field} has dtype {t.dtype}; allowed: {dtype}")
        checks.shape(f"{name}.{field}", t, size, "of the activations")
    if copy.q.stride(1) != 1 and K > 1:
        raise ValueError(f"{name}.q has strides {copy.q.stride()}; allowed: 1 along its rows")
    if copy.scales.stride(0) != 1 and M > 1:
        raise ValueError(f"{name}.scales has strides {copy.scales.stride()}; allowed: (1, any)")


def check_width(name: str, width: int, copy: Fp8Rows | None) -> None:
    """Check the width of a config's tiles, which share a scale where there is a copy."""
    if copy is not None and width != WIDTH:
        raise ValueError(f"{name} is {width}; allowed with an fp8 copy: {WIDTH}")


def arguments(copy: Fp8Rows | None) -> tuple[torch.Tensor | int | None, ...]:
    """The arguments of :func:`write`: q, its scales, and the stride of each."""
    if copy is None:
        return None, None, 0, 0
    blocks = copy.scales.shape[1]
    stride = copy.scales.stride(1) if blocks > 1 else copy.scales.shape[0]
    return copy.q, copy.scales, row_stride(copy.q), stride


@device_function
def rounded(x):
    """fp32 numbers of at most 448, and NaN, in e4m3, rounded to nearest even."""
    if INTERPRET:  # its conversion rounds ties up, loses a carry, and truncates small numbers
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # normal numbers: three bits of mantissa, and an exponent whose bias is 120 less
        code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6: multiples of 2^-9, by the rounding of a sum with 2^23
        small = (size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0) - 8388608.0
        code = tl.where(size < 0x3C800000, small.to(tl.int32), code)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        sign = (bits >> 24) & 0x80
        found = (code | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        found = x.to(tl.float8e4nv)
    return found


@device_function
def quantised(x):
    """(x in e4m3 [M, 128], scales [M] fp32) of a tile [M, 128]."""
    wide = x.to(tl.float32)  # [M, 128]
    # as whole numbers the sizes have the same order, and those of NaN are above all others
    largest = tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = largest.to(tl.float32, bitcast=True)  # [M]
    if INTERPRET:
        scale = tl.math.div_rn(largest, 448.0)
    else:
        # on CUDA torch divides by a number by multiplying with its inverse
        scale = largest * 0.002232142857142857
    # 2^-126, so that the quotients of the smallest blocks stay finite; a maximum that keeps NaN
    scale = tl.maximum(scale.to(tl.int32, bitcast=True), 0x800000).to(tl.float32, bitcast=True)
    scale = tl.where(largest == 0.0, 1.0, scale)  # [M]
    return rounded(tl.math.div_rn(wide, tl.broadcast_to(scale[:, None], wide.shape))), scale


@device_function
def write(x, q, scales, q_stride, scales_stride, row, row_ok, k0):
    """Write the fp8 copy of the tile [M, 128] of X whose first column is k0."""
    found, scale = quantised(x)
    k = k0 + tl.arange(0, 128)  # [128]
    tl.store(q + row.to(tl.int64)[:, None] * q_stride + k[None, :], found, mask=row_ok[:, None])
    tl.store(scales + (k0 // 128) * scales_stride + row, scale, mask=row_ok)
