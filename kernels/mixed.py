"""A batch whose samples name different adapters, base product and updates in one launch:

    Y[m] = X[m] Wᵀ + bias + scale_i (X[m] A_iᵀ) B_iᵀ      i = index[m // T], no update for -1

A_i [r_i, K], B_i [N, r_i] are the parameters themselves, each of its own rank; nothing is stacked
or copied, and no table of pointers outlives the call. A tile of Y finds the adapters that its rows
name and puts their ranks side by side in *lanes*: lane j of a chunk is one row of some A_i, with a
pointer of its own. One product X · lanesᵀ beside the base product gives S for all adapters of the
tile. One product of S (zero where a row's adapter does not own the lane) with the lanes of B adds
the updates. If there are more lanes than a chunk has, X is read again for the next chunk, so the
sum of the ranks has no limit. Every tile in a row of tiles computes S again: this needs no second
launch and no exchange between programs, but each of them reads the A's of its rows (from L2).

Only the output is allocated and nothing syncs, so a launch can be captured in a CUDA graph and
``index`` can be rewritten between replays; a value out of range counts as -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    precision,
    row_stride,
)  # fmt: skip
from .launching import planned

MAX_ADAPTERS = 64  # the set of a tile's adapters is kept in the bits of an int64


@dataclass(frozen=True)
class MixedConfig:
    """Output tile [block_m, block_n], step block_k, lanes of a chunk block_r.
    ``group_m``: rows of tiles that are walked together (for L2)."""

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    block_r: int = 16
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(
            self, block_m=self.block_m, block_n=self.block_n,
            block_k=self.block_k, block_r=self.block_r,
        )  # fmt: skip
        if self.group_m < 1:
            raise ValueError(f"MixedConfig.group_m is {self.group_m}; allowed: 1 or more")

    def shared_bytes(self, itemsize: int, adapter_itemsize: int) -> int:
        """Bytes for the pipeline of X, W and A tiles and for the cast A tile.
        The compiler may need one buffer less."""
        tiles = (self.block_m + self.block_n) * itemsize + self.block_r * adapter_itemsize
        return self.block_k * (self.num_stages * tiles + self.block_r * itemsize)


def lanes_of(ranks: Sequence[int], rows: int, T: int) -> int:
    """The largest number of lanes that a tile of ``rows`` rows can need, for any index.
    With T rows for each sample it has rows of few samples."""
    samples = cdiv(rows - 1, T) + 1
    return sum(sorted(ranks)[-samples:])


def default_config(
    M: int,
    N: int,
    T: int,
    ranks: Sequence[int],
    arch: Arch,
    *,
    itemsize: int = 2,
    adapter_itemsize: int = 4,
    aligned: bool = True,
) -> MixedConfig:
    """A config with tiles as tall as the batch (at most 128 rows), and programs for the device.
    Registers limit tile and chunk, more so for rows that are not ``aligned`` on 16 bytes."""

    def programs(block_m: int, block_n: int) -> int:
        return cdiv(M, block_m) * cdiv(N, block_n)

    block_m = next(b for b in (16, 32, 64, 128) if b >= min(M, 128))
    exact = itemsize == 4  # exact fp32 products do not use the matrix unit
    if block_m == 128 and (exact or programs(128, 128) < arch.sms):
        block_m = 64
    lanes = max(16, next_pow2(lanes_of(ranks, min(M, block_m), T)))
    block_n = 128 if block_m == 128 and lanes <= 32 and aligned else 64
    while block_n > 16 and programs(block_m, block_n) < arch.sms * 3 // 4:
        block_n //= 2
    block_r = min(lanes, 32 if exact else 128 if block_m == 16 else 64)
    block_k = 128 if block_m == 16 and block_r <= 64 else 64
    if exact or (block_n == 128 and arch.shared < 160_000):
        block_k = 32
    warps = 8 if block_m > 16 or block_r == 128 else 4
    stages = 2 if exact else 3
    while True:
        config = MixedConfig(block_m, block_n, block_k, block_r, num_warps=warps, num_stages=stages)
        if config.shared_bytes(itemsize, adapter_itemsize) <= arch.shared:
            return config
        if stages > 2 and block_k <= 64:
            stages -= 1
        elif block_k > 32:
            block_k //= 2
        else:
            block_r //= 2


def rows_aligned(*ts: torch.Tensor) -> bool:
    """True when every row starts on 16 bytes, so that 16 bytes can be read at a time."""
    return all(t.data_ptr() % 16 == 0 and row_stride(t) * t.element_size() % 16 == 0 for t in ts)


@device_function
def adapter_table(As, Bs, ranks, a_strides, b_strides, scales, used, K, P: tl.constexpr):
    """Data of the adapters in the bits of ``used``: six [P] tensors, and the number of lanes.
    The tensors are the addresses of A and of B (as if their first lane were lane 0), their strides,
    scale, and the first lane after them. Integers in tuples come multiplied by 16, so that their
    values never specialise the kernel."""
    slot = tl.arange(0, P)  # [P]
    a_base, b_base = slot.to(tl.int64) * 0, slot.to(tl.int64) * 0
    a_step, b_step = a_base, a_base
    scale = slot.to(tl.float32) * 0.0  # [P]
    ends = slot * 0  # [P]
    zero = used & 0
    end = zero.to(tl.int32)
    for i in tl.static_range(P):
        rank = ranks[i] >> 4
        if a_strides is None:
            a_row, b_row = zero + K, zero + rank
        else:
            a_row, b_row = zero + (a_strides[i] >> 4), zero + (b_strides[i] >> 4)
        here = slot == i  # [P]
        a_base = tl.where(here, (As[i] - end * a_row).to(tl.int64), a_base)  # [P]
        b_base = tl.where(here, (Bs[i] - end).to(tl.int64), b_base)  # [P]
        a_step = tl.where(here, a_row, a_step)  # [P]
        b_step = tl.where(here, b_row, b_step)
        scale = tl.where(here, scales[i], scale)
        end += rank * ((used >> i) & 1).to(tl.int32)
        ends = tl.where(slot >= i, end, ends)
    return a_base, b_base, a_step, b_step, scale, ends, end


@device_function
def lanes_from(c0, ends, end, BLOCK_R: tl.constexpr):
    """(lanes from c0 on, the adapter that owns each), both [BLOCK_R]; -2 after the last lane."""
    lane = c0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    # the owner of a lane is the first adapter whose lanes end after it
    owner = tl.sum((lane[:, None] >= ends[None, :]).to(tl.int32), 1)  # [BLOCK_R]
    return lane, tl.where(lane < end, owner, -2)


@device_function
def a_lanes(c0, table, a, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr):
    """(pointers to the rows of A in the lanes from c0 on, True for used lanes), both [BLOCK_R]."""
    lane, owner = lanes_from(c0, table[5], table[6], BLOCK_R)  # both [BLOCK_R]
    at = tl.maximum(owner, 0)  # [BLOCK_R]
    start = tl.gather(table[0], at, 0).to(a.dtype) + lane * tl.gather(table[2], at, 0)  # [BLOCK_R]
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start, owner >= 0


@device_function
def add_updates(
    acc, low, c0, table, b, adapters, col, col_ok,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + S Bᵀ for the lanes from c0 on; S is ``low`` = X lanesᵀ, scaled."""
    lane, owner = lanes_from(c0, table[5], table[6], BLOCK_R)  # both [BLOCK_R]
    at = tl.maximum(owner, 0)  # [BLOCK_R]
    start = tl.gather(table[1], at, 0).to(b.dtype) + lane  # [BLOCK_R]
    b_tile = tl.load(
        start[None, :] + col.to(tl.int64)[:, None] * tl.gather(table[3], at, 0)[None, :],
        mask=col_ok[:, None] & (owner >= 0)[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    b_tile = cast(b_tile, DTYPE)
    # 0 times NaN is NaN: a B that is not finite would change rows of other adapters. It is set to 0
    # in the product, and the rows that own its lane get NaN through their S.
    finite = tl.abs(b_tile.to(tl.float32)) < float("inf")  # [BLOCK_N, BLOCK_R]
    sound = tl.min(finite.to(tl.int32), 0) > 0  # [BLOCK_R]
    factor = tl.where(sound, tl.gather(table[4], at, 0), float("nan"))  # [BLOCK_R]
    low = tl.where(adapters[:, None] == owner[None, :], low * factor[None, :], 0.0)
    b_tile = tl.where(finite, b_tile, 0.0).to(DTYPE)
    return dot(cast(low, DTYPE), tl.trans(b_tile), acc, PRECISION)


@triton.jit(do_not_specialize=["M", "T", "L"])
def _mixed_kernel(
    y, x, w, As, Bs, bias, index, ranks, a_strides, b_strides, scales,
    M, N, K, T, L, x_stride, w_n_stride, w_k_stride,
    P: tl.constexpr, ONE_CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
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
    row64, col64 = row.to(tl.int64), col.to(tl.int64)  # [BLOCK_M], [BLOCK_N]
    dtype = x.dtype.element_ty

    adapters = tl.load(index + row // T, mask=row_ok, other=-1)  # [BLOCK_M]
    known = (adapters >= 0) & (adapters < L)  # [BLOCK_M]
    adapters = tl.where(known, adapters, -1)
    bits = known.to(tl.int64) << tl.where(known, adapters, 0).to(tl.int64)  # [BLOCK_M]
    used = tl.reduce_or(bits, 0)
    table = adapter_table(As, Bs, ranks, a_strides, b_strides, scales, used, K, P)
    a_lane, lane_ok = a_lanes(0, table, As[0], BLOCK_R, ALIGNED)  # both [BLOCK_R]

    x_row = x + row64[:, None] * x_stride  # [BLOCK_M, 1]
    w_col = w + col64[None, :] * w_n_stride  # [1, BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < K  # [BLOCK_K]
        x_tile = tl.load(x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        w_tile = tl.load(
            w_col + k.to(tl.int64)[:, None] * w_k_stride,
            mask=k_ok[:, None] & col_ok[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        a_tile = tl.load(
            a_lane[None, :] + k[:, None], mask=k_ok[:, None] & lane_ok[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_R]
        acc = dot(x_tile, w_tile, acc, PRECISION)
        low = dot(x_tile, cast(a_tile, dtype), low, PRECISION)
    acc = add_updates(acc, low, 0, table, Bs[0], adapters, col, col_ok, dtype, BLOCK_R, PRECISION)
    if not ONE_CHUNK:
        for c0 in tl.range(BLOCK_R, table[6], BLOCK_R, num_stages=1):
            a_lane, lane_ok = a_lanes(c0, table, As[0], BLOCK_R, ALIGNED)  # both [BLOCK_R]
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
                k_ok = k < K  # [BLOCK_K]
                x_tile = tl.load(
                    x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_K]
                a_tile = tl.load(
                    a_lane[None, :] + k[:, None],
                    mask=k_ok[:, None] & lane_ok[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_R]
                low = dot(x_tile, cast(a_tile, dtype), low, PRECISION)
            acc = add_updates(
                acc, low, c0, table, Bs[0], adapters, col, col_ok, dtype, BLOCK_R, PRECISION
            )
    if bias is not None:
        acc += tl.load(bias + col, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + row64[:, None] * N + col[None, :],
        cast(acc, dtype),
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
) -> list[Launch]:
    """The launch that fills ``y`` [M, N] (contiguous).
    The arguments are checked already; A and B have unit stride along their rows."""
    (M, K), N = x.shape, w.shape[0]
    T = M // index.shape[0]
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
    args = (
        y, x, w, tuple(a_all), tuple(b_all), bias, index, tuple(16 * r for r in ranks),
        None if dense else tuple(16 * row_stride(a) for a in a_all),
        None if dense else tuple(16 * row_stride(b) for b in b_all),
        (*map(float, scales), *(0.0 for _ in none)),
        M, N, K, T, len(As), row_stride(x), w.stride(0), w.stride(1),
    )  # fmt: skip
    meta = dict(
        P=P, ONE_CHUNK=lanes_of(ranks, min(M, config.block_m), T) <= config.block_r,
        ALIGNED=rows_aligned(*a_all),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m, PRECISION=precision(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    return [Launch(_mixed_kernel, grid, args, meta)]


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
    """Y [M, N] in x's dtype, in one launch; row m gets the update of adapter index[m // T].

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
        if config is None:
            ranks = [a.shape[0] for a in As if a is not None]
            wide = max((a.element_size() for a in As if a is not None), default=x.element_size())
            config = default_config(
                M, N, M // index.shape[0], ranks, arch_of(x.device),
                itemsize=x.element_size(), adapter_itemsize=wide,
                aligned=rows_aligned(x, *(a for a in As if a is not None)),
            )  # fmt: skip
        for launch in plan_mixed(y, x, w, As, Bs, scales, index.contiguous(), bias, config):
            launch.run()
    return y
