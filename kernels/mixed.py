"""A batch whose samples name different adapters, in two launches:

    Y[m] = X[m] Wᵀ + bias + scale_i (X[m] A_iᵀ) B_iᵀ      i = index[m // T], no update for -1

A_i [r_i, K], B_i [N, r_i] are the parameters themselves, each of its own rank; nothing is stacked
or copied, and no table of pointers outlives the call. S of each row comes from
:mod:`.mixed_segments`, which sorts the rows by adapter on the device and reads each A once. A tile
of Y adds S B_iᵀ for the adapters that its rows name, their ranks side by side.

Where tiles of Y fill the device, the second launch makes them whole: it streams X and W, and waits
for S at the end. For few rows there are too few tiles, and narrow ones would read X once for each.
Then tiles are wide, and K is split: the first launch leaves parts of X Wᵀ beside those of S, and
the second, which waits for them, adds them in their order. Parts are fp32; for bf16 they are fp16,
with a power of two for each row of a tile, unless torch's switch is off
(``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``). On sm_90 and later the
second launch is a dependent one: its programs start while the first launch runs. The first launch
is an ordinary one, as the work before it may have written W or X.

Only the output and scratch memory are allocated and nothing syncs, so the launches can be captured
in a CUDA graph and ``index`` can be rewritten between replays; a value out of range counts as -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from . import checks
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    device_function,
    dot,
    next_pow2,
    parts_dtype,
    precision,
    row_stride,
    starts_early,
)  # fmt: skip
from .launching import planned
from .mixed_config import MixedConfig, default_config, most_tiles
from .mixed_segments import (
    ENTRY,
    _segment_kernel,
    adapters_of,
    add_updates,
    shrink_tile,
)  # fmt: skip

MAX_ADAPTERS = checks.MAX_ADAPTERS


def rows_aligned(*ts: torch.Tensor) -> bool:
    """True when every row starts on 16 bytes, so that 16 bytes can be read at a time."""
    return all(t.data_ptr() % 16 == 0 and row_stride(t) * t.element_size() % 16 == 0 for t in ts)


@device_function
def product(
    x, w, row, col, row_ok, col_ok, first, last, x_stride, w_n_stride, w_k_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X Wᵀ [BLOCK_M, BLOCK_N] over the columns first to last of X and W."""
    x_row = x + row.to(tl.int64)[:, None] * x_stride  # [BLOCK_M, 1]
    w_col = w + col.to(tl.int64)[None, :] * w_n_stride  # [1, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < last  # [BLOCK_K]
        x_tile = tl.load(x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w_tile = tl.load(
            w_col + k.to(tl.int64)[:, None] * w_k_stride,
            mask=k_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        acc = dot(x_tile, w_tile, acc, PRECISION)
    return acc


@device_function
def shortened(acc):
    """(acc [M, N] in fp16, factors [M]): row m of acc is about factors[m] times that of the first.

    The factor is the power of two with which the row's largest finite number fills 15 bits. A row's
    numbers below 2**-29 of it lose digits; infinite ones and NaN stay.
    """
    size = tl.abs(acc)  # [M, N]
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 1)  # [M]
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)  # [M], biased by 127
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # [M]
    return (acc * up[:, None]).to(tl.float16), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "T", "L", "samples", "LOW_SPLITS", "CHUNKS", "LOW_PROGRAMS"])
