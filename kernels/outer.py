"""Gradients of the adapters. One pass over dY gives dS = scale * dY B and dB = dYᵀ S; one pass over
X gives every dA of a group.

dY [M, N], B [N, r], S and dS [M, r], X [M, K], A [r, K]. The sums over N (for dS) and over M (for
dB, dA) are split over programs, which write fp32 partials; a second kernel adds them in fixed
order. No atomics: two runs agree bit for bit. dS leaves in the activation's dtype, dA and dB in
fp32. The 1 / (1 - p) of dropout is part of ``scale`` here, as it is in S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    check_adapter_dtype,
    check_blocks,
    check_device,
    check_rank,
    check_shape,
    check_words,
    dot,
    keep_tile,
    next_pow2,
    per_adapter,
    precision,
    row_stride,
    rows,
)
from .reduce import plan_sum, sums_last
from .shrink import default_config as default_shrink_config
from .shrink import plan_shrink

BLOCK_R_MAX = 128  # ranks one program accumulates; beyond it X (or dY) is read again
GROUP_RANK = 128  # padded ranks one grad_a launch accumulates, over its adapters
TWO_PASS = "two_pass"  # in place of a config of grad_output


@dataclass(frozen=True)
class OuterConfig:
    """Tiles of dY [block_m, block_n]; N cut in split_n parts. dB partials number M / block_m."""

    block_m: int = 128
    block_n: int = 64
    split_n: int = 1
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_blocks(self, block_m=self.block_m, block_n=self.block_n)
        if self.split_n < 1:
            raise ValueError(f"OuterConfig.split_n is {self.split_n}; allowed: 1 or more")


@dataclass(frozen=True)
class GradAConfig:
    """Tiles of X [block_m, block_k]; M cut in split_m parts (1: no second stage)."""

    block_m: int = 64
    block_k: int = 64
    split_m: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_blocks(self, block_m=self.block_m)
        check_blocks(self, low=32, block_k=self.block_k)  # whole mask words
        if self.split_m < 1:
            raise ValueError(f"GradAConfig.split_m is {self.split_m}; allowed: 1 or more")


def default_outer_config(
    M: int, N: int, r: int, arch: Arch, itemsize: int = 2
) -> OuterConfig | None:
    """Tall tiles keep the dB partials few (M / block_m of them); N is split until the device is
    full.

    None where two passes over dY are better: at large M from about r > 32, where they move fewer
    bytes than one pass with its partials, and always above 64, where one pass holds two wide
    accumulators in registers and spills.
    """
    if r > 64:
        return None
    stages = 3 if arch.shared > 160_000 else 2
    tall = 256 if r <= 32 else 128
    if not arch.warpgroups and r > 32:
        tall = 64  # mma.sync keeps operands in registers: taller tiles spill
    block_m = min(tall, max(16, next_pow2(M)))
    blocks = cdiv(M, block_m)
    split = max(1, min(arch.sms // blocks, cdiv(N, 256)))
    partials = (8 * r * N * blocks if blocks > 1 else 0) + (8 * r * M * split if split > 1 else 0)
    if partials > itemsize * M * N and M > 256:
        return None
    return OuterConfig(
        block_m=block_m,
        block_n=64 if stages > 2 or block_m * itemsize < 512 else 32,
        split_n=split,
        num_warps=8 if block_m >= 64 else 4,
        num_stages=stages,
    )


def strips(M: int, K: int, arch: Arch) -> tuple[int, int]:
    """(columns of X a program owns, parts that M is cut in). Narrow strips where they fill the
    device and wide ones do not: M in one part needs no second stage. Otherwise M is split until
    the device is full, in parts of at least 256 rows.
    """
    if cdiv(K, 64) < arch.sms * 3 // 4 <= cdiv(K, 32) <= arch.sms * 2:
        return 32, 1
    return 64, max(1, min(arch.sms // max(1, cdiv(K, 64)), cdiv(M, 256)))


def default_grad_a_config(M: int, K: int, arch: Arch, ranks: Sequence[int] = (16,)) -> GradAConfig:
    """Column strips of X, see :func:`strips`; tall tiles where they are narrow."""
    block_k, split = strips(M, K, arch)
    held = min(GROUP_RANK, sum(max(16, next_pow2(r)) for r in ranks))
    # On sm_90 ptxas gives three stages of a narrow strip too few registers (Triton 3.9).
    deep = held <= (32 if block_k == 32 and arch.capability == 90 else 64)
    return GradAConfig(
        block_m=128 if block_k == 32 and held <= 32 else 64,
        block_k=block_k,
        split_m=split,
        num_warps=8 if held > 64 else 4,
        num_stages=3 if deep else 2,
    )


@triton.jit
def _outer_kernel(
    dy, b, s, ds_out, db_out, scale, M, N, R, N_PART,
    dy_stride, b_n_stride, b_r_stride, s_stride, ds_part_stride, db_part_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok, rank_ok = row < M, rank < R
    row64 = row.to(tl.int64)
    dy_row = dy + row64[:, None] * dy_stride
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
        n = n0 + tl.arange(0, BLOCK_N)
        n_ok = n < last
        n64 = n.to(tl.int64)
        g = tl.load(dy_row + n[None, :], mask=row_ok[:, None] & n_ok[None, :], other=0.0)
        nr_ok = n_ok[:, None] & rank_ok[None, :]
        b_tile = tl.load(
            b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride, mask=nr_ok, other=0.0
        )
        acc = dot(g, cast(b_tile, g.dtype), acc, PRECISION)
        db = dot(
            tl.trans(g), s_tile.to(g.dtype), tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION
        )
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


@triton.jit
def _grad_a_kernel(
    x, ds, words, outs, ranks, ds_strides, part_strides, r_strides, k_strides,
    M, K, M_PART, x_stride, WORDS,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    k_ok = k < K
    rank = tl.arange(0, BLOCK_R)
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.zeros((BLOCK_K, BLOCK_R), tl.float32),)
    first = part * M_PART
    last = tl.minimum(first + M_PART, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        row_ok = row < last
        row64 = row.to(tl.int64)
        xs = tl.load(
            x + row64[:, None] * x_stride + k[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        new = ()
        for i in tl.static_range(G):
            d = tl.load(
                ds[i] + row64[:, None] * ds_strides[i] + rank[None, :],
                mask=row_ok[:, None] & (rank < ranks[i])[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            kept = xs
            if words[i] is not None:
                kept = tl.where(
                    keep_tile(words[i], row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K), xs, 0.0
                )
            # X transposed is the wide operand: a tall [BLOCK_K, rank] product fills the tensor
            # core, the other way wastes it.
            new = new + (dot(tl.trans(kept.to(xs.dtype)), d, acc[i], PRECISION),)
        acc = new
    for i in tl.static_range(G):
        at = outs[i] + part.to(tl.int64) * part_strides[i]
        tl.store(
            at + rank.to(tl.int64)[None, :] * r_strides[i] + k.to(tl.int64)[:, None] * k_strides[i],
            cast(acc[i], outs[i].dtype.element_ty),
            mask=k_ok[:, None] & (rank < ranks[i])[None, :],
        )


def plan_outer(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    ds: torch.Tensor,
    db: torch.Tensor,
    config: OuterConfig,
) -> list[Launch]:
    """Launches that fill ds [M, r] and db [N, r], both contiguous; arguments already checked."""
    (M, N), r = dy.shape, b.shape[1]
    n_part = cdiv(cdiv(N, config.split_n), config.block_n) * config.block_n
    split, blocks = cdiv(N, n_part), cdiv(M, config.block_m)
    block_r = min(BLOCK_R_MAX, max(16, next_pow2(r)))
    ds_parts = ds if split == 1 else ds.new_empty((split, M, r), dtype=torch.float32)
    db_parts = db if blocks == 1 else db.new_empty((blocks, N, r), dtype=torch.float32)
    args = (
        dy, b, s, ds_parts, db_parts, float(scale), M, N, r, n_part,
        row_stride(dy), b.stride(0), b.stride(1), row_stride(s), M * r, N * r,
    )  # fmt: skip
    meta = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=block_r,
        PRECISION=precision(dy.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_outer_kernel, (blocks, split, cdiv(r, block_r)), args, meta)]
    pairs = [(p, o) for p, o in ((ds_parts, ds), (db_parts, db)) if p is not o]
    if pairs:
        launches.append(plan_sum(pairs))
    return launches


def plan_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    config: GradAConfig,
) -> list[Launch]:
    """Launches that fill outs[i] [r_i, K] (dense in any order); arguments already checked."""
    M, K = x.shape
    m_part = cdiv(cdiv(M, config.split_m), config.block_m) * config.block_m
    split = cdiv(M, m_part)
    # A partial repeats its output's layout, so that the sum runs over memory in order.
    partials = [
        o
        if split == 1
        else o.new_empty(split * o.numel(), dtype=torch.float32).as_strided(
            (split, *o.shape), (o.numel(), *o.stride())
        )
        for o in outs
    ]
    # Each piece: at most BLOCK_R_MAX ranks of one adapter, a row range of its output.
    pieces = [
        (d[:, r0 : r0 + BLOCK_R_MAX], w, p[..., r0 : r0 + BLOCK_R_MAX, :], o.numel())
        for d, w, p, o in zip(ds, words, partials, outs, strict=True)
        for r0 in range(0, d.shape[1], BLOCK_R_MAX)
    ]
    launches = []
    while pieces:
        held, take = 0, []
        while pieces and (
            not take or held + max(16, next_pow2(pieces[0][0].shape[1])) <= GROUP_RANK
        ):
            take.append(pieces.pop(0))
            held += max(16, next_pow2(take[-1][0].shape[1]))
        ranks = tuple(t[0].shape[1] for t in take)
        args = (
            x, tuple(t[0] for t in take), tuple(t[1] for t in take),
            tuple(t[2] for t in take), ranks,
            tuple(row_stride(t[0]) for t in take), tuple(t[3] for t in take),
            tuple(t[2].stride(-2) for t in take), tuple(t[2].stride(-1) for t in take),
            M, K, m_part, row_stride(x), cdiv(K, 32),
        )  # fmt: skip
        meta = dict(
            G=len(take), BLOCK_M=config.block_m, BLOCK_K=config.block_k,
            BLOCK_R=max(16, next_pow2(max(ranks))), PRECISION=precision(x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        launches.append(Launch(_grad_a_kernel, (cdiv(K, config.block_k), split), args, meta))
    if split > 1:
        launches.append(plan_sum(list(zip(partials, outs, strict=True))))
    return launches


def plan_two_pass(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    ds: torch.Tensor,
    db: torch.Tensor,
    arch: Arch,
) -> list[Launch]:
    """The same outputs with dY read twice and nothing in partials but what fills the device: for
    large r.
    """
    (M, N), r = dy.shape, b.shape[1]
    down = plan_shrink(dy, [b.T], [None], [scale], ds, default_shrink_config(M, N, [r], arch))
    return down + plan_grad_a(dy, [s], [None], [db.T], default_grad_a_config(M, N, arch, [r]))


def _plan_grad_output(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype,
    config: OuterConfig | str | None,
) -> tuple[torch.Tensor, torch.Tensor, list[Launch]]:
    """(dS, dB, the launches that fill them), after all checks."""
    dy, s = rows("dy", dy), rows("s", s, (dy.dtype,))
    (M, N), r = dy.shape, s.shape[1]
    check_rank("s", r)
    check_shape("s", s, (M, r), "dy has M rows")
    check_shape("b", b, (N, r), "[columns of dy, columns of s]")
    check_adapter_dtype("b", b, dy.dtype)
    check_device(dy=dy, b=b, s=s)
    ds, db = dy.new_empty((M, r)), dy.new_empty((N, r), dtype=out_dtype)
    if M == 0 or N == 0:
        return ds.zero_(), db.zero_(), []
    arch = arch_of(dy.device)
    config = config or default_outer_config(M, N, r, arch, dy.element_size())
    if isinstance(config, OuterConfig):
        return ds, db, plan_outer(dy, b, s, scale, ds, db, config)
    return ds, db, plan_two_pass(dy, b, s, scale, ds, db, arch)


def grad_output(
    dy: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    scale: float = 1.0,
    *,
    out_dtype: torch.dtype = torch.float32,
    config: OuterConfig | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dS [M, r] in dY's dtype, dB [N, r] in ``out_dtype``) = (scale * dY B, dYᵀ S), dY read once
    (twice for large r, and with ``config=TWO_PASS``).

    dy [M, N] fp16/bf16/fp32, any row stride; b [N, r] fp32 or dy's dtype, any strides; s [M, r]
    dy's dtype, any row stride, its scale already in it; r from 1 to 256. Errors: TypeError,
    ValueError, before any launch.
    """
    ds, db, launches = _plan_grad_output(dy, b, s, scale, out_dtype, config)
    for launch in sums_last(launches):
        launch.run()
    return ds, db


