"""The two kernels of :mod:`.experts_gate_grad`: strips of columns of a group, and sums of parts.

All sums are in a fixed order. What is not wanted, or is made elsewhere, is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, dot, keep_tile
from .experts_gates import gated_grad, load_gate
from .mlp_grad import _once


@triton.jit
def _experts_gate_grad_kernel(
    dh, gu, dgu, h, weights, pairs, offsets, b, s, ds_parts, db, dw_parts,
    scale, R, b_e_stride, b_n_stride, b_r_stride, s_stride, alpha, limit, plus,
    PART, K, N, dh_stride, gu_stride, dgu_stride, h_stride, ds_down, words, da, R_DOWN, ds_stride,
    WORDS,
    ACT: tl.constexpr, CLAMPED: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    strip, group = tl.program_id(0), tl.program_id(1)
    # dGU of a strip is one tile of interleaved columns, or one in each half
    TILES: tl.constexpr = 2 if LAYOUT == "halves" else 1
    WIDTH: tl.constexpr = 2 * BLOCK_K if LAYOUT == "interleaved" else BLOCK_K
    k0 = strip * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_ok = k < K  # [BLOCK_K]
    n = strip * WIDTH + tl.arange(0, WIDTH)  # [WIDTH]
    n_ok = n < N // TILES  # [WIDTH]
    n64 = n.to(tl.int64)  # [WIDTH]
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    rank_ok = rank < R  # [BLOCK_R]
    of_down = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)  # [BLOCK_A]
    # Products have the ranks as their rows: so tiles of dGU are right operands.
    zero = tl.zeros((BLOCK_R, WIDTH), tl.float32)
    bs = ()  # each [BLOCK_R, WIDTH]
    dbs = ()  # each [BLOCK_R, WIDTH]
    for i in tl.static_range(TILES):
        dbs = dbs + (zero,)
        b_tile = zero
        if ds_parts is not None:
            b_tile = tl.load(
                b + group.to(tl.int64) * b_e_stride + (n64 + i * K)[None, :] * b_n_stride
                + rank.to(tl.int64)[:, None] * b_r_stride,
                mask=rank_ok[:, None] & n_ok[None, :],
                other=0.0,
            )  # fmt: skip
        bs = bs + (cast(b_tile, gu.dtype.element_ty),)
    sum_a = tl.zeros((BLOCK_A, BLOCK_K), tl.float32)
    first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
    # Weights and their places are read one and two steps ahead, as the compiler would not have the
    # large copies in flight in a loop with a load whose address is loaded.
    ahead = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    pair = tl.load(pairs + ahead, mask=ahead < last, other=0)  # [BLOCK_M]
    weight = tl.load(weights + pair, mask=ahead < last, other=0.0)  # [BLOCK_M]
    pair = tl.load(pairs + BLOCK_M + ahead, mask=BLOCK_M + ahead < last, other=0)
    # the number of stages stands here because a loop without products is not pipelined otherwise
    for m0 in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        own_ok = row_ok & (tl.program_id(2) == 0)  # what does not depend on ranks is written once
        g, u = load_gate(
            gu + row64[:, None] * gu_stride, k0, row_ok, K, LAYOUT, BLOCK_M, BLOCK_K
        )  # each [BLOCK_M, BLOCK_K]
        d = tl.load(
            dh + row64[:, None] * dh_stride + k[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        w = weight.to(tl.float32)  # [BLOCK_M]
        weight = tl.load(weights + pair, mask=row + BLOCK_M < last, other=0.0)
        pair = tl.load(pairs + row + 2 * BLOCK_M, mask=row + 2 * BLOCK_M < last, other=0)
        value, dg, du = gated_grad(
            d * w[:, None], g, u, alpha, limit, plus, ACT, CLAMPED, LAYOUT == "alone"
        )
        if h is not None:
            tl.store(
                h + row64[:, None] * h_stride + k[None, :], value,
                mask=own_ok[:, None] & k_ok[None, :],
            )  # fmt: skip
        tl.store(
            dw_parts + strip.to(tl.int64) * PART + row, tl.sum(d * value.to(tl.float32), 1),
            mask=own_ok,
        )  # fmt: skip
        if LAYOUT == "interleaved":
            dg = tl.reshape(tl.join(dg, du), (BLOCK_M, WIDTH))
        out = dgu + row64[:, None] * dgu_stride + n[None, :]  # [BLOCK_M, WIDTH]
        out_ok = own_ok[:, None] & n_ok[None, :]  # [BLOCK_M, WIDTH]
        tl.store(out, dg, mask=out_ok)
        if LAYOUT == "halves":
            tl.store(out + K, du, mask=out_ok)
        rm_ok = rank_ok[:, None] & row_ok[None, :]  # [BLOCK_R, BLOCK_M]
        if s is not None:
            s_tile = tl.load(
                s + row64[None, :] * s_stride + rank[:, None], mask=rm_ok, other=0.0
            )  # [BLOCK_R, BLOCK_M]
        low = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        sums = ()
        for i in tl.static_range(TILES):
            total = zero
            if ds_parts is not None or s is not None:
                grad = _once(dg, ONCE) if i == 0 else _once(du, ONCE)
                if ds_parts is not None:
                    low = dot(bs[i], tl.trans(grad), low, PRECISION)
                if s is not None:
                    total = dot(s_tile, grad, dbs[i], PRECISION)
            sums = sums + (total,)
        dbs = sums
        if da is not None:
            kept = _once(value, ONCE)
            if words is not None:
                keep = keep_tile(words, row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                kept = tl.where(keep, kept, 0.0).to(gu.dtype.element_ty)  # [BLOCK_M, BLOCK_K]
            left = tl.load(
                ds_down + row64[None, :] * ds_stride + of_down[:, None],
                mask=(of_down < R_DOWN)[:, None] & row_ok[None, :],
                other=0.0,
            )  # [BLOCK_A, BLOCK_M]
            left = cast(left.to(tl.float32) * w[None, :], gu.dtype.element_ty)
            sum_a = dot(left, kept, sum_a, PRECISION)
        if ds_parts is not None:
            tl.store(
                ds_parts + (strip.to(tl.int64) * PART + row64[None, :]) * R + rank[:, None],
                low * scale,
                mask=rm_ok,
            )
    if db is not None:
        for i in tl.static_range(TILES):
            tl.store(
                db + (group.to(tl.int64) * N + n64[None, :] + i * K) * R + rank[:, None],
                dbs[i],
                mask=rank_ok[:, None] & n_ok[None, :],
            )
    if da is not None:
        tl.store(
            da + (group.to(tl.int64) * R_DOWN + of_down[:, None]) * K + k[None, :],
            sum_a,
            mask=(of_down < R_DOWN)[:, None] & k_ok[None, :],
        )


@triton.jit
def _experts_gate_sum_kernel(
    dw_parts, dw, pairs, end, ds_parts, ds, P, R, SIZE, PART, COUNT,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dw at its pair and dS, of COUNT parts of PART rows; 0 for rows of no group."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    rows = tl.load(end).to(tl.int64)
    whole = (rows + 15) // 16 * 16  # for masks of whole vectors; PART is a multiple of 16 too
    total = tl.zeros((BLOCK,), tl.float32)
    if tl.program_id(1) == 0:
        for p0 in range(0, COUNT, AHEAD):
            parts = ()
            for j in tl.static_range(AHEAD):
                source = dw_parts + (p0 + j) * PART + at  # [BLOCK]
                ok = (at < whole) & (p0 + j < COUNT)  # [BLOCK]
                parts = parts + (tl.load(source, mask=ok, other=0.0),)
            for j in tl.static_range(AHEAD):
                total += tl.where(at < rows, parts[j], 0.0)  # padding rows were not written
        pair = tl.load(pairs + at, mask=at < P, other=0)  # [BLOCK]
        tl.store(dw + pair, total, mask=at < P)
    elif ds is not None:
        for p0 in range(0, COUNT, AHEAD):
            parts = ()
            for j in tl.static_range(AHEAD):
                source = ds_parts + (p0 + j) * (rows * 0 + PART) * R + at  # [BLOCK]
                ok = (at < whole * R) & (p0 + j < COUNT)  # [BLOCK]
                parts = parts + (tl.load(source, mask=ok, other=0.0),)
            for j in tl.static_range(AHEAD):
                total += tl.where(at < rows * R, parts[j], 0.0)
        tl.store(ds + at, cast(total, ds.dtype.element_ty), mask=at < SIZE)
