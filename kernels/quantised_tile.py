"""A tile of a quantised weight, as numbers: what kernels load in place of a tile of a dense W.

The steps and their roundings are those of the formats' owners, each operation in fp32, so that a
tile equals the same part of the weight that they dequantise. Tables of 16 and 256 numbers are
looked up with ``tl.gather``, which leaves them in shared memory: a load for each number would be
copied ahead of the loop, four bytes at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from .common import Arch, cast, device_function
from .quantised import Quantised


@device_function
def e4m3(byte):
    """The fp32 numbers of bytes in e4m3fn, for architectures without an instruction for it."""
    b = byte.to(tl.uint32)
    bits = ((b & 0x80) << 24) | ((b & 0x7F) << 20)
    # an exponent of 4 bits in the place of one of 8, whose bias is 120 more
    found = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    return tl.where((b & 0x7F) == 0x7F, float("nan"), found)


@device_function
def e2m1(q):
    """The fp32 numbers of 4 bits in e2m1."""
    b = q.to(tl.uint32)
    bits = ((b & 8) << 28) | ((b & 7) << 22)
    # an exponent of 2 bits in the place of one of 8, whose bias is 126 more
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@device_function
def look_up(table, index, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """table[index] for an int32 index [ROWS, COLUMNS]."""
    held = tl.load(table + tl.arange(0, SIZE))  # [SIZE]
    flat = tl.gather(held, tl.reshape(index, (ROWS * COLUMNS,)), 0)
    return tl.reshape(flat, (ROWS, COLUMNS))


@device_function
def places(LAYOUT: tl.constexpr):
    """The bits at which a word's numbers begin, [per]."""
    i = tl.arange(0, LAYOUT.per)
    if LAYOUT.order == "high":
        i = LAYOUT.per - 1 - i
    elif LAYOUT.order == "awq":
        i = (i & 1) * 4 + (i >> 1)
    return i * 4


