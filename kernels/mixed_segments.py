"""S of a batch whose samples name different adapters, with each A read once.

    S[m] = scale_i X[m] A_iᵀ      i = index[m // T], no row of S for -1

The rows are sorted by adapter on the device: the rows of one adapter, in their order, are its
*segment*, and a program takes a tile of a segment, a part of K and a chunk of ranks. How many tiles
a segment has depends on ``index``, so the grid is made for the worst case, the programs count the
samples of each adapter to find their work, and those without any leave at once. Nothing of this is
known to the host, so ``index`` can be rewritten between replays of a CUDA graph.

S is left in fp32 parts over K [LOW_SPLITS, M, width], which whoever reads it adds in their order;
``width`` is the largest rank, rounded up to a multiple of 16.
Beside it stands a table with the address of B_i, its row stride and the rank of each adapter that
is used, so that the next launch has no argument for each adapter. The table is written in every
call, and lives as long as the call's other scratch memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import cast, device_function, dot

# int64 values of the table for an adapter: address of B, stride of its rows, rank
ENTRY = tl.constexpr(3)


@device_function
def adapters_of(index, row, row_ok, T, L):
    """The adapter of each row [BLOCK]; -1 for none, which a value out of range also means."""
    chosen = tl.load(index + row // T, mask=row_ok, other=-1)  # [BLOCK]
    return tl.where((chosen >= 0) & (chosen < L), chosen, -1)


@device_function
def find_rows(
    tile, index, samples, T, L,
    P: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(adapter, True for its first tile, rows [BLOCK_S], True for rows that are there [BLOCK_S]).

    ``tile`` counts through the tiles of all segments. After the last one there are no rows, and the
    adapter is P. The sort is stable and by counting, SAMPLES entries of ``index`` at a time.
    """
    slot = tl.arange(0, P)  # [P]
    counts = slot * 0
    for s0 in range(0, samples, SAMPLES):
        sample = s0 + tl.arange(0, SAMPLES)  # [SAMPLES]
        chosen = tl.load(index + sample, mask=sample < samples, other=-1)  # [SAMPLES]
        counts += tl.sum((chosen[None, :] == slot[:, None]).to(tl.int32), 1)
    rows = tl.where(slot < L, counts, 0) * T  # [P]
    tiles = (rows + (BLOCK_S - 1)) // BLOCK_S  # [P]
    ends = tl.cumsum(tiles, 0)  # [P]
    # a tile is of the first adapter whose tiles end after it
    adapter = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(slot == adapter, ends - tiles, 0), 0)
    length = tl.sum(tl.where(slot == adapter, rows, 0), 0)
    at = (tile - before) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    wanted = at // T  # [BLOCK_S], counted through the adapter's samples
    found = at * 0
    passed = tile * 0
    for s0 in range(0, samples, SAMPLES):
        sample = s0 + tl.arange(0, SAMPLES)  # [SAMPLES]
        chosen = tl.load(index + sample, mask=sample < samples, other=-1)  # [SAMPLES]
        mine = (chosen == adapter).to(tl.int32)
        place = passed + tl.cumsum(mine, 0) - mine  # [SAMPLES]
        here = (mine > 0)[None, :] & (place[None, :] == wanted[:, None])  # [BLOCK_S, SAMPLES]
        found += tl.sum(tl.where(here, sample[None, :], 0), 1)
        passed += tl.sum(mine, 0)
    return adapter, tile == before, found * T + at % T, at < length


