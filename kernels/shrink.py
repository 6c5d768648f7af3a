"""S_i = scale_i * (mask_i X) A_iᵀ for a group of adapters that read the same X, which is read once.

X [M, K]; A_i [r_i, K]; S [M, sum r_i], with the adapters side by side in columns. For small M, K is
split: fp32 partials, then a sum in fixed order (no atomics). A may have its own dtype and is cast
to X's in the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    device_function,
    dot,
    keep_tile,
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .launching import planned
from .reduce import plan_sum

LAUNCH_RANK = 128  # sum of padded ranks that a launch has in registers; for more, X is read again


@dataclass(frozen=True)
class ShrinkConfig:
    """Tiles of X [block_m, block_k]; K is split into split_k parts."""

    block_m: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words
        checks.one_or_more(self, split_k=self.split_k)


def default_config(M: int, K: int, ranks: Sequence[int], arch: Arch) -> ShrinkConfig:
    """A config with enough programs to fill the device.

    First the blocks of rows become smaller, then K is split into parts of at least 512.
    """
    held = min(LAUNCH_RANK, padded(*ranks))
    block_m = 64 if held <= 64 or arch.warpgroups else 32
    while block_m > 16 and cdiv(M, block_m) < arch.sms * 3 // 4:
        block_m //= 2
    split = max(1, min(arch.sms // cdiv(M, block_m), K // 512))
    return ShrinkConfig(
        block_m=block_m,
        block_k=128 if block_m <= 32 and held <= 32 else 64,
        split_k=split,
        num_warps=8 if held > 64 else 4,
        num_stages=3 if arch.shared > 160_000 or held <= 64 else 2,
    )


@device_function
def accumulate(
    x_row, As, words, ranks, a_r_strides, a_k_strides, row, row_ok, first, last, WORDS,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tuple of G fp32 tiles [BLOCK_M, BLOCK_R]: (mask_i X) A_iᵀ for some rows.

    The sums are over the columns first to last of X, which are loaded once for all.
    """
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < last  # [BLOCK_K]
        xs = tl.load(
            x_row + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        new = ()
        for i in tl.static_range(G):
            a = tl.load(
                As[i]
                + rank.to(tl.int64)[None, :] * a_r_strides[i]
                + k.to(tl.int64)[:, None] * a_k_strides[i],
                mask=(rank < ranks[i])[None, :] & k_ok[:, None],
                other=0.0,
            )  # [BLOCK_K, BLOCK_R]
            kept = xs
            if words[i] is not None:
                kept = tl.where(
                    keep_tile(words[i], row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K), xs, 0.0
                )  # [BLOCK_M, BLOCK_K]
            new = new + (dot(kept.to(xs.dtype), cast(a, xs.dtype), acc[i], PRECISION),)
        acc = new
    return acc


@triton.jit(do_not_specialize=["M"])
def _shrink_kernel(
    x, As, words, out, ranks, columns, scales, a_r_strides, a_k_strides,
    M, K, K_PART, x_stride, out_stride, part_stride, WORDS,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = row < M  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    first = part * K_PART
    acc = accumulate(
        x + row.to(tl.int64)[:, None] * x_stride, As, words, ranks, a_r_strides, a_k_strides,
        row, row_ok, first, tl.minimum(first + K_PART, K), WORDS,
        G, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip
    out_row = out + part.to(tl.int64) * part_stride + row.to(tl.int64)[:, None] * out_stride
    for i in tl.static_range(G):
        tl.store(
            out_row + (columns[i] + rank)[None, :],
            cast(acc[i] * scales[i], out.dtype.element_ty),
            mask=row_ok[:, None] & (rank < ranks[i])[None, :],
        )


class _Part(NamedTuple):
    a: torch.Tensor
    words: torch.Tensor | None
    scale: float
    column: int


def _parts(
    As: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    scales: Sequence[float],
) -> list[list[_Part]]:
    """The adapters, cut into ranks that a launch can hold, for each launch."""
    launches: list[list[_Part]] = [[]]
    held, column = 0, 0
    for a, w, scale in zip(As, words, scales, strict=True):
        for r0 in range(0, a.shape[0], LAUNCH_RANK):
            piece = a[r0 : r0 + LAUNCH_RANK]
            taken = padded(piece.shape[0])
            if held and held + taken > LAUNCH_RANK:
                launches.append([])
                held = 0
            launches[-1].append(_Part(piece, w, scale, column))
            held += taken
            column += piece.shape[0]
    return launches


def plan_shrink(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    out: torch.Tensor,
    config: ShrinkConfig,
) -> list[Launch]:
    """Launches that fill ``out`` [M, sum r] (contiguous); the arguments are checked already."""
    (M, K), total = x.shape, out.shape[1]
    # parts are whole tiles, so that no mask word is split
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split = cdiv(K, k_part)
    target = out if split == 1 else out.new_empty((split, M, total), dtype=torch.float32)
    launches = []
    for parts in _parts(As, words, scales):
        ranks = tuple(p.a.shape[0] for p in parts)
        args = (
            x, tuple(p.a for p in parts), tuple(p.words for p in parts), target,
            ranks, tuple(p.column for p in parts), tuple(float(p.scale) for p in parts),
            tuple(p.a.stride(0) for p in parts), tuple(p.a.stride(1) for p in parts),
            M, K, k_part, row_stride(x), total, M * total, cdiv(K, 32),
        )  # fmt: skip
        meta = dict(
            G=len(parts), BLOCK_M=config.block_m, BLOCK_K=config.block_k,
            BLOCK_R=padded(max(ranks)), PRECISION=precision(x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        launches.append(Launch(_shrink_kernel, (cdiv(M, config.block_m), split), args, meta))
    if split > 1:
        launches.append(plan_sum([(target, out)]))
    return launches


@planned("scales")
def shrink(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    scales: float | Sequence[float] = 1.0,
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    config: ShrinkConfig | None = None,
) -> torch.Tensor:
    """S [M, sum r_i] in ``out_dtype`` (default X's).

    The columns of adapter i are scale_i * (mask_i X) A_iᵀ. x [M, K] fp16/bf16/fp32, any row stride;
    A_i [r_i, K] fp32 or x's dtype, any strides, r_i from 1 to 256; bits: packed keep masks int32
    [M, ceil(K / 32)], one for all or one (or None) for each; scale_i must include 1 / (1 - p).
    Errors: TypeError or ValueError naming the argument, before any launch.
    """
    x = checks.rows("x", x)
    As = list(As)
    if not As:
        raise ValueError("As is empty; allowed: one adapter or more")
    M, K = x.shape
    checks.ranks("As", As)
    As = checks.adapters("As", As, [(None, K)] * len(As), "x has K columns", x.dtype)
    words = checks.masks(bits, len(As), M, K)
    factors = checks.per_adapter("scales", scales, len(As))
    checks.device(x=x, As=As, bits=words)
    out = x.new_empty((M, sum(a.shape[0] for a in As)), dtype=out_dtype or x.dtype)
    if M == 0:
        return out
    if K == 0:
        return out.zero_()
    for launch in plan_shrink(
        x,
        As,
        words,
        factors,
        out,
        config or default_config(M, K, [a.shape[0] for a in As], arch_of(x.device)),
    ):
        launch.run()
    return out
