"""The gradients of the factors of a mixture's experts, from the sorted rows of each expert.

    dS[p] = scale · dY[p] B_e,    dB_e = Σ w_p dY[p]ᵀ S[p],    dA_e = Σ w_p dS[p]ᵀ (mask ∘ X)[p]

The sums are over the sorted rows p of expert e; dY [T, N] and X [T, K] are of tokens and gathered
in the load, or [P, N] and [P, K] of sorted rows. A program has an expert and a block of columns and
walks down the expert's rows, so dB and dA have no partials, and all experts are written, those
without a row with zeros. dS has a partial for each block of columns; a second kernel adds them in
fixed order. There are no atomics, so two runs agree bit for bit.

Rows after an expert's last are its last row again, with S or dS zero: so dY needs no mask, which
would cost it a way through registers before the second product that reads it.
"""

from __future__ import annotations

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
    dot,
    keep_tile,
    next_pow2,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .experts_route import Route, checked_rows, checked_weights, one_adapter, source_rows
from .experts_shrink import default_config as default_shrink_config
from .experts_shrink import plan_shrink
from .flight import stages
from .launching import planned
from .reduce import plan_sum

BLOCK_R_MAX = 128  # ranks that a program accumulates; for more, X is read again
ONE_PASS_RANK = 64  # for larger ranks the partials of dS are more bytes than a second pass over dY


@dataclass(frozen=True)
class ExpertsGradConfig:
    """Tiles [block_m, block_c] of dY or of X, whose columns are N or K."""

    block_m: int = 64
    block_c: int = 128
    num_warps: int = 8
    num_stages: int = 4

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_c=self.block_c)  # whole mask words


def _width(columns: int, experts: int, wide: int, least: int, arch: Arch) -> int:
    """Columns of a block: ``wide``, or fewer until the device is full, and ``least`` at least."""
    while wide > least and experts * cdiv(columns, wide) < arch.sms * 2:
        wide //= 2
    return wide


