"""The gradients through the gate of a mixture, in one pass over dH and GU.

Rows are in the order of a :class:`.experts_route.Route`; row p has the routing weight w_p and an
expert e. GU, dGU [P, N] with N = 2·I, or I where G is alone; H, dH0 [P, I], dH0 without w_p;
B [E, N, r] and S, dS [P, r] of the first linear.

    H = gate(GU)        dw_p = dH0[p] · H[p]        dGU = backward of the gate for w_p dH0[p]
    dS = scale * dGU B_e        dB_e = Σ over rows of e of dGUᵀ S

A program has a group and a strip of columns of H, and walks down the group's rows, so that dB is in
its registers. dS and dw are sums over strips: each strip writes an fp32 part, and a second kernel
adds the parts in fixed order (no atomics). Above PART_RANK ranks the parts of dS would be more
bytes than dGU, and :mod:`.experts_shrink` makes dS of that. For ranks above those of one program
(BLOCK_R) dH and GU are read again for each further block of ranks, for dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    dot,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .experts_gates import (
    Clamp,
    check_gate,
    check_rows,
    constants,
    gated_grad,
    inner_width,
    load_gate,
)
from .experts_low_rank import check_factors
from .experts_route import Route, checked_weights, one_adapter
from .experts_shrink import default_config as default_shrink_config
from .experts_shrink import plan_shrink
from .launching import planned
from .mlp_grad import _once
from .reduce import AHEAD, BLOCK

PART_RANK = 32


@dataclass(frozen=True)
class ExpertsGateGradConfig:
    """Tiles of H [block_m, block_k], and ranks of a program."""

    block_m: int = 32
    block_k: int = 128
    block_r: int = 16
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_k=self.block_k, block_r=self.block_r)


class ExpertsGateGrads(NamedTuple):
    """The gradients and H, in the route's order of rows but for dw; None for what is not wanted."""

    dgu: torch.Tensor  # [P, N]
    h: torch.Tensor  # [P, I]
    dw: torch.Tensor  # fp32 [P], of pair t·k + j
    ds: torch.Tensor | None  # [P, r]
    db: torch.Tensor | None  # fp32 [E, N, r]


def default_config(r: int, layout: str, arch: Arch, itemsize: int = 2) -> ExpertsGateGradConfig:
    """The widest strips, for few parts of dS, whose accumulators of dB fit the registers."""
    if itemsize == 4:  # exact products have their operands in registers too
        warps = 8 if layout == "interleaved" else 4
        return ExpertsGateGradConfig(block_m=16, block_k=32, num_warps=warps)
    if padded(max(r, 1)) > 16:
        return ExpertsGateGradConfig(block_k=64, block_r=64 if arch.warpgroups else 32)
    return ExpertsGateGradConfig(block_k=64 if layout == "interleaved" else 128)


