"""The gradients of A, dA = dSᵀ (mask X), for every adapter that reads X, in one pass over X.

X [M, K], dS [M, r], A [r, K]. A program reads a strip of columns of X. If the strips do not fill
the device, the sum over M is split over programs, which write fp32 partials; a second kernel adds
them in fixed order. There are no atomics, so two runs agree bit for bit.
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
    dot,
    keep_tile,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .flight import stages
from .launching import planned
from .reduce import plan_sum

BLOCK_R_MAX = 128  # ranks of one adapter that a program accumulates; for more, X is read again
GROUP_RANK = 128  # sum of padded ranks that a launch accumulates for its adapters


@dataclass(frozen=True)
class GradAConfig:
    """Tiles of X [block_m, block_k]; M is split into split_m parts (1: no second stage)."""

    block_m: int = 64
    block_k: int = 64
    split_m: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_m=self.split_m)


def strips(M: int, K: int, arch: Arch) -> tuple[int, int]:
    """(columns of X in a strip, number of parts of M).

    Strips are narrow if these fill the device and wide ones do not: M in one part needs no second
    stage. Otherwise M is split until the device is full, in parts of at least 256 rows.
    """
    if cdiv(K, 64) < arch.sms * 3 // 4 <= cdiv(K, 32) <= arch.sms * 2:
        return 32, 1
    return 64, max(1, min(arch.sms // max(1, cdiv(K, 64)), cdiv(M, 256)))


def default_config(
    M: int, K: int, arch: Arch, ranks: Sequence[int] = (16,), itemsize: int = 2
) -> GradAConfig:
    """A config with the strips of :func:`strips`; tiles are tall if the strips are narrow.

    On sm_90 ptxas gives narrow strips of several adapters too few registers on four warps, and
    those of rank 64 with more than two stages on eight: wide ones there.
    """
    block_k, split = strips(M, K, arch)
    held = min(GROUP_RANK, padded(*ranks))
    tight = arch.capability == 90 and block_k == 32 and held > 32
    if tight and 48 < held <= 64:
        block_k, split = 64, max(1, min(arch.sms // cdiv(K, 64), cdiv(M, 256)))
    small = arch.blackwell and held <= 32  # Triton 3.9 spills these on four warps, 3.6 larger on 8
    lean = block_k == 32 and arch.shared < 160_000  # Triton 3.9 spills these on eight warps
    block_m = 128 if block_k == 32 else 64
    beside = block_m * itemsize * held + len(ranks) * block_m * block_k // 8
    return GradAConfig(
        block_m=block_m,
        block_k=block_k,
        split_m=split,
        num_warps=8 if (held > 64 and not lean) or (block_k == 32 and (tight or small)) else 4,
        num_stages=stages(
            arch,
            cdiv(K, block_k) * split,
            block_m * block_k * itemsize,
            beside,
            least=3 if held <= 64 or arch.shared > 160_000 else 2,
        ),
    )


@triton.jit(do_not_specialize=["M", "M_PART"])
def _grad_a_kernel(
    x, ds, words, outs, ranks, ds_strides, part_strides, r_strides, k_strides,
    M, K, M_PART, x_stride, WORDS,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_ok = k < K  # [BLOCK_K]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.zeros((BLOCK_K, BLOCK_R), tl.float32),)
    first = part * M_PART
    last = tl.minimum(first + M_PART, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        xs = tl.load(
            x + row64[:, None] * x_stride + k[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
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
                )  # [BLOCK_M, BLOCK_K]
            # X transposed is the wide operand: the tall product [BLOCK_K, BLOCK_R] fills the tensor
            # cores, the transposed one does not
            new = new + (dot(tl.trans(kept.to(xs.dtype)), d, acc[i], PRECISION),)
        acc = new
    for i in tl.static_range(G):
        at = outs[i] + part.to(tl.int64) * part_strides[i]
        tl.store(
            at + rank.to(tl.int64)[None, :] * r_strides[i] + k.to(tl.int64)[:, None] * k_strides[i],
            cast(acc[i], outs[i].dtype.element_ty),
            mask=k_ok[:, None] & (rank < ranks[i])[None, :],
        )


def plan_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    outs: Sequence[torch.Tensor],
    config: GradAConfig,
) -> list[Launch]:
    """Launches that fill outs[i] [r_i, K] (dense in any order); the arguments are checked."""
    M, K = x.shape
    m_part = cdiv(cdiv(M, config.split_m), config.block_m) * config.block_m
    split = cdiv(M, m_part)
    # a partial has the layout of its output, so that the sum reads memory in order
    partials = [
        o
        if split == 1
        else o.new_empty(split * o.numel(), dtype=torch.float32).as_strided(
            (split, *o.shape), (o.numel(), *o.stride())
        )
        for o in outs
    ]
    # each piece has at most BLOCK_R_MAX ranks of one adapter, a range of rows of its output
    pieces = [
        (d[:, r0 : r0 + BLOCK_R_MAX], w, p[..., r0 : r0 + BLOCK_R_MAX, :], o.numel())
        for d, w, p, o in zip(ds, words, partials, outs, strict=True)
        for r0 in range(0, d.shape[1], BLOCK_R_MAX)
    ]
    launches = []
    while pieces:
        held = 0
        take: list[Any] = []
        while pieces and (not take or held + padded(pieces[0][0].shape[1]) <= GROUP_RANK):
            take.append(pieces.pop(0))
            held += padded(take[-1][0].shape[1])
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
            BLOCK_R=padded(max(ranks)), PRECISION=precision(x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        launches.append(Launch(_grad_a_kernel, (cdiv(K, config.block_k), split), args, meta))
    if split > 1:
        launches.append(plan_sum(list(zip(partials, outs, strict=True))))
    return launches


@planned()
def grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    out_dtypes: Sequence[torch.dtype] | None = None,
    config: GradAConfig | None = None,
) -> list[torch.Tensor]:
    """dA_i [r_i, K] = dS_iᵀ (mask_i X) for each adapter of a group; X is read once for all.

    dA_i is in out_dtypes[i] (default fp32). x [M, K] fp16/bf16/fp32, any row stride; ds[i] [M, r_i]
    x's dtype, any row stride; bits as in :func:`shrink.shrink`. Errors: TypeError, ValueError,
    before any launch.
    """
    x = checks.rows("x", x)
    M, K = x.shape
    ds = checks.low_rank("ds", ds, M, x.dtype, "x has M rows")
    if not ds:
        raise ValueError("ds is empty; allowed: one adapter or more")
    words = checks.masks(bits, len(ds), M, K)
    checks.device(x=x, ds=ds, bits=words)
    dtypes = list(out_dtypes) if out_dtypes is not None else [torch.float32] * len(ds)
    outs = [x.new_empty((d.shape[1], K), dtype=t) for d, t in zip(ds, dtypes, strict=True)]
    if M == 0 or K == 0:
        return [o.zero_() for o in outs]
    config = config or default_config(
        M, K, arch_of(x.device), [d.shape[1] for d in ds], x.element_size()
    )
    for launch in plan_grad_a(x, ds, words, outs, config):
        launch.run()
    return outs
