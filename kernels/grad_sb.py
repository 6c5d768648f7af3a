"""The gradients of S and B through S Bᵀ, in one pass over dY: dS = scale * dY B and dB = dYᵀ S.

dY [M, N], B [N, r], S and dS [M, r]. The sums over N (for dS) and over M (for dB) are split over
programs, which write fp32 partials; a second kernel adds them in fixed order. There are no atomics,
so two runs agree bit for bit. dS has the activation's dtype. ``scale`` includes the 1 / (1 - p) of
dropout, as S does. The same pass can write dY in fp8 (:mod:`.fp8_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks, fp8_rows
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    dot,
    next_pow2,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .fp8_rows import Fp8Rows
from .fp8_rows import write as write_fp8
from .grad_a import default_config as default_grad_a_config
from .grad_a import plan_grad_a
from .launching import planned
from .reduce import plan_sum, sums_last
from .shrink import default_config as default_shrink_config
from .shrink import plan_shrink

BLOCK_R_MAX = 128  # ranks that one program accumulates; for more, dY is read again
TWO_PASS = "two_pass"  # can be passed as grad_sb's config


@dataclass(frozen=True)
class GradSBConfig:
    """Tiles of dY [block_m, block_n]; N in split_n parts; dB has M / block_m partials."""

    block_m: int = 128
    block_n: int = 64
    split_n: int = 1
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_n=self.block_n)
        checks.one_or_more(self, split_n=self.split_n)


def default_config(
    M: int, N: int, r: int, arch: Arch, itemsize: int = 2, copied: bool = False
) -> GradSBConfig | None:
    """A config with tall tiles, and so few partials of dB; N is split until the device is full.

    None if two passes over dY are better. That is so for large M from about r > 32, where two
    passes move fewer bytes than one pass with its partials. And always for r > 64, where the two
    wide accumulators of one pass spill registers. With an fp8 copy (``copied``) tiles are as wide
    as what shares a scale, and no taller than registers allow.
    """
    if r > 64:
        return None
    stages = 3 if arch.shared > 160_000 else 2
    tall = 256 if r <= 32 and not copied else 128
    if not arch.warpgroups and r > 32:
        tall = 64  # mma.sync keeps operands in registers, and taller tiles spill
    block_m = min(tall, max(16, next_pow2(M)))
    blocks = cdiv(M, block_m)
    split = max(1, min(arch.sms // blocks, cdiv(N, 256)))
    partials = (8 * r * N * blocks if blocks > 1 else 0) + (8 * r * M * split if split > 1 else 0)
    if partials > itemsize * M * N and M > 256:
        return None
    if copied:
        stages = 3 if itemsize == 2 else 2
        warps = 8 if block_m >= 64 else 4
        return GradSBConfig(block_m, fp8_rows.WIDTH, split, warps, stages)
    return GradSBConfig(
        block_m=block_m,
        block_n=64 if stages > 2 or block_m * itemsize < 512 else 32,
        split_n=split,
        num_warps=8 if block_m >= 64 else 4,
        num_stages=stages,
    )


@triton.jit(do_not_specialize=["M"])
def _grad_sb_kernel(
    dy, b, s, ds_out, db_out, scale, M, N, R, N_PART,
    dy_stride, b_n_stride, b_r_stride, s_stride, ds_part_stride, db_part_stride,
    q, q_scales, q_stride, q_scales_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    row_ok, rank_ok = row < M, rank < R  # [BLOCK_M], [BLOCK_R]
    row64 = row.to(tl.int64)  # [BLOCK_M]
    dy_row = dy + row64[:, None] * dy_stride  # [BLOCK_M, 1]
    s_tile = tl.load(
        s + row64[:, None] * s_stride + rank[None, :],
        mask=row_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_R]
    db_part = db_out + block.to(tl.int64) * db_part_stride
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = part * N_PART
    last = tl.minimum(first + N_PART, N)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        n_ok = n < last  # [BLOCK_N]
        n64 = n.to(tl.int64)  # [BLOCK_N]
        g = tl.load(
            dy_row + n[None, :], mask=row_ok[:, None] & n_ok[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_N]
        if q is not None:
            write_fp8(g, q, q_scales, q_stride, q_scales_stride, row, row_ok, n0)
        nr_ok = n_ok[:, None] & rank_ok[None, :]  # [BLOCK_N, BLOCK_R]
        b_tile = tl.load(
            b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride, mask=nr_ok, other=0.0
        )  # [BLOCK_N, BLOCK_R]
        acc = dot(g, cast(b_tile, g.dtype), acc, PRECISION)
        db = dot(
            tl.trans(g), s_tile.to(g.dtype), tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION
        )  # [BLOCK_N, BLOCK_R]
        tl.store(
            db_part + n64[:, None] * R + rank[None, :],
            cast(db, db_out.dtype.element_ty),
            mask=nr_ok,
        )
    ds_part = ds_out + part.to(tl.int64) * ds_part_stride
    tl.store(
        ds_part + row64[:, None] * R + rank[None, :],
        cast(acc * scale, ds_out.dtype.element_ty),
        mask=row_ok[:, None] & rank_ok[None, :],
    )


def plan_grad_sb(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    ds: torch.Tensor,
    db: torch.Tensor,
    config: GradSBConfig,
    copy: Fp8Rows | None = None,
) -> list[Launch]:
    """Launches that fill ds [M, r] and db [N, r], both contiguous, and ``copy``, dY in fp8.

    The arguments are checked.
    """
    (M, N), r = dy.shape, b.shape[1]
    n_part = cdiv(cdiv(N, config.split_n), config.block_n) * config.block_n
    split, blocks = cdiv(N, n_part), cdiv(M, config.block_m)
    block_r = min(BLOCK_R_MAX, padded(r))
    ds_parts = ds if split == 1 else ds.new_empty((split, M, r), dtype=torch.float32)
    db_parts = db if blocks == 1 else db.new_empty((blocks, N, r), dtype=torch.float32)
    args = (
        dy, b, s, ds_parts, db_parts, float(scale), M, N, r, n_part,
        row_stride(dy), b.stride(0), b.stride(1), row_stride(s), M * r, N * r,
        *fp8_rows.arguments(copy),
    )  # fmt: skip
    meta = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=block_r,
        PRECISION=precision(dy.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_grad_sb_kernel, (blocks, split, cdiv(r, block_r)), args, meta)]
    pairs = [(p, o) for p, o in ((ds_parts, ds), (db_parts, db)) if p is not o]
    if pairs:
        launches.append(plan_sum(pairs))
    return launches


def plan_two_pass(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    ds: torch.Tensor,
    db: torch.Tensor,
    arch: Arch,
    copy: Fp8Rows | None = None,
) -> list[Launch]:
    """Launches with the same outputs that read dY twice, for large r; there are fewer partials."""
    (M, N), r = dy.shape, b.shape[1]
    config = default_shrink_config(M, N, [r], arch, dy.element_size(), copied=copy is not None)
    down = plan_shrink(dy, [b.T], [None], [scale], ds, config, copy=copy)
    return down + plan_grad_a(
        dy, [s], [None], [db.T], default_grad_a_config(M, N, arch, [r], dy.element_size())
    )


def _plan_checked(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype,
    config: GradSBConfig | str | None,
    copy: Fp8Rows | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[Launch]]:
    """Check the arguments; returns (dS [M, r], dB [N, r], the launches that fill them)."""
    dy, s = checks.rows("dy", dy), checks.rows("s", s, (dy.dtype,))
    (M, N), r = dy.shape, s.shape[1]
    checks.rank("s", r)
    checks.shape("s", s, (M, r), "dy has M rows")
    checks.shape("b", b, (N, r), "[columns of dy, columns of s]")
    checks.adapter_dtype("b", b, dy.dtype)
    checks.device(dy=dy, b=b, s=s, copy=copy)
    arch = arch_of(dy.device)
    fp8_rows.check("copy", copy, (M, N), arch)
    ds, db = dy.new_empty((M, r)), dy.new_empty((N, r), dtype=out_dtype)
    if M == 0 or N == 0:
        return ds.zero_(), db.zero_(), []
    config = config or default_config(M, N, r, arch, dy.element_size(), copy is not None)
    if isinstance(config, GradSBConfig):
        # programs of other ranks would write the copy again
        if copy is None or r <= BLOCK_R_MAX:
            fp8_rows.check_width("config.block_n", config.block_n, copy)
            return ds, db, plan_grad_sb(dy, b, s, scale, ds, db, config, copy)
    return ds, db, plan_two_pass(dy, b, s, scale, ds, db, arch, copy)


@planned("scale")
def grad_sb(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float = 1.0,
    *,
    copy: Fp8Rows | None = None,
    out_dtype: torch.dtype = torch.float32,
    config: GradSBConfig | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dS [M, r] in dY's dtype, dB [N, r] in ``out_dtype``) = (scale * dY B, dYᵀ S).

    dY is read once, or twice for large r and with ``config=TWO_PASS``. dy [M, N] fp16/bf16/fp32,
    any row stride; b [N, r] fp32 or dy's dtype, any strides; s [M, r] dy's dtype, any row stride,
    with its scale in it; r from 1 to 256. ``copy``: room for dY in fp8, which is written
    (:func:`.fp8_rows.empty`); N is a multiple of 128 then, and block_n of a config 128. Errors:
    TypeError, ValueError, before any launch.
    """
    ds, db, launches = _plan_checked(dy, b, s, scale, out_dtype, config, copy)
    for launch in sums_last(launches):
        launch.run()
    return ds, db


@planned("parts")
def grad_sb_group(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]],
    out_dtypes: Sequence[torch.dtype],
    configs: Sequence[GradSBConfig | str | None] | None = None,
    copies: Sequence[Fp8Rows | None] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The results of :func:`grad_sb` for every (dY, B, S, scale), with one second stage for all."""
    configs = checks.per_adapter("configs", configs, len(parts))
    copies = checks.per_adapter("copies", copies, len(parts))
    plans = [
        _plan_checked(*part, dtype, config, copy)
        for part, dtype, config, copy in zip(parts, out_dtypes, configs, copies, strict=True)
    ]
    for launch in sums_last([launch for *_, launches in plans for launch in launches]):
        launch.run()
    return [(ds, db) for ds, db, _ in plans]