@triton.jit
def _experts_gate_grad_kernel(
    dh, gu, dgu, h, weights, pairs, offsets, b, s, ds_parts, db, dw_parts,
    scale, R, b_e_stride, b_n_stride, b_r_stride, s_stride, alpha, limit, plus,
    PART, K, N, dh_stride, gu_stride, dgu_stride, h_stride,
    ACT: tl.constexpr, CLAMPED: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
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
        w = weight.to(tl.float32)[:, None]  # [BLOCK_M, 1]
        weight = tl.load(weights + pair, mask=row + BLOCK_M < last, other=0.0)
        pair = tl.load(pairs + row + 2 * BLOCK_M, mask=row + 2 * BLOCK_M < last, other=0)
        value, dg, du = gated_grad(d * w, g, u, alpha, limit, plus, ACT, CLAMPED, LAYOUT == "alone")
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
                total += parts[j]
        pair = tl.load(pairs + at, mask=at < P, other=0)  # [BLOCK]
        tl.store(dw + pair, tl.where(at < rows, total, 0.0), mask=at < P)
    elif ds is not None:
        for p0 in range(0, COUNT, AHEAD):
            parts = ()
            for j in tl.static_range(AHEAD):
                source = ds_parts + (p0 + j) * (rows * 0 + PART) * R + at  # [BLOCK]
                ok = (at < whole * R) & (p0 + j < COUNT)  # [BLOCK]
                parts = parts + (tl.load(source, mask=ok, other=0.0),)
            for j in tl.static_range(AHEAD):
                total += parts[j]
        total = tl.where(at < rows * R, total, 0.0)
        tl.store(ds + at, cast(total, ds.dtype.element_ty), mask=at < SIZE)


def plan_gate_grad(
    dh: torch.Tensor,
    gu: torch.Tensor,
    route: Route,
    name: str,
    layout: str,
    weights: torch.Tensor,
    b: torch.Tensor | None,
    s: torch.Tensor | None,
    scale: float,
    clamp: tuple[float, float, float] | None,
    out: ExpertsGateGrads,
    config: ExpertsGateGradConfig,
    arch: Arch,
) -> list[Launch]:
    """Launches that fill ``out``, whose ``ds`` needs ``b`` and whose ``db`` needs both.

    The arguments are checked already, and ``weights`` is contiguous.
    """
    (P, K), N = dh.shape, gu.shape[1]
    r, strips = 1 if b is None else b.shape[2], cdiv(K, config.block_k)
    part = cdiv(P, 16) * 16  # rows of a part, so that each starts on 16 bytes
    dw_parts = dh.new_empty((strips, part), dtype=torch.float32)
    low = b is not None and r <= PART_RANK
    ds_parts = dh.new_empty((strips, part, r), dtype=torch.float32) if low else None
    r_all, r = r, r if low or s is not None else 1  # of the pass over dH and GU
    args = (
        dh, gu, out.dgu, out.h, weights, route.pairs, route.offsets, b, s, ds_parts, out.db,
        dw_parts, float(scale), r, *((0, 0, 0) if b is None else b.stride()),
        0 if s is None else row_stride(s), *constants(clamp), part, K, N,
        row_stride(dh), row_stride(gu), row_stride(out.dgu), row_stride(out.h),
    )  # fmt: skip
    block_r = min(config.block_r, padded(r))
    meta = dict(
        ACT=name, CLAMPED=clamp is not None, LAYOUT=layout, BLOCK_M=config.block_m,
        BLOCK_K=config.block_k, BLOCK_R=block_r, PRECISION=precision(dh.dtype),
        STAGES=config.num_stages, ONCE=block_r < 64,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (strips, route.experts, cdiv(r, block_r))
    first = Launch(_experts_gate_grad_kernel, grid, args, meta)
    sums = (
        dw_parts, out.dw, route.pairs, route.offsets[-1:], ds_parts, out.ds if low else None,
        P, r, P * r, part, strips,
    )  # fmt: skip
    blocks = (cdiv(P * r, BLOCK), 2) if low else (cdiv(P, BLOCK), 1)
    meta = dict(BLOCK=BLOCK, AHEAD=AHEAD, num_warps=4, num_stages=1)
    launches = [first, Launch(_experts_gate_sum_kernel, blocks, sums, meta)]
    if b is not None and out.ds is not None and not low:
        shrink_config = default_shrink_config(
            P, N, r_all, route.experts, route.block_m, arch, dh.element_size()
        )
        launches += plan_shrink(
            out.dgu, route, [b.transpose(1, 2)], [scale], False, None, out.ds, shrink_config
        )
    return launches


@planned("scale")
def gate_grad(
    dh0: torch.Tensor,
    gu: torch.Tensor,
    route: Route,
    name: str,
    layout: str,
    weights: torch.Tensor,
    b: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    clamp: Clamp | tuple[float, float, float] | None = None,
    config: ExpertsGateGradConfig | None = None,
) -> ExpertsGateGrads:
    """dGU, H, dw, and dS and dB of the first linear's adapter where it has one.

    Pairs that are in no group of the route get a dw of 0; their rows of the others are unspecified.

    Args:
        dh0: [P, I] fp16/bf16/fp32, the gradient of H without the routing weights, any row stride.
        gu: [P, N] in dh0's dtype, any row stride.
        route: of one adapter.
        name, layout, clamp: the gate, as in :func:`.experts_gate.gate`.
        weights: the routing weights [T, k], or [T·k], fp32 or gu's dtype.
        b: [E, N, r] fp32 or gu's dtype, any strides, r from 1 to 256; without it no dS and dB.
        s: [P, r] in gu's dtype, any row stride; without it no dB.
        scale: of dS; it must include 1 / (1 - p).

    Raises:
        TypeError, ValueError: naming the argument, before any launch.
    """
    gu = check_gate(gu, name, layout, clamp)
    check_rows("gu", gu, route)
    P, N, dtype = *gu.shape, gu.dtype
    K = inner_width(N, layout)
    dh0 = checks.rows("dh0", dh0, (dtype,))
    checks.shape("dh0", dh0, (P, K), "[the route's pairs, inner width of gu]")
    one_adapter(route, "gradients")
    weights = checked_weights("weights", weights, route, dtype)
    assert weights is not None
    if b is not None:
        [b] = check_factors("b", [b], 1, route.experts, 2, N, dtype)
    if s is not None:
        if b is None:
            raise ValueError("s is given without b; allowed: both, b alone, or neither")
        [s] = checks.low_rank("s", [s], P, dtype, "gu has P rows")
        checks.shape("s", s, (P, b.shape[2]), "[rows of gu, rank of b]")
    checks.device(dh0=dh0, gu=gu, pairs=route.pairs, weights=weights, b=b, s=s)
    fp32 = torch.float32
    r = 0 if b is None else b.shape[2]
    out = ExpertsGateGrads(
        gu.new_empty((P, N)),
        gu.new_empty((P, K)),
        gu.new_empty(P, dtype=fp32),
        None if b is None else gu.new_empty((P, r)),
        None if s is None else gu.new_empty((route.experts, N, r), dtype=fp32),
    )
    if P == 0 or K == 0:
        for t in (out.dw, out.ds, out.db):
            if t is not None:
                t.zero_()
        return out
    arch = arch_of(gu.device)
    config = config or default_config(r, layout, arch, gu.element_size())
    for launch in plan_gate_grad(
        dh0, gu, route, name, layout, weights, b, s, scale, clamp, out, config, arch
    ):
        launch.run()
    return out
