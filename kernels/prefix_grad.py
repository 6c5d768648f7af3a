"""The two kernels of prefix attention's backward (launched by :mod:`.prefix_backward`).

With the weights P [T, P + S] and delta [T] = rowsum(dO * O):

    dS = P * (dO Vᵀ - delta)    dQ = scale * dS K    dK = scale * dSᵀ Q    dV = Pᵀ dO

This holds for both sources of keys, the prefix and the own ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, device_function, dot
from .prefix_attention import key_range
from .prefix_tile import (
    from_natural,
    kept,
    offset_of,
    power,
    scores,
    store_tile,
    tile,
    to_natural,
    visible,
)


@device_function
def grad_scores(
    products, grads, lse, delta, see, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """(weights, gradient of scale * products) from products Q Kᵀ and grads dO Vᵀ, all of one shape.

    lse is finite and in the unit of ``power``.
    """
    s = scores(products, scale, softcap, SOFTCAP, NATURAL)
    p = power(s - lse, NATURAL)
    if MASKED:
        p = tl.where(see, p, 0.0)
    ds = p * (grads - delta)
    if SOFTCAP:
        ratio = to_natural(s, NATURAL) / softcap  # tanh
        ds = ds * (1.0 - ratio * ratio)
        if MASKED:  # the scores of masked keys may be any number
            ds = tl.where(see, ds, 0.0)
    return p, ds


@device_function
def grad_walk(
    rows, grad, lse, delta, k_base, v_base, k_stride, v_stride, keep, own, first, last, shift,
    query, row_ok, window, acc, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK_D] + dS K over the keys first to last of one source.

    Arguments as for prefix_attention.walk; rows and grad are [M, BLOCK_D], lse and delta [M].
    """
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        if MASKED:
            ok = kept(keep, n, n < last, own)  # [BLOCK_N]
            see = visible(
                query[:, None], (n - shift)[None, :], row_ok[:, None] & ok[None, :], window,
                CAUSAL, WINDOW,
            )  # fmt: skip
        else:
            ok = tl.full((BLOCK_N,), 1, tl.int1)
            see = ok
        k = tile(k_base, n, ok, k_stride, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = tile(v_base, n, ok, v_stride, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        zeros = tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
        products = dot(rows, tl.trans(k), zeros, PRECISION)  # [M, BLOCK_N]
        grads = dot(grad, tl.trans(v), zeros, PRECISION)  # [M, BLOCK_N]
        _, ds = grad_scores(
            products, grads, lse[:, None], delta[:, None], see, scale, softcap, SOFTCAP, MASKED,
            NATURAL,
        )  # fmt: skip
        acc = dot(cast(ds, k.dtype), k, acc, PRECISION)
    return acc


@triton.jit
def _grad_rows_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, q_offset_at, o, lse, grad_o, grad_q, delta,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, o_strides, go_strides, gq_strides,
    keep_stride, q_offset, offset_stride, window, scale, softcap, G, T, S, P,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    t0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    hk = h // G
    t = t0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = t < T  # [BLOCK_M]
    offset = offset_of(b, q_offset_at, q_offset, offset_stride)
    query = offset + t  # [BLOCK_M]
    low = offset + t0
    high = offset + tl.minimum(t0 + BLOCK_M, T) - 1
    at = (b * tl.num_programs(1) + h) * T
    out = tile(
        o + b * o_strides[0] + h * o_strides[1], t, row_ok, o_strides[2], D, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    grad = tile(
        grad_o + b * go_strides[0] + h * go_strides[1], t, row_ok, go_strides[2], D, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    inner = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta + at + t, inner, mask=row_ok)
    row_lse = from_natural(tl.load(lse + at + t, mask=row_ok, other=0.0), NATURAL)  # [BLOCK_M]
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)  # for rows that see no key
    rows = tile(
        q + b * q_strides[0] + h * q_strides[1], t, row_ok, q_strides[2], D, BLOCK_D
    )  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    own_k = k + b * k_strides[0] + hk * k_strides[1]
    own_v = v + b * v_strides[0] + hk * v_strides[1]
    own_first, own_last = key_range(low, high, S, 0, window, BLOCK_N, CAUSAL, WINDOW)
    if keep is None and not WINDOW and not NATURAL:  # blocks that all rows see need no mask
        whole = S
        if CAUSAL:
            whole = tl.minimum(S, low + 1)
        own_first = whole // BLOCK_N * BLOCK_N
        acc = grad_walk(
            rows, grad, row_lse, inner, own_k, own_v, k_strides[2], v_strides[2], None, 1,
            0, own_first, 0, query, row_ok, window, acc, scale, softcap,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, False, NATURAL, PRECISION,
        )  # fmt: skip
    own_keep = None
    if keep is not None:
        own_keep = keep + b * keep_stride
    first, last = key_range(low, high, P, P, window, BLOCK_N, CAUSAL, WINDOW)
    if no_prefix is not None:
        last = tl.where(tl.load(no_prefix + b) != 0, 0, last)
    k_base = prefix_key + b * pk_strides[0] + hk * pk_strides[1]
    v_base = prefix_value + b * pv_strides[0] + hk * pv_strides[1]
    k_stride = pk_strides[2]
    v_stride = pv_strides[2]
    shift = P
    # one loop body for both sources takes fewer registers than two
    for own in range(0, 2):
        if own == 1:
            k_base = own_k
            v_base = own_v
            k_stride = k_strides[2]
            v_stride = v_strides[2]
            first = own_first
            last = own_last
            shift = P * 0
        acc = grad_walk(
            rows, grad, row_lse, inner, k_base, v_base, k_stride, v_stride, own_keep, own,
            first, last, shift, query, row_ok, window, acc, scale, softcap,
            D, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, SOFTCAP, True, NATURAL, PRECISION,
        )  # fmt: skip
    store_tile(
        grad_q + b * gq_strides[0] + h * gq_strides[1], t, row_ok, gq_strides[2],
        cast(acc * scale, grad_q.dtype.element_ty), D, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _grad_keys_kernel(
    q, k, v, prefix_key, prefix_value, keep, no_prefix, q_offset_at, lse, grad_o, delta,
    grad_k, grad_v, grad_pk, grad_pv,
    q_strides, k_strides, v_strides, pk_strides, pv_strides, go_strides, gk_strides, gv_strides,
    gp_strides, keep_stride, q_offset, offset_stride, window, scale, softcap, B, H, H_KV, T, S, P,
    PROGRAMS_P, B_PART,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    G = H // H_KV
    of_prefix = program < PROGRAMS_P  # the prefix first, as its programs have the most rows
    if of_prefix:
        tiles = tl.cdiv(P, BLOCK_N)
        count = P
        shift = P
    else:
        program -= PROGRAMS_P
        tiles = tl.cdiv(S, BLOCK_N)
        count = S
        shift = S * 0
    n0 = program % tiles * BLOCK_N
    hk = (program // tiles % H_KV).to(tl.int64)
    part = (program // (tiles * H_KV)).to(tl.int64)  # of the batch: its rows b0 to b1
    if of_prefix:
        b0 = part * B_PART
        b1 = tl.minimum(b0 + B_PART, B)
        k_base = prefix_key + part * pk_strides[0] + hk * pk_strides[1]
        v_base = prefix_value + part * pv_strides[0] + hk * pv_strides[1]
        k_stride = pk_strides[2]
        v_stride = pv_strides[2]
    else:
        b0 = part
        b1 = part + 1
        k_base = k + part * k_strides[0] + hk * k_strides[1]
        v_base = v + part * v_strides[0] + hk * v_strides[1]
        k_stride = k_strides[2]
        v_stride = v_strides[2]
    n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    there = n < count  # [BLOCK_N]
    own_keep = None
    if keep is not None:
        own_keep = keep + part * keep_stride
    ok = kept(own_keep, n, there, of_prefix == 0)  # [BLOCK_N]
    keys = tile(k_base, n, ok, k_stride, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    values = tile(v_base, n, ok, v_stride, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    key = n - shift  # [BLOCK_N]
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # one loop over (row of the batch, head of the group)
    for turn in range(0, (b1 - b0) * G):
        b = b0 + turn // G
        h = hk * G + turn % G
        offset = offset_of(b, q_offset_at, q_offset, offset_stride)
        first = 0
        last = T
        if CAUSAL:  # rows before the tile's first key see none of its keys
            first = tl.maximum(n0 - shift - offset, 0) // BLOCK_M * BLOCK_M
        if WINDOW:
            end = tl.minimum(n0 + BLOCK_N, count) - shift - offset + window - 1
            last = tl.minimum(T, tl.maximum(end, 0))
        if no_prefix is not None:
            last = tl.where(of_prefix & (tl.load(no_prefix + b) != 0), 0, last)
        q_base = q + b * q_strides[0] + h * q_strides[1]
        go_base = grad_o + b * go_strides[0] + h * go_strides[1]
        at = (b * H + h) * T
        for t0 in range(first, last, BLOCK_M):
            t = t0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            row_ok = t < T  # [BLOCK_M]
            rows = tile(q_base, t, row_ok, q_strides[2], D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            grad = tile(go_base, t, row_ok, go_strides[2], D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            row_lse = from_natural(tl.load(lse + at + t, mask=row_ok, other=0.0), NATURAL)
            row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)  # [BLOCK_M]
            inner = tl.load(delta + at + t, mask=row_ok, other=0.0)  # [BLOCK_M]
            see = visible(
                (offset + t)[None, :], key[:, None], row_ok[None, :] & ok[:, None], window,
                CAUSAL, WINDOW,
            )  # fmt: skip
            zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            products = dot(keys, tl.trans(rows), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            grads = dot(values, tl.trans(grad), zeros, PRECISION)  # [BLOCK_N, BLOCK_M]
            p, ds = grad_scores(
                products, grads, row_lse[None, :], inner[None, :], see, scale, softcap, SOFTCAP,
                True, NATURAL,
            )  # fmt: skip
            acc_v = dot(cast(p, grad.dtype), grad, acc_v, PRECISION)
            acc_k = dot(cast(ds, rows.dtype), rows, acc_k, PRECISION)
    acc_k *= scale
    if of_prefix:
        at = part * gp_strides[0] + hk * gp_strides[1]
        dtype: tl.constexpr = grad_pk.dtype.element_ty
        store_tile(grad_pk + at, n, there, gp_strides[2], cast(acc_k, dtype), D, BLOCK_D)
        store_tile(grad_pv + at, n, there, gp_strides[2], cast(acc_v, dtype), D, BLOCK_D)
    else:
        own: tl.constexpr = grad_k.dtype.element_ty
        at_k = grad_k + part * gk_strides[0] + hk * gk_strides[1]
        at_v = grad_v + part * gv_strides[0] + hk * gv_strides[1]
        store_tile(at_k, n, there, gk_strides[2], cast(acc_k, own), D, BLOCK_D)
        store_tile(at_v, n, there, gv_strides[2], cast(acc_v, own), D, BLOCK_D)
