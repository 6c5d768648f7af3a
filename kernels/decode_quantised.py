"""Few rows on a quantised W: Y = X Wᵀ + scale * (X Aᵀ) Bᵀ + bias for M <= 64, alone or for a group.

As in :mod:`.decode` there are two launches: one makes S of all projections, and the programs of the
other stream their rows of one W, packed, and add S Bᵀ at the end; they start while the first one
runs. A tile of W becomes numbers in registers (:mod:`.quantised_tile`), in X's dtype, so that the
products are those of the dense weight: device memory gives the packed bytes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    padded,
    precision,
    rank_end,
    row_stride,
    starts_early,
)
from .decode import HELD_RANK, MOST_PARTS, check_beside, dense_rows
from .decode_shrink import plan_parts
from .decode_tile import given_s
from .flight import stages
from .launching import planned
from .quantised import Layout, Quantised, checked
from .quantised_tile import loadable, operands, quantised_tile

MAX_ROWS = 64


@dataclass(frozen=True)
class DecodeQuantisedConfig:
    """Outputs of a program (block_n), the part of K that it reads at a time (block_k), and the
    parts of K in the launch that makes S (split_k)."""

    block_n: int = 16
    block_k: int = 512
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 2

    def __post_init__(self) -> None:
        checks.blocks(self, low=8, block_n=self.block_n)
        checks.blocks(self, block_k=self.block_k)
        if not 1 <= self.split_k <= MOST_PARTS:
            raise ValueError(
                f"DecodeQuantisedConfig.split_k is {self.split_k}; allowed: 1 to {MOST_PARTS}"
            )


def takes_all_registers(M: int, f: Layout, group: int, arch: Arch) -> bool:
    """True where threads may have as many registers as a program of its warps can give them.

    Left alone, NVIDIA's assembler spills a few of them where that lets one more program run on a
    multiprocessor. It does so in groups, whose projections have code each, for layouts with zero
    points or e4m3 scales: these take registers beside the numbers. None spills on sm_80, nor of
    several rows where products are asynchronous (sm_90, sm_100): there programs stay smaller.
    """
    crowded = group > 1 and (f.zero_per > 1 or f.scale == "e4m3")
    spills = arch.capability >= 86 and (M == 1 or arch.capability // 10 not in (9, 10))
    return crowded and spills and torch.version.hip is None


def has_table(M: int, f: Layout, arch: Arch) -> bool:
    """True for one row and numbers from a table, for which threads are told how many registers.

    Those of three programs, or all with nested statistics, which take more (Triton 3.6). Left
    alone, Triton 3.9's assembler spills some from sm_90 on; told of a limit it does not.
    """
    return M == 1 and f.number == "code" and arch.capability >= 90


def registers(num_warps: int, programs: int = 1) -> int:
    """The most that a thread can have: 65536 on a multiprocessor, in eights, and 255 each."""
    return min(255, 65536 // (32 * num_warps * programs) // 8 * 8)


def default_config(
    M: int, Ns: Sequence[int], K: int, w: Quantised, arch: Arch, itemsize: int = 2
) -> DecodeQuantisedConfig:
    """A tile of 8192 numbers for one row, or 4096: of a byte each, or for several rows.

    It is as tall as leaves three programs for each multiprocessor (one row), or one.
    Every program reads all of X, which for several rows soon is more than W: few programs are
    better then. Tiles are taller where words run along n, as a row of them is one access, and
    smaller in act-order, where each number has a scale of its own.
    """
    one, many, f = M == 1, M > 16, w.layout
    heights, wanted = ([32, 16, 8], 3.0) if one else ([64, 32, 16], 0.9)
    if f.along == "n":
        heights = [128, 64]

    def programs(height: int) -> int:
        return sum(cdiv(n, height) for n in Ns)

    block_n = next((n for n in heights if programs(n) >= wanted * arch.sms), heights[-1])
    size = 8192 if one and f.per > 1 else 4096
    size = size // 4 if w.groups is not None else size
    if not one and (f.scale == "nested" or itemsize == 4):
        size //= 2  # registers
    block_k = max(32, min(64 if many else size, size // block_n, next_pow2(K)))
    tile = block_n * block_k * w.bits.element_size() // f.per
    beside = block_k * itemsize * (1 if one else max(16, next_pow2(M)))
    if w.groups is not None:
        beside += block_n * block_k * 8
    count = programs(block_n)
    most = 2 if one and takes_all_registers(M, f, len(Ns), arch) else 4
    resident = max(1, min(most, cdiv(count, arch.sms)))
    return DecodeQuantisedConfig(
        block_n=block_n,
        block_k=block_k,
        num_stages=stages(arch, count, tile, beside, resident, least=4, most=8),
        split_k=min(MOST_PARTS, cdiv(K, 2048 if one else 1024)),
    )


@device_function
def one_row(
    y, x, w, b, s, bias, tile, N, K, R, part_stride, b_n_stride, b_r_stride,
    LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK_END, PARTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    n_ok = n < N  # [BLOCK_N]
    dtype = x.dtype.element_ty
    out = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        xs = tl.load(x + k, mask=k < K, other=0.0)  # [BLOCK_K]
        ws = quantised_tile(w, tile * BLOCK_N, k0, N, K, dtype, LAYOUT, BLOCK_N, BLOCK_K)
        out += tl.sum(ws.to(tl.float32) * xs.to(tl.float32)[None, :], 1)
    if bias is not None:
        out += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    b_row = b + n.to(tl.int64)[:, None] * b_n_stride  # [BLOCK_N, 1]
    for r0 in tl.range(0, RANK_END, BLOCK_R, num_stages=1):
        rank = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        low = cast(given_s(s + rank, part_stride, PARTS, rank < R), dtype).to(tl.float32)
        b_tile = tl.load(
            b_row + rank[None, :] * b_r_stride, mask=n_ok[:, None] & (rank < R)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_R]
        out += tl.sum(cast(b_tile, dtype).to(tl.float32) * low[None, :], 1)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n_ok)


@device_function
def few_rows(
    y, x, w, b, s, bias, tile, M, N, K, R, x_stride, s_stride, part_stride,
    b_n_stride, b_r_stride,
    LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_END, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n_ok, m_ok = n < N, m < M  # [BLOCK_N], [BLOCK_M]
    dtype = x.dtype.element_ty
    x_row = x + m.to(tl.int64)[:, None] * x_stride  # [BLOCK_M, 1]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        xs = tl.load(x_row + k[None, :], mask=m_ok[:, None] & (k < K)[None, :], other=0.0)
        ws = quantised_tile(w, tile * BLOCK_N, k0, N, K, dtype, LAYOUT, BLOCK_N, BLOCK_K)
        acc = dot(ws, tl.trans(xs), acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    b_row = b + n.to(tl.int64)[:, None] * b_n_stride  # [BLOCK_N, 1]
    s_row = s + m.to(tl.int64)[:, None] * s_stride  # [BLOCK_M, 1]
    for r0 in tl.range(0, RANK_END, BLOCK_R, num_stages=1):
        rank = r0 + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        rank_ok = rank < R  # [BLOCK_R]
        b_tile = tl.load(
            b_row + rank[None, :] * b_r_stride, mask=n_ok[:, None] & rank_ok[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_R]
        low = given_s(s_row + rank[None, :], part_stride, PARTS, m_ok[:, None] & rank_ok[None, :])
        acc = dot(cast(b_tile, dtype), tl.trans(cast(low, dtype)), acc, PRECISION)
    tl.store(
        y + m.to(tl.int64)[None, :] * N + n[:, None],
        cast(acc, y.dtype.element_ty),
        mask=n_ok[:, None] & m_ok[None, :],
    )


@triton.jit(do_not_specialize=["M", "part_stride"])
def _decode_quantised_kernel(
    ys, x, bits, scales, code, zeros, groups, overall, inner_scales, inner_code, offset, strides,
    Bs, s, biases, firsts, Ns, ranks, columns, b_n_strides, b_r_strides,
    M, K, RANK_END, x_stride, s_stride, part_stride,
    G: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    for i in tl.static_range(G):
        tile = tl.program_id(0) - firsts[i]
        if (tile >= 0) & (tile * BLOCK_N < Ns[i]):
            w = (
                bits[i], scales[i], code[i], zeros[i], groups[i], overall[i], inner_scales[i],
                inner_code[i], offset[i], strides[i],
            )  # fmt: skip
            if BLOCK_M == 1:
                one_row(
                    ys[i], x, w, Bs[i], s + columns[i], biases[i], tile, Ns[i], K, ranks[i],
                    part_stride, b_n_strides[i], b_r_strides[i],
                    LAYOUT, BLOCK_N, BLOCK_K, BLOCK_R, RANK_END, PARTS, STAGES, EARLY,
                )  # fmt: skip
            else:
                few_rows(
                    ys[i], x, w, Bs[i], s + columns[i], biases[i], tile, M, Ns[i], K, ranks[i],
                    x_stride, s_stride, part_stride, b_n_strides[i], b_r_strides[i],
                    LAYOUT, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, RANK_END, PARTS, PRECISION, EARLY,
                )  # fmt: skip


def plan_decode_quantised(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    ws: Sequence[Quantised],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    config: DecodeQuantisedConfig,
    arch: Arch,
) -> list[Launch]:
    """The launches that fill ys[i] [M, N_i] (contiguous); the arguments are checked already."""
    (M, _), G = x.shape, len(ys)
    K = x.shape[1]
    ranks, Ns = tuple(b.shape[1] for b in Bs), tuple(y.shape[1] for y in ys)
    early = starts_early(x, arch)
    parts, first = plan_parts(x, As, scales, config.split_k, early)
    one = M == 1
    block_n = config.block_n if one else max(16, config.block_n)
    tiles = [cdiv(n, block_n) for n in Ns]
    block_r = min(HELD_RANK, padded(max(ranks)))
    made = [loadable(w) for w in ws]
    # strides and offsets decide that, which may differ in a group; one layout is compiled for all
    same = all(w.layout == made[0].layout for w in made)
    ws = made if same else [loadable(w, words=False) for w in ws]
    each = zip(*(operands(w, arch) for w in ws), strict=True)
    args: tuple[Any, ...] = (
        tuple(ys), x, *each, tuple(Bs), parts, tuple(biases),
        tuple(sum(tiles[:i]) for i in range(G)), Ns, ranks,
        tuple(sum(ranks[:i]) for i in range(G)),
        tuple(b.stride(0) for b in Bs), tuple(b.stride(1) for b in Bs),
        M, K, rank_end([max(ranks)], block_r), row_stride(x), sum(ranks), M * sum(ranks),
    )  # fmt: skip
    meta: dict[str, Any] = dict(
        G=G, LAYOUT=ws[0].layout, BLOCK_M=1 if one else max(16, next_pow2(M)), BLOCK_N=block_n,
        BLOCK_K=config.block_k, BLOCK_R=block_r, PARTS=parts.shape[0],
        PRECISION=precision(x.dtype), STAGES=config.num_stages, EARLY=early,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if early:  # an option that only NVIDIA's compiler knows
        meta |= dict(launch_pdl=True)
    if takes_all_registers(M, ws[0].layout, G, arch):  # and here is another
        meta |= dict(maxnreg=registers(config.num_warps))
    elif has_table(M, ws[0].layout, arch):
        programs = 1 if ws[0].layout.scale == "nested" else 3
        meta |= dict(maxnreg=registers(config.num_warps, programs))
    return [first, Launch(_decode_quantised_kernel, (sum(tiles),), args, meta)]


@planned("scales")
def decode_quantised(
    x: torch.Tensor,
    ws: Sequence[Quantised],
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    scales: float | Sequence[float] = 1.0,
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    config: DecodeQuantisedConfig | None = None,
) -> list[torch.Tensor]:
    """Y_i [M, N_i] = x W_iᵀ + scale_i * (x A_iᵀ) B_iᵀ + bias_i of projections of one x, M <= 64.

    x [M, K] fp16/bf16/fp32; W_i [N_i, K] quantised, all in one layout; A_i [r_i, K], B_i [N_i, r_i]
    fp32 or x's dtype, r_i from 1 to 256; bias_i [N_i]. Errors: TypeError or ValueError naming the
    argument, before any launch.
    """
    x = checks.rows("x", x)
    M, K = x.shape
    if M > MAX_ROWS:
        raise ValueError(f"x has {M} rows; allowed: at most {MAX_ROWS} (dequantise for more)")
    ws, As, Bs = list(ws), list(As), list(Bs)
    checks.counts(ws=ws, As=As)
    checks.counts(ws=ws, Bs=Bs)
    biases = checks.per_adapter("biases", biases, len(ws))
    factors = checks.per_adapter("scales", scales, len(ws))
    for i, (w, a, b, bias) in enumerate(zip(ws, As, Bs, biases, strict=True)):
        checked(f"ws[{i}]", w)
        if w.shape[1] != K:
            raise ValueError(f"ws[{i}] has {w.shape[1]} columns; allowed: {K}, as x has")
        if w.layout != ws[0].layout:
            raise ValueError(f"ws[{i}] has another layout than ws[0]; allowed: one for all")
        names = f"ws[{i}]", f"As[{i}]", f"Bs[{i}]", f"biases[{i}]"
        check_beside(x, w.shape[0], a, b, bias, names)
    packed = {f"ws[{i}]": [t for t in w.tensors if t is not None] for i, w in enumerate(ws)}
    checks.device(x=x, As=As, Bs=Bs, biases=biases, **packed)
    ys = [x.new_empty((M, w.shape[0])) for w in ws]
    if not any(y.numel() for y in ys):
        return ys
    if K == 0:
        return [y.zero_() if c is None else y.copy_(c) for y, c in zip(ys, biases, strict=True)]
    arch = arch_of(x.device)
    if config is None:
        config = default_config(M, [w.shape[0] for w in ws], K, ws[0], arch, x.element_size())
    As = [dense_rows(a) for a in As]
    biases = [None if c is None else c.contiguous() for c in biases]
    for launch in plan_decode_quantised(ys, x, ws, As, Bs, biases, factors, config, arch):
        launch.run()
    return ys
