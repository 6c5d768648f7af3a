"""Shrink and expand in one launch, for the order in which the vendor's product comes last.

    S_i [M, r_i] = scale_i * (mask_i X) A_iᵀ
    Y_i [M, N_i] = S_i B_iᵀ + bias_i        for every projection i that reads X

A program has its rows of S in registers and computes all columns of each Y with them, so S is not
read again and one launch is saved. It reads all of K for a row before the first column of Y. With
few rows there are too few programs; :mod:`.shrink` (which splits K) with :mod:`.expand` is better
then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .bits import DRAWN, ROUNDS, Draw, seed_of
from .common import Arch, Launch, arch_of, cast, cdiv, dot, padded, precision, row_stride
from .launching import planned
from .shrink import LAUNCH_RANK, accumulate, drawn_in, masks_to_fill, steps


@dataclass(frozen=True)
class ShrinkExpandConfig:
    """Tiles of X [block_m, block_k] for the shrink, of Y [block_m, block_n] for the expand."""

    block_m: int = 64
    block_k: int = 64
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_m=self.block_m, block_n=self.block_n)
        checks.blocks(self, low=32, block_k=self.block_k)  # whole mask words


def fits(M: int, ranks: Sequence[int], arch: Arch) -> bool:
    """True when one launch can hold these ranks, and M rows give enough programs for the device."""
    held = padded(*ranks)
    return held <= LAUNCH_RANK and cdiv(M, 32) >= arch.sms * 3 // 4


def default_config(
    M: int, ranks: Sequence[int], arch: Arch, itemsize: int = 2, masked: bool = False
) -> ShrinkExpandConfig:
    """A config with as many rows for a program as still give every multiprocessor a program.

    Each program reads all of A and B, so that few tall ones with many bytes on the way are better
    than many small ones.
    """
    held = padded(*ranks)
    block_m = 64 if cdiv(M, 64) >= arch.sms * 3 // 4 else 32
    if not arch.warpgroups and held > 64:
        block_m = 32
    narrow = 32 if block_m == 32 and arch.capability == 90 else 64  # 64 spill there with a draw
    exact = itemsize == 4 and not arch.warpgroups  # 128 of fp32 spill there (Triton 3.9)
    block_k, num_stages = steps(block_m, held, cdiv(M, block_m), arch, itemsize, masked)
    return ShrinkExpandConfig(
        block_m=block_m,
        block_k=block_k,
        block_n=128 if held <= 64 and not exact else narrow,
        num_warps=8 if block_m == 64 or held > (64 if arch.capability == 90 else 32) else 4,
        num_stages=num_stages,
    )


@triton.jit(do_not_specialize=[*DRAWN], do_not_specialize_on_alignment=["seed_ptr"])
def _shrink_expand_kernel(
    x, As, words, s_out, Bs, biases, ys, ranks, columns, scales,
    a_r_strides, a_k_strides, b_n_strides, b_r_strides, y_strides, Ns,
    M, K, x_stride, s_stride, WORDS, seed_ptr, seed_lo, seed_hi, threshold, fraction,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, DIGITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ok = row < M  # [BLOCK_M]
    row64 = row.to(tl.int64)  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    seed = 0
    if DIGITS > 0:
        seed = seed_of(seed_ptr, seed_lo, seed_hi)
    acc = accumulate(
        x + row64[:, None] * x_stride, As, words, ranks, a_r_strides, a_k_strides,
        row, row_ok, 0, K, WORDS, G, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        seed, K, threshold, fraction, DIGITS, ROUNDS,
    )  # fmt: skip
    for i in tl.static_range(G):
        rank_ok = rank < ranks[i]  # [BLOCK_R]
        s = cast(acc[i] * scales[i], s_out.dtype.element_ty)  # [BLOCK_M, BLOCK_R]
        tl.store(
            s_out + row64[:, None] * s_stride + (columns[i] + rank)[None, :],
            s,
            mask=row_ok[:, None] & rank_ok[None, :],
        )
        y_row = ys[i] + row64[:, None] * y_strides[i]  # [BLOCK_M, 1]
        for n0 in range(0, Ns[i], BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            n_ok = n < Ns[i]  # [BLOCK_N]
            b = tl.load(
                Bs[i]
                + rank.to(tl.int64)[:, None] * b_r_strides[i]
                + n.to(tl.int64)[None, :] * b_n_strides[i],
                mask=rank_ok[:, None] & n_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_N]
            y = dot(s, cast(b, s.dtype), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            if biases[i] is not None:
                y += tl.load(biases[i] + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
            tl.store(
                y_row + n[None, :],
                cast(y, ys[i].dtype.element_ty),
                mask=row_ok[:, None] & n_ok[None, :],
            )


def plan_shrink_expand(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    s: torch.Tensor,
    ys: Sequence[torch.Tensor],
    config: ShrinkExpandConfig,
    draw: Draw | None = None,
) -> list[Launch]:
    """The launch that fills ``s`` [M, sum r] (contiguous) and ys[i] [M, N_i], with draw also words.

    The arguments are checked already, and one launch can hold the ranks.
    """
    (M, K), ranks = x.shape, tuple(a.shape[0] for a in As)
    columns = tuple(sum(ranks[:i]) for i in range(len(ranks)))
    drawn, digits = drawn_in(draw, x.device)
    args = (
        x, tuple(As), tuple(words), s, tuple(Bs), tuple(biases), tuple(ys),
        ranks, columns, tuple(float(c) for c in scales),
        tuple(a.stride(0) for a in As), tuple(a.stride(1) for a in As),
        tuple(b.stride(0) for b in Bs), tuple(b.stride(1) for b in Bs),
        tuple(row_stride(y) for y in ys), tuple(y.shape[1] for y in ys),
        M, K, row_stride(x), s.shape[1], cdiv(K, 32), *drawn,
    )  # fmt: skip
    meta = dict(
        G=len(As), BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_N=config.block_n,
        BLOCK_R=padded(max(ranks)), PRECISION=precision(x.dtype), DIGITS=digits, ROUNDS=ROUNDS,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return [Launch(_shrink_expand_kernel, (cdiv(M, config.block_m),), args, meta)]


@planned("scales", seeds=["draw"])
def shrink_expand(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    scales: float | Sequence[float] = 1.0,
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    draw: Draw | None = None,
    config: ShrinkExpandConfig | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(S [M, sum r_i], [Y_i [M, N_i]]) in x's dtype, in one launch.

    The columns of adapter i of S are scale_i * (mask_i X) A_iᵀ; Y_i = S_i B_iᵀ + bias_i.
    x [M, K] fp16/bf16/fp32, any row stride; A_i [r_i, K], B_i [N_i, r_i] fp32 or x's dtype, any
    strides. Ranks are 1 or more; the sum of the ranks, each rounded up to a power of two of at
    least 16, is at most 128. bits and draw as in :func:`.shrink.shrink`; bias_i [N_i] or None.
    Errors: TypeError or ValueError naming the argument, before any launch.
    """
    x = checks.rows("x", x)
    As, Bs = list(As), list(Bs)
    M, K = x.shape
    checks.counts(As=As, Bs=Bs)
    checks.ranks("As", As)
    ranks = [a.shape[0] for a in As]
    As = checks.adapters("As", As, [(None, K)] * len(As), "x has K columns", x.dtype)
    Bs = checks.adapters("Bs", Bs, [(None, r) for r in ranks], "[N, rows of As[{i}]]", x.dtype)
    if padded(*ranks) > LAUNCH_RANK:
        raise ValueError(
            f"As have ranks {ranks}, {padded(*ranks)} with padding; allowed: "
            f"{LAUNCH_RANK} together (use shrink and expand)"
        )
    if draw is not None:
        masks_to_fill(bits, draw, ranks)
    words = checks.masks(bits, len(As), M, K)
    biases = checks.per_adapter("biases", biases, len(As))
    for i, (c, b) in enumerate(zip(biases, Bs, strict=True)):
        if c is not None:
            checks.shape(f"biases[{i}]", c, (b.shape[0],), f"Bs[{i}] has N rows")
    biases = [None if c is None else c.contiguous() for c in biases]
    checks.device(x=x, As=As, Bs=Bs, bits=words, biases=biases)
    s = x.new_empty((M, sum(ranks)))
    ys = [x.new_empty((M, b.shape[0])) for b in Bs]
    if M:
        masked = any(w is not None for w in words)
        config = config or default_config(M, ranks, arch_of(x.device), x.element_size(), masked)
        factors = checks.per_adapter("scales", scales, len(As))
        for launch in plan_shrink_expand(x, As, Bs, words, biases, factors, s, ys, config, draw):
            launch.run()
    return s, ys
