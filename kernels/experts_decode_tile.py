"""The three kernels of :mod:`.experts_decode`, each of whose programs reads one expert at a time.

All sums are in a fixed order; products are sums of single ones, as a pair has one row. An expert
that is not here (an index out of range) makes no program read anything, and adds nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, device_function
from .experts_gates import gated, pick


@device_function
def _adapter(choice, token, COUNT: tl.constexpr):
    """The adapter of a token, or -1; the only one without a choice."""
    found = 0
    if choice is not None:
        found = tl.load(choice + token).to(tl.int32)
        found = tl.where(found < COUNT, found, -1)
    return found


@device_function
def _rank(ranks, adapter, choice):
    """The rank of a token's adapter, 0 without one."""
    rank = pick(ranks, adapter)
    if choice is not None:
        rank = tl.where(adapter < 0, 0, rank)
    return rank


@device_function
def _sum_of_parts(low, part_stride, count, rank_ok, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sum [BLOCK_R] of ``count`` parts, at pointers ``low`` [BLOCK_R] and part_stride on."""
    total = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for p0 in tl.range(0, count, BLOCK_P, num_stages=1):
        part = p0 + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        total += tl.load(
            low[None, :] + part.to(tl.int64)[:, None] * part_stride,
            mask=(part < count)[:, None] & rank_ok[None, :],
            other=0.0,
        )
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["k", "part_stride"])
def _experts_few_shrink_kernel(
    x, index, choice, As, parts, scales, ranks, e_strides, r_strides, k_strides,
    k, E, K, K_PART, R, x_stride, part_stride,
    COUNT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Parts over K of S [P, R], fp32: a program has some ranks of one pair."""
    if EARLY:
        # the programs of the next launch may start: they stream W, and wait for this grid's end
        tl.extra.cuda.gdc_launch_dependents()
    pair, part = tl.program_id(0), tl.program_id(2)
    token = pair // k
    expert = tl.load(index + pair)
    if (expert >= 0) & (expert < E):
        adapter = _adapter(choice, token, COUNT)
        rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        rank_ok = rank < _rank(ranks, adapter, choice)  # [BLOCK_R]
        a_row = (
            pick(As, adapter) + expert.to(tl.int64) * pick(e_strides, adapter)
            + rank.to(tl.int64)[:, None] * pick(r_strides, adapter)
        )  # fmt: skip
        begin = part * K_PART
        end = tl.minimum(begin + K_PART, K)
        sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k0 in range(begin, end, BLOCK_K):
            column = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            ok = column < end  # [BLOCK_K]
            xs = tl.load(x + token.to(tl.int64) * x_stride + column, mask=ok, other=0.0)
            a_tile = tl.load(
                a_row + column.to(tl.int64)[None, :] * pick(k_strides, adapter),
                mask=rank_ok[:, None] & ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            sums += cast(a_tile, xs.dtype).to(tl.float32) * xs.to(tl.float32)[None, :]
        tl.store(
            parts + part.to(tl.int64) * part_stride + pair.to(tl.int64) * R + rank,
            tl.sum(sums, 1) * pick(scales, adapter),
            mask=rank < R,
        )


@triton.jit(do_not_specialize=["P", "k", "part_stride", "next_stride"])
def _experts_few_up_kernel(
    x, index, choice, w, bias, Bs, parts, h, As, next_parts,
    ranks, b_e_strides, b_n_strides, b_r_strides,
    next_scales, next_ranks, a_e_strides, a_r_strides, a_k_strides,
    P, k, E, K, WIDTH, R, NEXT_R, x_stride, w_e_stride, w_n_stride, w_k_stride, bias_stride,
    part_stride, next_stride, alpha, limit, plus,
    ACT: tl.constexpr, CLAMPED: tl.constexpr, LAYOUT: tl.constexpr, COUNT: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NEXT_BLOCK_R: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, NEXT_EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a pair's H, and their part of the S that reads it, [tiles, P, NEXT_R]."""
    if NEXT_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # programs of different pairs but equal columns run together, as pairs may have one expert
    pair, tile = tl.program_id(0) % P, tl.program_id(0) // P
    token = pair // k
    expert = tl.load(index + pair)
    TILES: tl.constexpr = 2 if LAYOUT == "halves" else 1
    ROWS: tl.constexpr = 2 * BLOCK_N if LAYOUT == "interleaved" else BLOCK_N
    if (expert >= 0) & (expert < E):
        expert = expert.to(tl.int64)
        n = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
        n_ok = n < WIDTH * (ROWS // BLOCK_N)  # [ROWS]
        n64 = n.to(tl.int64)  # [ROWS]
        own_w = w + expert * w_e_stride
        w_row = own_w + n64[:, None] * w_n_stride  # [ROWS, 1]
        up_row = own_w + (n64 + WIDTH)[:, None] * w_n_stride  # [ROWS, 1]
        x_row = x + token.to(tl.int64) * x_stride
        first = tl.zeros((ROWS, BLOCK_K), tl.float32)
        second = tl.zeros((ROWS, BLOCK_K), tl.float32)
        # a loop without matrix products is pipelined only when it says its stages itself
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            column = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            ok = column < K  # [BLOCK_K]
            at = column.to(tl.int64)[None, :] * w_k_stride  # [1, BLOCK_K]
            xs = tl.load(x_row + column, mask=ok, other=0.0).to(tl.float32)[None, :]
            w_ok = n_ok[:, None] & ok[None, :]  # [ROWS, BLOCK_K]
            first += tl.load(w_row + at, mask=w_ok, other=0.0).to(tl.float32) * xs
            if TILES == 2:
                second += tl.load(up_row + at, mask=w_ok, other=0.0).to(tl.float32) * xs
        g = tl.sum(first, 1)  # [ROWS]
        u = tl.sum(second, 1)  # [ROWS]
        if bias is not None:
            own = bias + expert * bias_stride + n  # [ROWS]
            g += tl.load(own, mask=n_ok, other=0.0).to(tl.float32)
            if TILES == 2:
                u += tl.load(own + WIDTH, mask=n_ok, other=0.0).to(tl.float32)
        adapter = _adapter(choice, token, COUNT)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if Bs is not None:
            own_rank = _rank(ranks, adapter, choice)
            b = pick(Bs, adapter) + expert * pick(b_e_strides, adapter)
            b_n_stride, b_r_stride = pick(b_n_strides, adapter), pick(b_r_strides, adapter)
            for r0 in tl.range(0, own_rank, BLOCK_R, num_stages=1):
                rank = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
                rank_ok = rank < own_rank  # [BLOCK_R]
                low = _sum_of_parts(
                    parts + pair.to(tl.int64) * R + rank, part_stride, PARTS, rank_ok, 1, BLOCK_R
                )  # [BLOCK_R]
                low = cast(low, x.dtype.element_ty).to(tl.float32)[None, :]
                at = b + rank.to(tl.int64)[None, :] * b_r_stride  # [1, BLOCK_R]
                b_ok = n_ok[:, None] & rank_ok[None, :]  # [ROWS, BLOCK_R]
                b_tile = tl.load(at + n64[:, None] * b_n_stride, mask=b_ok, other=0.0)
                g += tl.sum(cast(b_tile, x.dtype.element_ty).to(tl.float32) * low, 1)
                if TILES == 2:
                    b_tile = tl.load(at + (n64 + WIDTH)[:, None] * b_n_stride, mask=b_ok, other=0.0)
                    u += tl.sum(cast(b_tile, x.dtype.element_ty).to(tl.float32) * low, 1)
        g = cast(g, h.dtype.element_ty)
        u = cast(u, h.dtype.element_ty)
        if LAYOUT == "interleaved":
            g, u = tl.split(tl.reshape(g, (BLOCK_N, 2)))
        value = gated(g, u, alpha, limit, plus, ACT, CLAMPED, LAYOUT == "alone")  # [BLOCK_N]
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        column_ok = column < WIDTH  # [BLOCK_N]
        tl.store(h + pair.to(tl.int64) * WIDTH + column, value, mask=column_ok)
        if As is not None:
            own_rank = _rank(next_ranks, adapter, choice)
            a = pick(As, adapter) + expert * pick(a_e_strides, adapter)
            a_row = a + column.to(tl.int64)[None, :] * pick(a_k_strides, adapter)
            out = next_parts + tile.to(tl.int64) * next_stride + pair.to(tl.int64) * NEXT_R
            held = tl.where(column_ok, value.to(tl.float32), 0.0)[None, :]  # [1, BLOCK_N]
            for r0 in tl.range(0, NEXT_R, NEXT_BLOCK_R, num_stages=1):
                rank = r0 + tl.arange(0, NEXT_BLOCK_R)  # [NEXT_BLOCK_R]
                a_tile = tl.load(
                    a_row + rank.to(tl.int64)[:, None] * pick(a_r_strides, adapter),
                    mask=(rank < own_rank)[:, None] & column_ok[None, :],
                    other=0.0,
                )  # [NEXT_BLOCK_R, BLOCK_N]
                low = tl.sum(cast(a_tile, value.dtype).to(tl.float32) * held, 1)
                tl.store(out + rank, low * pick(next_scales, adapter), mask=rank < NEXT_R)


@triton.jit(do_not_specialize=["T", "part_stride", "PARTS"])
def _experts_few_down_kernel(
    h, index, choice, weights, w, bias, Bs, parts, y,
    ranks, b_e_strides, b_n_strides, b_r_strides,
    T, k, E, K, N, R, w_e_stride, w_n_stride, w_k_stride, bias_stride, part_stride, PARTS,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a token's output, summed over its k experts."""
    token, tile = tl.program_id(0) % T, tl.program_id(0) // T
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n_ok = n < N  # [BLOCK_N]
    n64 = n.to(tl.int64)  # [BLOCK_N]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    steps = tl.cdiv(K, BLOCK_K)
    # all experts in one loop, so that the next one's W is on its way
    for step in tl.range(0, k * steps, num_stages=STAGES):
        pair = token * k + step // steps
        column = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        expert = tl.load(index + pair)
        weight = tl.load(weights + pair).to(tl.float32)
        ok = (column < K) & (expert >= 0) & (expert < E)  # [BLOCK_K]
        hs = tl.load(h + pair.to(tl.int64) * K + column, mask=ok, other=0.0)
        w_tile = tl.load(
            w + expert.to(tl.int64) * w_e_stride + n64[:, None] * w_n_stride
            + column.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]  # fmt: skip
        acc += w_tile.to(tl.float32) * (hs.to(tl.float32) * weight)[None, :]
    out = tl.sum(acc, 1)  # [BLOCK_N]
    adapter = _adapter(choice, token, COUNT)
    for j in tl.range(0, k, num_stages=1):
        pair = token * k + j
        expert = tl.load(index + pair)
        if (expert >= 0) & (expert < E):
            expert = expert.to(tl.int64)
            weight = tl.load(weights + pair).to(tl.float32)
            if bias is not None:
                own = tl.load(bias + expert * bias_stride + n, mask=n_ok, other=0.0)
                out += own.to(tl.float32) * weight
            if Bs is not None:
                own_rank = _rank(ranks, adapter, choice)
                b = pick(Bs, adapter) + expert * pick(b_e_strides, adapter)
                b_row = b + n64[:, None] * pick(b_n_strides, adapter)  # [BLOCK_N, 1]
                for r0 in tl.range(0, own_rank, BLOCK_R, num_stages=1):
                    rank = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
                    rank_ok = rank < own_rank  # [BLOCK_R]
                    low = _sum_of_parts(
                        parts + pair.to(tl.int64) * R + rank, part_stride, PARTS, rank_ok,
                        BLOCK_P, BLOCK_R,
                    )  # [BLOCK_R]  # fmt: skip
                    low = cast(low, h.dtype.element_ty).to(tl.float32) * weight
                    b_tile = tl.load(
                        b_row + rank.to(tl.int64)[None, :] * pick(b_r_strides, adapter),
                        mask=n_ok[:, None] & rank_ok[None, :],
                        other=0.0,
                    )  # [BLOCK_N, BLOCK_R]
                    b_tile = cast(b_tile, h.dtype.element_ty).to(tl.float32)
                    out += tl.sum(b_tile * low[None, :], 1)
    tl.store(y + token.to(tl.int64) * N + n, cast(out, y.dtype.element_ty), mask=n_ok)