def default_config(
    P: int, columns: int, r: int, experts: int, arch: Arch, itemsize: int = 2, *,
    one_pass: bool = False, masked: bool = False, indirect: bool = False,
) -> ExpertsGradConfig:  # fmt: skip
    """A config with blocks of many columns, and so few partials of dS, where the device is full.

    ``one_pass``: of :func:`grad_sb`, which holds B beside its sum. ``indirect``: rows or weights
    are found through the pairs, which the pipeline loads as many steps ahead as what they find.
    """
    held = min(BLOCK_R_MAX, padded(r))
    exact = itemsize == 4
    roomy = arch.shared > 160_000
    if one_pass:
        # mma.sync keeps B in the registers of every warp, and exact products keep all of it there
        wide = (128 if arch.warpgroups else 64) * (2 if held <= 32 else 1)
        block_c = 32 if exact else _width(columns, experts, wide, 64, arch)
    else:
        wide = 128 if held <= 64 and not exact and roomy else 64
        block_c = _width(columns, experts, wide, 32, arch)

    def step(rows: int) -> tuple[int, int]:
        """Bytes of X in a step of so many rows, and of all else."""
        return rows * block_c * itemsize, rows * (held * itemsize + 8 + masked * block_c // 8)

    # a block of few rows has the last of them again and again; cp.async copies at least 4 bytes
    rows = max(16 if one_pass else 32, next_pow2(cdiv(2 * P, experts)))
    block_m = min(32 if exact and one_pass else 64, rows)
    while block_m > 32 and arch.shared // 2 < 3 * sum(step(block_m)):
        block_m //= 2
    programs = experts * cdiv(columns, block_c)
    loads = stages(arch, programs, *step(block_m), resident=2) - 1
    # on eight warps a masked strip of large ranks spills on sm_80 (Triton 3.9)
    lean = arch.capability == 80 and masked and held > 64 and block_c <= 64
    return ExpertsGradConfig(
        block_m=block_m,
        block_c=block_c,
        num_warps=8 if (block_c * held > 4096 and not lean) or block_c > 64 else 4,
        num_stages=1 + loads * (2 if indirect else 1),
    )


@triton.jit(do_not_specialize=["P", "k"])
def _experts_grad_sb_kernel(
    dy, b, s, weights, ds_out, db_out, pairs, offsets, scale,
    P, k, N, R, dy_stride, s_stride, b_e, b_n, b_r, db_e, db_n, db_r,
    GATHER: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok, rank_ok = n < N, rank < R  # [BLOCK_N], [BLOCK_R]
    n64, rank64 = n.to(tl.int64), rank.to(tl.int64)  # [BLOCK_N], [BLOCK_R]
    nr_ok = n_ok[:, None] & rank_ok[None, :]  # [BLOCK_N, BLOCK_R]
    b_tile = tl.load(
        b + expert * b_e + n64[:, None] * b_n + rank64[None, :] * b_r, mask=nr_ok, other=0.0
    )  # [BLOCK_N, BLOCK_R]
    b_tile = cast(b_tile, dy.dtype.element_ty)
    ds_part = ds_out + tl.program_id(0).to(tl.int64) * P * R
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        at = tl.minimum(row, last - 1)  # [BLOCK_M]
        dy_at = dy + source_rows(pairs, at, k, GATHER)[:, None] * dy_stride + n[None, :]
        if WHOLE:  # N is whole blocks
            g = tl.load(dy_at)  # [BLOCK_M, BLOCK_N]
        else:
            g = tl.load(dy_at, mask=n_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        mr_ok = row_ok[:, None] & rank_ok[None, :]  # [BLOCK_M, BLOCK_R]
        s_tile = tl.load(
            s + row64[:, None] * s_stride + rank[None, :], mask=mr_ok, other=0.0
        )  # [BLOCK_M, BLOCK_R]
        if weights is not None:
            w = tl.load(weights + tl.load(pairs + at)).to(tl.float32)  # [BLOCK_M]
            s_tile = cast(s_tile.to(tl.float32) * w[:, None], dy.dtype.element_ty)
        ds = dot(g, b_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), PRECISION)
        acc = dot(tl.trans(g), s_tile, acc, PRECISION)
        tl.store(
            ds_part + row64[:, None] * R + rank[None, :],
            cast(ds * scale, ds_out.dtype.element_ty),
            mask=mr_ok,
        )
    tl.store(
        db_out + expert * db_e + n64[:, None] * db_n + rank64[None, :] * db_r,
        cast(acc, db_out.dtype.element_ty),
        mask=nr_ok,
    )


@triton.jit(do_not_specialize=["k"])
def _experts_grad_a_kernel(
    x, ds, words, weights, out, pairs, offsets,
    k, K, R, x_stride, ds_stride, WORDS, out_e, out_r, out_k,
    GATHER: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    k0 = tl.program_id(0) * BLOCK_K
    col = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    col_ok, rank_ok = col < K, rank < R  # [BLOCK_K], [BLOCK_R]
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        at = tl.minimum(row, last - 1)  # [BLOCK_M]
        x_at = x + source_rows(pairs, at, k, GATHER)[:, None] * x_stride + col[None, :]
        if WHOLE:  # K is whole blocks
            xs = tl.load(x_at)  # [BLOCK_M, BLOCK_K]
        else:
            xs = tl.load(x_at, mask=col_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        d = tl.load(
            ds + row.to(tl.int64)[:, None] * ds_stride + rank[None, :],
            mask=row_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        if weights is not None:
            w = tl.load(weights + tl.load(pairs + at)).to(tl.float32)  # [BLOCK_M]
            d = cast(d.to(tl.float32) * w[:, None], xs.dtype)
        kept = xs
        if words is not None:
            kept = tl.where(
                keep_tile(words, at, row_ok, k0, WORDS, BLOCK_M, BLOCK_K), xs, 0.0
            )  # [BLOCK_M, BLOCK_K]
        # X transposed is the wide operand: the tall product fills the tensor cores
        acc = dot(tl.trans(kept.to(xs.dtype)), d, acc, PRECISION)
    tl.store(
        out + expert * out_e + rank.to(tl.int64)[None, :] * out_r
        + col.to(tl.int64)[:, None] * out_k,
        cast(acc, out.dtype.element_ty),
        mask=col_ok[:, None] & rank_ok[None, :],
    )  # fmt: skip


def plan_grad_a(
    ds: torch.Tensor,
    x: torch.Tensor,
    route: Route,
    gather: bool,
    weights: torch.Tensor | None,
    words: torch.Tensor | None,
    out: torch.Tensor,
    config: ExpertsGradConfig,
) -> list[Launch]:
    """The launch that fills ``out`` [E, r, K] of any strides; the arguments are checked already."""
    (E, r, K), block_r = out.shape, min(BLOCK_R_MAX, padded(ds.shape[1]))
    args = (
        x, ds, words, weights, out, route.pairs, route.offsets,
        route.k, K, r, row_stride(x), row_stride(ds), cdiv(K, 32), *out.stride(),
    )  # fmt: skip
    meta = dict(
        GATHER=gather, WHOLE=K % config.block_c == 0, BLOCK_M=config.block_m,
        BLOCK_K=config.block_c, BLOCK_R=block_r, PRECISION=precision(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    grid = (cdiv(K, config.block_c), E, cdiv(r, block_r))
    return [Launch(_experts_grad_a_kernel, grid, args, meta)]


def plan_grad_sb(
    dy: torch.Tensor,
    route: Route,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    gather: bool,
    weights: torch.Tensor | None,
    ds: torch.Tensor,
    db: torch.Tensor,
    config: ExpertsGradConfig,
) -> list[Launch]:
    """Launches that fill ds [P, r], contiguous, and db [E, N, r] of any strides, in one pass.

    The arguments are checked already, and r is at most :data:`ONE_PASS_RANK`.
    """
    (E, N, r), P = b.shape, ds.shape[0]
    blocks = cdiv(N, config.block_c)
    parts = ds if blocks == 1 else ds.new_empty((blocks, P, r), dtype=torch.float32)
    args = (
        dy, b, s, weights, parts, db, route.pairs, route.offsets, float(scale),
        P, route.k, N, r, row_stride(dy), row_stride(s), *b.stride(), *db.stride(),
    )  # fmt: skip
    meta = dict(
        GATHER=gather, WHOLE=N % config.block_c == 0, BLOCK_M=config.block_m,
        BLOCK_N=config.block_c, BLOCK_R=padded(r), PRECISION=precision(dy.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_experts_grad_sb_kernel, (blocks, E), args, meta)]
    return launches if blocks == 1 else [*launches, plan_sum([(parts, ds)])]


def plan_two_pass(
    dy: torch.Tensor,
    route: Route,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    gather: bool,
    weights: torch.Tensor | None,
    ds: torch.Tensor,
    db: torch.Tensor,
    arch: Arch,
) -> list[Launch]:
    """Launches with the same outputs that read dY twice, for large r; dS has no partials."""
    (E, N, r), P, itemsize = b.shape, ds.shape[0], dy.element_size()
    down = default_shrink_config(P, N, r, E, route.block_m, arch, itemsize)
    indirect = gather or weights is not None
    up = default_config(P, N, r, E, arch, itemsize, indirect=indirect)
    turned = b.transpose(1, 2)
    return plan_shrink(dy, route, [turned], [scale], gather, None, ds, down) + plan_grad_a(
        s, dy, route, gather, weights, None, db.transpose(1, 2), up
    )


@planned("scale")
def grad_sb(
    dy: torch.Tensor,
    route: Route,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float = 1.0,
    *,
    gather: bool,
    row_weight: torch.Tensor | None = None,
    config: ExpertsGradConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dS [P, r] in dY's dtype, dB [E, N, r] fp32) = (scale · dY B_e, Σ w_p dY[p]ᵀ S[p]).

    dY is read once, or twice for r above 64. dy fp16/bf16/fp32, any row stride, [T, N] with
    ``gather`` and [P, N] of sorted rows without; b [E, N, r] fp32 or dy's dtype, any strides; s
    [P, r] of sorted rows in dy's dtype, any row stride, with its scale in it; r from 1 to 256;
    row_weight: w, [T, k] or [P] in order of the pairs (not of sorted rows), fp32 or dy's dtype,
    which dS does not have. dB has b's order of dimensions in memory. Rows of dS that are in no
    group of the route are not written. ``config`` is for r up to 64. Errors: TypeError, ValueError,
    before any launch.
    """
    one_adapter(route, "gradients")
    dy = checked_rows("dy", dy, route, gather)
    s = checks.rows("s", s, (dy.dtype,))
    P, N, r = route.P, dy.shape[1], s.shape[1]
    checks.rank("s", r)
    checks.shape("s", s, (P, r), "a row for each pair of the route")
    checks.shape("b", b, (route.experts, N, r), "[E, N, r], E as the route, N as dy, r as s")
    checks.adapter_dtype("b", b, dy.dtype)
    weights = checked_weights("row_weight", row_weight, route, dy.dtype)
    checks.device(dy=dy, b=b, s=s, row_weight=weights, pairs=route.pairs)
    ds, db = dy.new_empty((P, r)), torch.empty_like(b, dtype=torch.float32)
    if P == 0 or N == 0:
        return ds.zero_(), db.zero_()
    arch = arch_of(dy.device)
    given = dy, route, b, s, scale, gather, weights, ds, db
    if r > ONE_PASS_RANK:
        launches = plan_two_pass(*given, arch)
    else:
        config = config or default_config(
            P,
            N,
            r,
            route.experts,
            arch,
            dy.element_size(),
            one_pass=True,
            indirect=gather or weights is not None,
        )
        launches = plan_grad_sb(*given, config)
    for launch in launches:
        launch.run()
    return ds, db


@planned()
def grad_a(
    ds: torch.Tensor,
    x: torch.Tensor,
    route: Route,
    *,
    gather: bool,
    row_weight: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    config: ExpertsGradConfig | None = None,
) -> torch.Tensor:
    """dA [E, r, K] fp32 = Σ w_p dS[p]ᵀ (mask ∘ x)[p] over the sorted rows p of each expert.

    x fp16/bf16/fp32, any row stride, [T, K] with ``gather`` and [P, K] of sorted rows without; ds
    [P, r] of sorted rows in x's dtype, any row stride, r from 1 to 256; row_weight as in
    :func:`grad_sb`; bits: packed keep masks of the sorted rows, int32 [P, ceil(K / 32)]. Errors:
    TypeError, ValueError, before any launch.
    """
    one_adapter(route, "gradients")
    x = checked_rows("x", x, route, gather)
    ds = checks.rows("ds", ds, (x.dtype,))
    P, K, r = route.P, x.shape[1], ds.shape[1]
    checks.rank("ds", r)
    checks.shape("ds", ds, (P, r), "a row for each pair of the route")
    weights = checked_weights("row_weight", row_weight, route, x.dtype)
    words = checks.words("bits", bits, P, K)
    checks.device(x=x, ds=ds, row_weight=weights, bits=words, pairs=route.pairs)
    out = x.new_empty((route.experts, r, K), dtype=torch.float32)
    if P == 0 or K == 0:
        return out.zero_()
    config = config or default_config(
        P,
        K,
        r,
        route.experts,
        arch_of(x.device),
        x.element_size(),
        masked=words is not None,
        indirect=gather or weights is not None,
    )
    for launch in plan_grad_a(ds, x, route, gather, weights, words, out, config):
        launch.run()
    return out
