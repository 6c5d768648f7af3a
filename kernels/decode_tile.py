"""The two kernels of :mod:`.decode` that stream W: one for one row, one for up to sixteen.

A program has block_n outputs of one projection of a group and reads its rows of W once. S is either
given (from the launch before, in parts over K that are added here in index order), or every program
makes it again from A. A given S is read last: until then nothing depends on the launch before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, device_function, dot


@device_function
def given_s(s, part_stride, PARTS: tl.constexpr, mask):
    """The fp32 sum of the parts of S at the pointers ``s``, in index order."""
    total = tl.load(s, mask=mask, other=0.0).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        total += tl.load(s + p * part_stride, mask=mask, other=0.0)
    return total


@device_function
def one_row_tile(
    y, x, w, a, b, s, bias, scale, tile, N, K, R, part_stride,
    w_n_stride, w_k_stride, a_r_stride, b_n_stride, b_r_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """No tensor cores: a sum for each column of a K block, all added at the end."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok, rank_ok = n < N, rank < R  # [BLOCK_N], [BLOCK_R]
    n64 = n.to(tl.int64)  # [BLOCK_N]
    w_row = w + n64[:, None] * w_n_stride  # [BLOCK_N, 1]
    b_tile = tl.load(
        b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride,
        mask=n_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    y_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    # a loop without matrix products is pipelined only when it says its stages itself
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < K  # [BLOCK_K]
        xs = tl.load(x + k, mask=k_ok, other=0.0)  # [BLOCK_K]
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        wide = xs.to(tl.float32)[None, :]  # [1, BLOCK_K]
        y_acc += ws.to(tl.float32) * wide
        if s is None:
            a_tile = tl.load(
                a + rank.to(tl.int64)[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            s_acc += cast(a_tile, xs.dtype).to(tl.float32) * wide
    out = tl.sum(y_acc, 1)  # [BLOCK_N]
    if bias is not None:
        out += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if s is None:
        low = tl.sum(s_acc, 1) * scale  # [BLOCK_R]
    else:
        low = given_s(s + rank, part_stride, PARTS, rank_ok)  # [BLOCK_R]
    low = cast(low, x.dtype.element_ty).to(tl.float32)
    b_tile = cast(b_tile, x.dtype.element_ty).to(tl.float32)
    out += tl.sum(b_tile * low[None, :], 1)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n_ok)


@triton.jit
def _gemv_kernel(
    ys, x, ws, As, Bs, s, biases, scales, firsts, Ns, ranks, columns,
    w_n_strides, w_k_strides, a_strides, b_n_strides, b_r_strides, K, part_stride,
    G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(G):
        tile = tl.program_id(0) - firsts[i]
        if (tile >= 0) & (tile * BLOCK_N < Ns[i]):
            one_row_tile(
                ys[i], x, ws[i], As[i], Bs[i], None if s is None else s + columns[i], biases[i],
                scales[i], tile, Ns[i], K, ranks[i], part_stride,
                w_n_strides[i], w_k_strides[i], a_strides[i], b_n_strides[i], b_r_strides[i],
                BLOCK_N, BLOCK_K, BLOCK_R, PARTS, STAGES, EARLY,
            )  # fmt: skip


@device_function
def rows_tile(
    y, x, w, a, b, s, bias, scale, tile, M, N, K, R, RANK_END, x_stride, s_stride, part_stride,
    w_n_stride, w_k_stride, a_r_stride, b_n_stride, b_r_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Up to 16 rows; products are transposed (W tile times Xᵀ), as tensor cores need a tall W.

    Of a given S, the ranks from BLOCK_R to RANK_END follow in a loop.
    """
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok, m_ok, rank_ok = n < N, m < M, rank < R  # [BLOCK_N], [BLOCK_M], [BLOCK_R]
    n64, rank64 = n.to(tl.int64), rank.to(tl.int64)  # [BLOCK_N], [BLOCK_R]
    dtype = x.dtype.element_ty
    x_row = x + m.to(tl.int64)[:, None] * x_stride  # [BLOCK_M, 1]
    w_row = w + n64[:, None] * w_n_stride  # [BLOCK_N, 1]
    y_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < K  # [BLOCK_K]
        xs = tl.trans(
            tl.load(x_row + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        )  # [BLOCK_K, BLOCK_M]
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        y_acc = dot(ws, xs, y_acc, PRECISION)
        if s is None:
            a_tile = tl.load(
                a + rank64[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            s_acc = dot(cast(a_tile, dtype), xs, s_acc, PRECISION)
    b_row = b + n64[:, None] * b_n_stride  # [BLOCK_N, 1]
    b_tile = tl.load(
        b_row + rank[None, :] * b_r_stride, mask=n_ok[:, None] & rank_ok[None, :], other=0.0
    )  # [BLOCK_N, BLOCK_R]
    if bias is not None:
        y_acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if s is None:
        low = cast(s_acc * scale, dtype)  # [BLOCK_R, BLOCK_M]
        y_acc = dot(cast(b_tile, dtype), low, y_acc, PRECISION)
    else:
        s_row = s + m.to(tl.int64)[:, None] * s_stride + rank[None, :]  # [BLOCK_M, BLOCK_R]
        low = given_s(s_row, part_stride, PARTS, m_ok[:, None] & rank_ok[None, :])
        low = tl.trans(cast(low, dtype))  # [BLOCK_R, BLOCK_M]
        y_acc = dot(cast(b_tile, dtype), low, y_acc, PRECISION)
        for r0 in tl.range(BLOCK_R, RANK_END, BLOCK_R, num_stages=1):
            rank_ok = r0 + rank < R  # [BLOCK_R]
            b_tile = tl.load(
                b_row + (r0 + rank)[None, :] * b_r_stride,
                mask=n_ok[:, None] & rank_ok[None, :],
                other=0.0,
            )  # [BLOCK_N, BLOCK_R]
            low = given_s(s_row + r0, part_stride, PARTS, m_ok[:, None] & rank_ok[None, :])
            low = tl.trans(cast(low, dtype))  # [BLOCK_R, BLOCK_M]
            y_acc = dot(cast(b_tile, dtype), low, y_acc, PRECISION)
    tl.store(
        y + m.to(tl.int64)[None, :] * N + n[:, None],
        cast(y_acc, y.dtype.element_ty),
        mask=n_ok[:, None] & m_ok[None, :],
    )


@triton.jit(do_not_specialize=["M", "part_stride"])
def _rows_kernel(
    ys, x, ws, As, Bs, s, biases, scales, firsts, Ns, ranks, columns,
    w_n_strides, w_k_strides, a_strides, b_n_strides, b_r_strides, K, part_stride,
    M, RANK_END, x_stride, s_stride,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(G):
        tile = tl.program_id(0) - firsts[i]
        if (tile >= 0) & (tile * BLOCK_N < Ns[i]):
            rows_tile(
                ys[i], x, ws[i], As[i], Bs[i], None if s is None else s + columns[i], biases[i],
                scales[i], tile, M, Ns[i], K, ranks[i], RANK_END, x_stride, s_stride, part_stride,
                w_n_strides[i], w_k_strides[i], a_strides[i], b_n_strides[i], b_r_strides[i],
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, PARTS, PRECISION, EARLY,
            )  # fmt: skip