@device_function
def column_blocks(w, k0, K, LAYOUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The blocks of columns of a tile, int32 [1, C], and which of them are in W.

    C is 1, or the number of whole blocks in the tile, or BLOCK_K for one of each column.
    """
    groups = w[4]
    SIZE: tl.constexpr = LAYOUT.columns
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    if groups is not None:
        found, ok = tl.load(groups + k, mask=k < K, other=0).to(tl.int32)[None, :], k < K
    elif SIZE == 0:
        found, ok = tl.zeros((1, 1), tl.int32), k0 + tl.zeros((1,), tl.int32) < K
    elif SIZE % BLOCK_K == 0:
        found, ok = tl.zeros((1, 1), tl.int32) + k0 // SIZE, k0 + tl.zeros((1,), tl.int32) < K
    elif BLOCK_K % SIZE == 0:
        # one load for a block, and its numbers get it from a register
        kb = k0 // SIZE + tl.arange(0, BLOCK_K // SIZE)
        found, ok = kb[None, :], kb * SIZE < K
    else:
        found, ok = (k // SIZE)[None, :], k < K
    return found, ok[None, :]


@device_function
def spread(t, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[., C] of blocks of columns as [., BLOCK_K] of columns, or as [., 1] where one has all."""
    C: tl.constexpr = t.shape[1]
    if C > 1 and C < BLOCK_K:
        t = tl.broadcast_to(t[:, :, None], (BLOCK_N, C, BLOCK_K // C))
        t = tl.reshape(t, (BLOCK_N, BLOCK_K))
    return t


@device_function
def number_tile(
    w, n0, k0, N, K, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The numbers [BLOCK_N, BLOCK_K] before scales, fp32; those outside of W are of any value."""
    bits, code, zeros = w[0], w[2], w[3]
    PER: tl.constexpr = LAYOUT.per
    if LAYOUT.along == "n":
        n = n0 // PER + tl.arange(0, BLOCK_N // PER)
        k = k0 + tl.arange(0, BLOCK_K)
        ok = (n < w[9][7])[:, None] & (k < K)[None, :]
    else:
        n = n0 + tl.arange(0, BLOCK_N)
        k = k0 // PER + tl.arange(0, BLOCK_K // PER)
        ok = (n < N)[:, None] & (k < w[9][6])[None, :]
    at = n.to(tl.int64)[:, None] * w[9][0] + k.to(tl.int64)[None, :] * w[9][1]
    words = tl.load(bits + at, mask=ok)
    if LAYOUT.number == "e4m3":
        if bits.dtype.element_ty == tl.uint8:
            found = e4m3(words)
        else:
            found = words.to(tl.float32)
    elif LAYOUT.number == "int8":
        found = words.to(tl.float32)
    else:
        place = places(LAYOUT)  # [PER]
        if LAYOUT.along == "n":
            q = (words.to(tl.int32)[:, None, :] >> place[None, :, None]) & 15
        else:
            q = (words.to(tl.int32)[:, :, None] >> place[None, None, :]) & 15
        q = tl.reshape(q, (BLOCK_N, BLOCK_K))
        if LAYOUT.number == "e2m1":
            found = e2m1(q)
        elif LAYOUT.number == "code":
            found = look_up(code, q, 16, BLOCK_N, BLOCK_K)
        elif zeros is None:
            found = (q - LAYOUT.zero).to(tl.float32)
        else:
            ZERO_PER: tl.constexpr = LAYOUT.zero_per
            each = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            kb, kb_ok = column_blocks(w, k0, K, LAYOUT, BLOCK_K)  # [1, C]
            at = (each // ZERO_PER).to(tl.int64)[:, None] * w[9][5] + kb.to(tl.int64) * w[9][4]
            z = tl.load(zeros + at, mask=(each < N)[:, None] & kb_ok, other=0)  # [BLOCK_N, C]
            if ZERO_PER > 1:
                i = each % ZERO_PER  # [BLOCK_N]
                if LAYOUT.order == "awq":
                    i = (i & 1) * 4 + (i >> 1)
                z = ((z >> (4 * i)[:, None]) & 15) + LAYOUT.zero
                if LAYOUT.wraps:
                    z = z & 15
                z = z.to(tl.float32)
            else:
                z = z.to(tl.float32) + LAYOUT.zero
            found = q.to(tl.float32) - spread(z, BLOCK_N, BLOCK_K)
    return found


@device_function
def as_stored(pieces, LAYOUT: tl.constexpr):
    """The low bits of int32 numbers as the narrow scales that they are."""
    if LAYOUT.word == "uint8":
        found = pieces & 0xFF
    elif LAYOUT.word == "bfloat16":
        found = (pieces & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = (pieces & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return found


@device_function
def scales_in_words(
    w, row, k0, n_ok, K, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(scales as stored, their offsets), [BLOCK_N, C], of which a word of 32 bits holds several."""
    PER: tl.constexpr = 4 if LAYOUT.word == "uint8" else 2
    SIZE: tl.constexpr = LAYOUT.columns
    if BLOCK_K % (SIZE * PER) == 0:
        C: tl.constexpr = BLOCK_K // SIZE
        word = k0 // (SIZE * PER) + tl.arange(0, C // PER)  # [C / PER]
        at = row + word[None, :]
        words = tl.load(w[1] + at, mask=n_ok & (word * (SIZE * PER) < K)[None, :], other=0)
        pieces = words[:, :, None] >> (tl.arange(0, PER) * (32 // PER))[None, None, :]
        pieces = tl.reshape(pieces, (BLOCK_N, C))
        at = tl.reshape(tl.broadcast_to(at[:, :, None], (BLOCK_N, C // PER, PER)), (BLOCK_N, C))
    else:
        kb, kb_ok = column_blocks(w, k0, K, LAYOUT, BLOCK_K)  # [1, C]
        at = row + kb // PER
        words = tl.load(w[1] + at, mask=n_ok & kb_ok, other=0)
        pieces = words >> (kb % PER) * (32 // PER)
    return as_stored(pieces, LAYOUT), at * PER


@device_function
def scales_of(w, stored, at, ok, LAYOUT: tl.constexpr):
    """The fp32 scales of what is stored at the offsets ``at``."""
    overall, inner_scales, inner_code, offset = w[5], w[6], w[7], w[8]
    if LAYOUT.scale == "nested":
        outer = tl.load(inner_scales + at // LAYOUT.inner, mask=ok, other=0.0)
        ROWS: tl.constexpr = stored.shape[0]
        COLUMNS: tl.constexpr = stored.shape[1]
        s = look_up(inner_code, stored.to(tl.int32), 256, ROWS, COLUMNS) * outer
        s = s + tl.load(offset)
    elif LAYOUT.scale == "e4m3":
        s = e4m3(stored)
    elif LAYOUT.scale == "e8m0":
        e = stored.to(tl.int32)
        s = tl.where(e == 0, 0x400000, e << 23).to(tl.float32, bitcast=True)
        s = tl.where(e == 255, float("nan"), s)
    else:
        s = stored.to(tl.float32)
    if overall is not None:
        if LAYOUT.overall == "times":
            s = s * tl.load(overall)
        else:
            s = tl.math.div_rn(s, tl.load(overall))
    return s


@device_function
def scale_tile(w, n0, k0, N, K, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scales, fp32 [BLOCK_N, BLOCK_K], or [BLOCK_N, 1] where the tile's columns share them."""
    n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    n_ok = (n < N)[:, None]
    if LAYOUT.flat:
        at = (n.to(tl.int64)[:, None] * K + k[None, :]) // LAYOUT.columns
        ok = n_ok & (k < K)[None, :]
        found = scales_of(w, tl.load(w[1] + at, mask=ok, other=0), at, ok, LAYOUT)
    else:
        if LAYOUT.rows == 1:
            row = n.to(tl.int64)[:, None] * w[9][2]
        elif LAYOUT.rows == 0:
            row = tl.zeros((BLOCK_N, 1), tl.int64)
        else:
            row = (n // LAYOUT.rows).to(tl.int64)[:, None] * w[9][2]
        kb, kb_ok = column_blocks(w, k0, K, LAYOUT, BLOCK_K)  # [1, C]
        ok = n_ok & kb_ok
        if LAYOUT.word == "":
            at = row + kb.to(tl.int64) * w[9][3]
            stored = tl.load(w[1] + at, mask=ok, other=0)
        else:
            stored, at = scales_in_words(w, row, k0, n_ok, K, LAYOUT, BLOCK_N, BLOCK_K)
        found = spread(scales_of(w, stored, at, ok, LAYOUT), BLOCK_N, BLOCK_K)
    return found


@device_function
def quantised_tile(
    w, n0, k0, N, K, DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [BLOCK_N, BLOCK_K] from row n0 and column k0 on, in DTYPE, and zeros outside of W.

    ``w`` is what :func:`operands` gives. n0 and k0 are multiples of the tile's sides.
    """
    found = number_tile(w, n0, k0, N, K, LAYOUT, BLOCK_N, BLOCK_K)
    found = found * scale_tile(w, n0, k0, N, K, LAYOUT, BLOCK_N, BLOCK_K)
    if LAYOUT.factor != 1.0:
        found = found * LAYOUT.factor
    if LAYOUT.through == "float16":
        found = cast(found, tl.float16).to(tl.float32)
    elif LAYOUT.through == "bfloat16":
        found = cast(found, tl.bfloat16).to(tl.float32)
    n, k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    return cast(tl.where((n < N)[:, None] & (k < K)[None, :], found, 0.0), DTYPE)


def loadable(w: Quantised, words: bool = True) -> Quantised:
    """The same weight with narrow scales as words of 32 bits, where they are neighbours in a row.

    Loads of fewer bits are not made ahead of a loop: their latency would be in every step. Without
    ``words`` they stay narrow.
    """
    scales, f = w.scales, w.layout
    per = 4 // scales.element_size()
    if f.scale in ("e4m3", "e8m0"):
        scales = scales.view(torch.uint8)
    kind = str(scales.dtype).removeprefix("torch.")
    rows, columns = scales.shape
    if (
        words
        and kind in ("uint8", "bfloat16", "float16")
        and not (f.flat or w.groups is not None or f.columns == 0)
        and columns % per == 0
        and (scales.stride(1) == 1 and (rows == 1 or scales.stride(0) % per == 0))
        and scales.storage_offset() % per == 0
        and f.inner % per == 0
    ):
        return w._replace(scales=scales.view(torch.int32), layout=f._replace(word=kind))
    return w._replace(scales=scales)


def operands(w: Quantised, arch: Arch) -> tuple[Any, ...]:
    """The tensors and strides of a :func:`loadable` weight as the functions here take them.

    e4m3 is converted by instructions from sm_89 on; before, kernels get its bytes.
    """
    bits, scales, zeros = w.bits, w.scales, w.zeros
    if bits.dtype == torch.float8_e4m3fn and arch.capability < 89:
        bits = bits.view(torch.uint8)
    z = (0, 0) if zeros is None else zeros.stride()
    return (
        bits, scales, w.code, zeros, w.groups, w.overall, w.inner_scales, w.inner_code, w.offset,
        (*bits.stride(), *scales.stride(), *z, bits.shape[1], bits.shape[0]),
    )  # fmt: skip