def _parts_kernel(
    parts, factors, w, low, table, x, As, Bs, index, ranks, a_strides, b_strides, scales,
    M, N, K, T, L, samples, x_stride, w_n_stride, w_k_stride, width,
    K_PART, LOW_PART, LOW_SPLITS, CHUNKS, LOW_PROGRAMS,
    P: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, LOW_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of S in the first LOW_PROGRAMS programs, parts [splits, M, N] of X Wᵀ in the others.

    ``factors`` [splits, tiles of N, M] fp32 if the parts are fp16, else None.
    """
    if EARLY:  # the programs of the next launch may start, and wait for this grid's end
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < LOW_PROGRAMS:
        shrink_tile(
            pid, low, table, x, As, Bs, index, ranks, a_strides, b_strides, scales,
            M, K, T, L, samples, x_stride, width, LOW_PART, LOW_SPLITS, CHUNKS,
            P, SAMPLES, ALIGNED, BLOCK_S, LOW_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        pid -= LOW_PROGRAMS
        tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
        part = pid // (tiles_m * tiles_n)
        tile_n = pid // tiles_m % tiles_n
        row = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        row_ok, col_ok = row < M, col < N  # [BLOCK_M], [BLOCK_N]
        first = part * K_PART
        acc = product(
            x, w, row, col, row_ok, col_ok, first, tl.minimum(first + K_PART, K),
            x_stride, w_n_stride, w_k_stride, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        out = parts + (part.to(tl.int64) * M + row.to(tl.int64)[:, None]) * N + col[None, :]
        if factors is not None:
            acc, factor = shortened(acc)
            at = factors + (part * tiles_n + tile_n).to(tl.int64) * M + row  # [BLOCK_M]
            tl.store(at, factor, mask=row_ok)
        tl.store(out, acc, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit(do_not_specialize=["M", "T", "L"])
def _finish_kernel(
    y, parts, factors, low, table, b, bias, index, M, N, T, L, width,
    P: tl.constexpr, SPLITS: tl.constexpr, PART_N: tl.constexpr, LOW_SPLITS: tl.constexpr,
    B_ALIGNED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_ok, col_ok = row < M, col < N  # [BLOCK_M], [BLOCK_N]
    at = row.to(tl.int64)[:, None] * N + col[None, :]  # [BLOCK_M, BLOCK_N]
    ok = row_ok[:, None] & col_ok[None, :]  # [BLOCK_M, BLOCK_N]
    adapters = adapters_of(index, row, row_ok, T, L)  # [BLOCK_M]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if bias is not None:
        acc += tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    part = parts + at
    if factors is not None:  # those of the tile of PART_N columns that has this one
        tiles_n = tl.cdiv(N, PART_N)
        tile_n = tl.program_id(0) // tiles_m * BLOCK_N // PART_N
        factor = factors + tile_n.to(tl.int64) * M + row  # [BLOCK_M]
    for _ in tl.static_range(SPLITS):
        here = tl.load(part, mask=ok, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        if factors is not None:
            here *= tl.load(factor, mask=row_ok, other=0.0)[:, None]
            factor += tiles_n.to(tl.int64) * M
        acc += here
        part += M.to(tl.int64) * N
    acc = add_updates(
        acc, low, table, b, adapters, row, col, col_ok, M, width,
        P, LOW_SPLITS, y.dtype.element_ty, B_ALIGNED, BLOCK_L, PRECISION,
    )  # fmt: skip
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "T", "L"])
def _product_kernel(
    y, w, low, table, x, b, bias, index,
    M, N, K, T, L, x_stride, w_n_stride, w_k_stride, width,
    P: tl.constexpr, LOW_SPLITS: tl.constexpr, B_ALIGNED: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # GROUP_M rows of tiles are walked column by column, so that W tiles are read again from L2
    pid = tl.program_id(0)
    band = pid // (GROUP_M * tiles_n)
    in_band = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    pid_m = band * GROUP_M + (pid % (GROUP_M * tiles_n)) % in_band
    pid_n = (pid % (GROUP_M * tiles_n)) // in_band
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    col = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    row_ok, col_ok = row < M, col < N  # [BLOCK_M], [BLOCK_N]
    acc = product(
        x, w, row, col, row_ok, col_ok, 0, K, x_stride, w_n_stride, w_k_stride,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    adapters = adapters_of(index, row, row_ok, T, L)  # [BLOCK_M]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    acc = add_updates(
        acc, low, table, b, adapters, row, col, col_ok, M, width,
        P, LOW_SPLITS, y.dtype.element_ty, B_ALIGNED, BLOCK_L, PRECISION,
    )  # fmt: skip
    tl.store(
        y + row.to(tl.int64)[:, None] * N + col[None, :],
        cast(acc, y.dtype.element_ty),
        mask=row_ok[:, None] & col_ok[None, :],
    )


def plan_mixed(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    index: torch.Tensor,
    bias: torch.Tensor | None,
    config: MixedConfig,
    arch: Arch,
) -> list[Launch]:
    """The launches that fill ``y`` [M, N] (contiguous).

    The arguments are checked already; A and B have unit stride along their rows. There are two, or
    one if no adapter has weights and K is not split.
    """
    (M, K), N, samples = x.shape, w.shape[0], index.shape[0]
    T, c = M // samples, config
    P = next_pow2(max(len(As), 1))  # one kernel for 5 to 8 adapters
    none = (None,) * (P - len(As))
    some_a = next((a for a in As if a is not None), x)
    some_b = next((b for b in Bs if b is not None), x)
    a_all = [some_a if a is None else a for a in (*As, *none)]
    b_all = [some_b if b is None else b for b in (*Bs, *none)]
    ranks = [0 if a is None else a.shape[0] for a in (*As, *none)]
    dense = all(
        not r or (row_stride(a) == K and row_stride(b) == r)
        for r, a, b in zip(ranks, a_all, b_all, strict=True)
    )
    width = cdiv(max(ranks), 16) * 16
    L = len(As) if width else 0  # without any weights every row is one of the base alone
    # parts are whole steps of a program
    k_part = max(1, cdiv(cdiv(K, c.split_k), c.block_k)) * c.block_k
    low_part = max(1, cdiv(cdiv(K, c.low_split), c.low_k)) * c.low_k
    splits, low_splits = max(1, cdiv(K, k_part)), max(1, cdiv(K, low_part))
    chunks = cdiv(width, c.block_r)
    lows = most_tiles(M, L, samples, c.block_s) * low_splits * chunks
    low = y.new_empty((low_splits, M, width), dtype=torch.float32)
    table = y.new_empty((P, ENTRY.value), dtype=torch.int64)
    early = starts_early(x, arch)
    whole_16 = all(r * some_b.element_size() % 16 == 0 for r in ranks)
    wait: dict[str, Any] = dict(
        P=P, LOW_SPLITS=low_splits, B_ALIGNED=whole_16 and rows_aligned(*b_all), EARLY=early
    )
    dependent: dict[str, Any] = dict(launch_pdl=True) if early else {}

    operands = (
        low, table, x, tuple(a_all), tuple(b_all), index, tuple(16 * r for r in ranks),
        None if dense else tuple(16 * row_stride(a) for a in a_all),
        None if dense else tuple(16 * row_stride(b) for b in b_all),
        (*map(float, scales), *(0.0 for _ in none)),
    )  # fmt: skip
    sort = dict(
        P=P, SAMPLES=16 if samples <= 16 else 128, ALIGNED=rows_aligned(*a_all), EARLY=early,
        BLOCK_S=c.block_s, BLOCK_R=c.block_r, PRECISION=precision(x.dtype),
    )  # fmt: skip
    tile = dict(BLOCK_M=c.block_m, BLOCK_L=c.block_l, PRECISION=precision(x.dtype))
    shape = dict(num_warps=c.num_warps, num_stages=c.num_stages)
    strides = (row_stride(x), w.stride(0), w.stride(1))
    tiles_m, tiles_n = cdiv(M, c.block_m), cdiv(N, c.block_n)
    if splits > 1:
        dtype = parts_dtype(x.dtype)
        parts = y.new_empty((splits, M, N), dtype=dtype)
        factors = None
        if dtype != torch.float32:
            factors = y.new_empty((splits, tiles_n, M), dtype=torch.float32)
        finish_n = min(c.finish_n, c.block_n)  # so that it is of one tile
        first = Launch(
            _parts_kernel, (lows + tiles_m * tiles_n * splits,),
            (parts, factors, w, *operands, M, N, K, T, L, samples, *strides, width,
             k_part, low_part, low_splits, chunks, lows),
            sort | shape | dict(BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
                                LOW_K=c.low_k),
        )  # fmt: skip
        last = Launch(
            _finish_kernel, (tiles_m * cdiv(N, finish_n),),
            (y, parts, factors, low, table, some_b, bias, index, M, N, T, L, width),
            tile | wait | dependent
            | dict(SPLITS=splits, PART_N=c.block_n, BLOCK_N=finish_n, num_warps=8, num_stages=1),
        )  # fmt: skip
        return [first, last]
    segments = Launch(
        _segment_kernel, (lows,),
        (*operands, M, K, T, L, samples, row_stride(x), width, low_part, low_splits, chunks),
        sort | dict(BLOCK_K=c.low_k, num_warps=4, num_stages=c.num_stages),
    )  # fmt: skip
    if not L:  # what ran before this launch may have written W
        wait, dependent = wait | dict(EARLY=False), {}
    whole = Launch(
        _product_kernel, (tiles_m * tiles_n,),
        (y, w, low, table, x, some_b, bias, index, M, N, K, T, L, *strides, width),
        tile | wait | dependent | shape
        | dict(BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP_M=c.group_m),
    )  # fmt: skip
    return [segments, whole] if L else [whole]


def _check_adapters(
    x: torch.Tensor, N: int, As: list[torch.Tensor | None], Bs: list[torch.Tensor | None]
) -> None:
    for i, (a, b) in enumerate(zip(As, Bs, strict=True)):
        if a is None or b is None:
            if (a is None) != (b is None):
                raise ValueError(f"As[{i}] and Bs[{i}]: allowed: both, or neither")
            continue
        checks.matrix(f"As[{i}]", a)
        checks.matrix(f"Bs[{i}]", b)
        checks.rank(f"As[{i}]", a.shape[0])
        checks.shape(f"As[{i}]", a, (a.shape[0], x.shape[1]), "x has K columns")
        checks.shape(f"Bs[{i}]", b, (N, a.shape[0]), f"[rows of w, rows of As[{i}]]")
        checks.adapter_dtype(f"As[{i}]", a, x.dtype)
        checks.adapter_dtype(f"Bs[{i}]", b, x.dtype)


def _alike(ts: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``ts`` with unit stride along rows and one dtype, as the kernel has one type of pointer.
    Only tensors that differ are copied, and a model's adapters do not differ."""
    mixed = len({t.dtype for t in ts if t is not None}) > 1
    return [t if t is None else checks.rows("adapter", t.float() if mixed else t) for t in ts]


@planned("scales")
def mixed(
    x: torch.Tensor,
    w: torch.Tensor,
    As: Sequence[torch.Tensor | None],
    Bs: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    index: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    config: MixedConfig | None = None,
) -> torch.Tensor:
    """Y [M, N] in x's dtype, in two launches; row m gets the update of adapter index[m // T].

    x [M, K] fp16/bf16/fp32, any row stride, M = T * samples, with the T rows of a sample together;
    w [N, K] x's dtype, any strides (for Conv1D's [K, N] pass its transpose); As[i] [r_i, K], Bs[i]
    [N, r_i] fp32 or x's dtype, r_i from 1 to 256, up to 64 of them, None for an adapter without
    weights in this layer; scales[i] the factor of update i; index int32 [samples], from -1 (base
    only) to len(As) - 1, where values out of range count as -1; bias [N]. Errors: TypeError,
    ValueError, before any launch.
    """
    x = checks.rows("x", x)
    M, K = x.shape
    checks.matrix("w", w)
    N = w.shape[0]
    checks.shape("w", w, (N, K), "[N, K], K as x")
    if w.dtype != x.dtype:
        raise TypeError(f"w has dtype {w.dtype}; allowed: {x.dtype}, that of x")
    As, Bs, scales = list(As), list(Bs), list(scales)
    if not len(As) == len(Bs) == len(scales) <= MAX_ADAPTERS:
        raise ValueError(
            f"As, Bs and scales have {len(As)}, {len(Bs)} and {len(scales)} entries; "
            f"allowed: equal counts, at most {MAX_ADAPTERS}"
        )
    _check_adapters(x, N, As, Bs)
    if index.dtype != torch.int32:
        raise TypeError(f"index has dtype {index.dtype}; allowed: torch.int32")
    if index.dim() != 1 or (M % index.shape[0] if index.shape[0] else M):
        raise ValueError(
            f"index has shape {tuple(index.shape)}; "
            f"allowed: one entry for each sample, a divisor of x's {M} rows"
        )
    if bias is not None:
        checks.shape("bias", bias, (N,), "w has N rows")
        bias = bias.contiguous()
    checks.device(
        x=x, w=w, bias=bias, index=index,
        **{f"As[{i}]": a for i, a in enumerate(As)}, **{f"Bs[{i}]": b for i, b in enumerate(Bs)},
    )  # fmt: skip
    y = x.new_empty((M, N))
    if y.numel():
        As, Bs = _alike(As), _alike(Bs)
        arch = arch_of(x.device)
        if config is None:
            ranks = [a.shape[0] for a in As if a is not None]
            wide = max((a.element_size() for a in As if a is not None), default=x.element_size())
            config = default_config(
                M, N, K, M // index.shape[0], ranks, arch,
                itemsize=x.element_size(), adapter_itemsize=wide,
                part_itemsize=parts_dtype(x.dtype).itemsize,
                aligned=rows_aligned(x, *(a for a in As if a is not None)),
            )  # fmt: skip
        for launch in plan_mixed(y, x, w, As, Bs, scales, index.contiguous(), bias, config, arch):
            launch.run()
    return y