def grad_outputs(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]],
    out_dtypes: Sequence[torch.dtype],
    configs: Sequence[OuterConfig | str | None] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`grad_output` of every (dY, B, S, scale), all their second stages in one launch."""
    plans = [
        _plan_grad_output(*part, dtype, config)
        for part, dtype, config in zip(
            parts, out_dtypes, per_adapter("configs", configs, len(parts)), strict=True
        )
    ]
    for launch in sums_last([launch for *_, launches in plans for launch in launches]):
        launch.run()
    return [(ds, db) for ds, db, _ in plans]


def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    out_dtypes: Sequence[torch.dtype] | None = None,
    config: GradAConfig | None = None,
) -> list[torch.Tensor]:
    """[dA_i [r_i, K] in out_dtypes[i], default fp32] = dS_iᵀ (mask_i X) for each adapter of a
    group; X is read once for all.

    x [M, K] fp16/bf16/fp32, any row stride; ds[i] [M, r_i] x's dtype, any row stride; bits as in
    :func:`shrink.shrink`. Errors: TypeError, ValueError, before any launch.
    """
    x = rows("x", x)
    M, K = x.shape
    ds = [rows(f"ds[{i}]", d, (x.dtype,)) for i, d in enumerate(ds)]
    if not ds:
        raise ValueError("ds is empty; allowed: one adapter or more")
    for i, d in enumerate(ds):
        check_rank(f"ds[{i}]", d.shape[1])
        check_shape(f"ds[{i}]", d, (M, d.shape[1]), "x has M rows")
    words = [
        check_words(f"bits[{i}]", w, M, K) for i, w in enumerate(per_adapter("bits", bits, len(ds)))
    ]
    check_device(
        x=x,
        **{f"ds[{i}]": d for i, d in enumerate(ds)},
        **{f"bits[{i}]": w for i, w in enumerate(words)},
    )
    dtypes = list(out_dtypes) if out_dtypes is not None else [torch.float32] * len(ds)
    outs = [x.new_empty((d.shape[1], K), dtype=t) for d, t in zip(ds, dtypes, strict=True)]
    if M == 0 or K == 0:
        return [o.zero_() for o in outs]
    config = config or default_grad_a_config(M, K, arch_of(x.device), [d.shape[1] for d in ds])
    for launch in plan_grad_a(x, ds, words, outs, config):
        launch.run()
    return outs