@device_function
def shrink_tile(
    pid, low, table, x, As, Bs, index, ranks, a_strides, b_strides, scales,
    M, K, T, L, samples, x_stride, width, LOW_PART, LOW_SPLITS, CHUNKS,
    P: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of S for a tile of a segment and BLOCK_R ranks.

    Integers in tuples come multiplied by 16, so that their values never specialise the kernel.
    """
    tile = pid // (LOW_SPLITS * CHUNKS)
    part = pid // CHUNKS % LOW_SPLITS
    r0 = pid % CHUNKS * BLOCK_R
    adapter, is_first, row, row_ok = find_rows(
        tile, index, samples, T, L, P, SAMPLES, BLOCK_S
    )  # the last two are [BLOCK_S]

    zero = adapter.to(tl.int64) * 0
    a_base, b_base, a_step, b_step, rank = zero, zero, zero, zero, zero
    scale = adapter.to(tl.float32) * 0.0
    for i in tl.static_range(P):
        here = adapter == i
        if a_strides is None:
            a_row, b_row = zero + K, zero + (ranks[i] >> 4)
        else:
            a_row, b_row = zero + (a_strides[i] >> 4), zero + (b_strides[i] >> 4)
        a_base = tl.where(here, As[i].to(tl.int64), a_base)
        b_base = tl.where(here, Bs[i].to(tl.int64), b_base)
        a_step, b_step = tl.where(here, a_row, a_step), tl.where(here, b_row, b_step)
        rank = tl.where(here, zero + (ranks[i] >> 4), rank)
        scale = tl.where(here, scales[i], scale)
    if is_first & (part == 0) & (r0 == 0) & (adapter < P):
        entry = table + adapter * ENTRY
        tl.store(entry, b_base)
        tl.store(entry + 1, b_step)
        tl.store(entry + 2, rank)

    if r0 < rank:  # 0 without an adapter
        a = a_base.to(As[0].dtype)
        if ALIGNED:  # then 16 bytes are read at a time
            a = tl.multiple_of(a, 16)
            a_step = tl.multiple_of(a_step, 128 // As[0].dtype.element_ty.primitive_bitwidth)
        r = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        r_ok = r < rank  # [BLOCK_R]
        x_row = x + row.to(tl.int64)[:, None] * x_stride  # [BLOCK_S, 1]
        a_lane = a + r.to(tl.int64)[None, :] * a_step  # [1, BLOCK_R]
        first = part * LOW_PART
        last = tl.minimum(first + LOW_PART, K)
        acc = tl.zeros((BLOCK_S, BLOCK_R), tl.float32)
        for k0 in range(first, last, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            k_ok = k < last  # [BLOCK_K]
            x_tile = tl.load(x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            a_tile = tl.load(
                a_lane + k[:, None], mask=k_ok[:, None] & r_ok[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_R]
            acc = dot(x_tile, cast(a_tile, x_tile.dtype), acc, PRECISION)
        out = low + (part.to(tl.int64) * M + row.to(tl.int64)[:, None]) * width + r[None, :]
        # width is a multiple of 16, so with zeros after the last rank stores are 16 bytes wide
        tl.store(out, acc * scale, mask=row_ok[:, None] & (r < width)[None, :])


@device_function
def add_updates(
    acc, low, table, b, adapters, row, col, col_ok, M, width,
    P: tl.constexpr, LOW_SPLITS: tl.constexpr, DTYPE: tl.constexpr, B_ALIGNED: tl.constexpr,
    BLOCK_L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + S[m] B_iᵀ for the adapter i of each row.

    The ranks of the adapters that these rows name stand side by side in *lanes*, so that BLOCK_L of
    them are loaded at once and take one product. A row of S is zero in the lanes of other adapters.
    ``b`` is any of the B, for its type.
    """
    slot = tl.arange(0, P)  # [P]
    used = tl.max((adapters[None, :] == slot[:, None]).to(tl.int32), 1) > 0  # [P]
    entry = table + slot * ENTRY  # [P]
    rank = tl.load(entry + 2, mask=used, other=0).to(tl.int32)  # [P]
    ends = tl.cumsum(rank, 0)  # [P]
    first = ends - rank  # [P]
    size: tl.constexpr = b.dtype.element_ty.primitive_bitwidth // 8
    # as if an adapter's first lane were lane 0
    base = tl.load(entry, mask=used, other=0) - first.to(tl.int64) * size  # [P]
    step = tl.load(entry + 1, mask=used, other=0)  # [P]
    lanes = tl.sum(rank, 0)
    row64, col64 = row.to(tl.int64), col.to(tl.int64)  # [BLOCK_M], [BLOCK_N]
    for c0 in tl.range(0, lanes, BLOCK_L, num_stages=1):
        lane = c0 + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        # a lane is of the first adapter whose lanes end after it
        owner = tl.sum((lane[:, None] >= ends[None, :]).to(tl.int32), 1)  # [BLOCK_L]
        at = tl.minimum(owner, P - 1)  # [BLOCK_L]
        b_lane = tl.gather(base, at, 0).to(b.dtype) + lane  # [BLOCK_L]
        b_at = b_lane[None, :] + col64[:, None] * tl.gather(step, at, 0)[None, :]
        b_ok = col_ok[:, None] & (lane < lanes)[None, :]  # [BLOCK_N, BLOCK_L]
        if B_ALIGNED:  # then 16 bytes are read at a time
            b_at = tl.max_contiguous(tl.multiple_of(b_at, (1, 16)), (1, 16 // size))
            b_ok = tl.max_constancy(b_ok, (1, 16 // size))
        b_tile = cast(tl.load(b_at, mask=b_ok, other=0.0), DTYPE)  # [BLOCK_N, BLOCK_L]
        mine = adapters[:, None] == owner[None, :]  # [BLOCK_M, BLOCK_L]
        s_lane = lane - tl.gather(first, at, 0)  # [BLOCK_L]
        if B_ALIGNED:
            s_lane = tl.max_contiguous(tl.multiple_of(s_lane, 4), 4)
            mine = tl.max_constancy(mine, (1, 4))
        s_at = low + row64[:, None] * width + s_lane[None, :]  # [BLOCK_M, BLOCK_L]
        s = tl.zeros((acc.shape[0], BLOCK_L), tl.float32)
        for _ in tl.static_range(LOW_SPLITS):
            s += tl.load(s_at, mask=mine, other=0.0)
            s_at += M.to(tl.int64) * width
        # 0 times NaN is NaN: a B that is not finite would change rows of other adapters. It is set
        # to 0 in the product, and the rows that own its lane get NaN through their S.
        finite = tl.abs(b_tile.to(tl.float32)) < float("inf")  # [BLOCK_N, BLOCK_L]
        sound = tl.min(finite.to(tl.int32), 0) > 0  # [BLOCK_L]
        s = tl.where(mine, tl.where(sound[None, :], s, float("nan")), 0.0)
        b_tile = tl.where(finite, b_tile, 0.0).to(DTYPE)
        acc = dot(cast(s, DTYPE), tl.trans(b_tile), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "T", "L", "samples", "LOW_SPLITS", "CHUNKS"])
def _segment_kernel(
    low, table, x, As, Bs, index, ranks, a_strides, b_strides, scales,
    M, K, T, L, samples, x_stride, width, LOW_PART, LOW_SPLITS, CHUNKS,
    P: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # the programs of the next launch may start: they stream W, and wait for this grid's end
        tl.extra.cuda.gdc_launch_dependents()
    shrink_tile(
        tl.program_id(0), low, table, x, As, Bs, index, ranks, a_strides, b_strides, scales,
        M, K, T, L, samples, x_stride, width, LOW_PART, LOW_SPLITS, CHUNKS,
        P, SAMPLES, ALIGNED, BLOCK_S, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip
