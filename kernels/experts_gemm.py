"""The grouped product of a mixture with the low-rank part in its accumulator.

    Y[p] = X[t] W_eᵀ + mask ∘ (S[p] B_eᵀ) + bias_e      for each pair p with token t and expert e

It is the forward of a linear of the experts, and with W and B as transposed views the gradient of
its input. Rows are a :class:`.experts_route.Route`'s: a program makes a tile of one group's rows
and a block of N. X is read by token or by sorted row, Y is written by sorted row or by pair, so
that neither tokens nor results are copied into another order. No program has rows of two groups,
and no result depends on other programs.

Tiles are walked in bands of rows, column by column: the tiles of an expert read its block of W one
after the other, while it is in L2.

The low-rank part is after the loop over K or, with a mask and on sm_100, before it, for the reasons
that :mod:`.gemm` gives. W is loaded through a tensor descriptor where its strides and the
architecture allow it, and so is X by sorted row. The other operands, and Y, whose tiles end in the
middle of a group, go through pointers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import checks
from .common import (
    Arch,
    Launch,
    arch_of,
    cast,
    cdiv,
    dot,
    precision,
    rank_end,
    row_stride,
)  # fmt: skip
from .experts_low_rank import add_update, aligned, check_factors, integers
from .experts_route import Route, checked_rows, source_rows
from .launching import planned

BLOCKS_M = (16, 32, 64, 128)  # rows of a tile, which the route decides


@dataclass(frozen=True)
class ExpertsGemmConfig:
    """Output tile [rows of the route's tiles, block_n], step block_k, low-rank chunk block_r.

    ``group_m``: tiles of rows that are walked together (for L2); ``tma``: use descriptors.
    """

    block_n: int = 128
    block_k: int = 64
    block_r: int = 16
    group_m: int = 8
    tma: bool = False
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_k=self.block_k, block_r=self.block_r)
        checks.blocks(self, low=32, block_n=self.block_n)  # whole mask words
        checks.one_or_more(self, group_m=self.group_m)

    def shared_bytes(self, block_m: int, itemsize: int) -> int:
        """Bytes for the pipeline of X and W tiles."""
        return self.num_stages * (block_m + self.block_n) * self.block_k * itemsize


def default_config(
    block_m: int, N: int, arch: Arch, *, masked: bool = False, itemsize: int = 2
) -> ExpertsGemmConfig:
    """A config for tiles of ``block_m`` rows, with the best tile for the matrix unit.

    What is narrower, or without descriptors, would spill registers otherwise.
    """
    tall = block_m == 128
    if itemsize == 4:  # exact products keep operands in registers
        block_k = 16 if tall and arch.blackwell else 32
        return ExpertsGemmConfig(64, block_k, num_warps=8 if block_m >= 64 else 4)
    if arch.capability in (90, 100) and tall and N >= 256:
        return ExpertsGemmConfig(256, 64, tma=True)
    small = arch.shared < 160_000
    return ExpertsGemmConfig(
        128,
        32 if small and tall else 64,
        tma=arch.capability >= 90 and not (masked and tall and small),
        num_warps=8 if tall else 4,
        num_stages=3 if small or tall else 4,
    )


@triton.jit(do_not_specialize=["P", "TILES", "GROUPS"])
def _experts_gemm_kernel(
    y, x, x_tiles, w, w_tiles, bias, s, bs, words, pairs, offsets, tile_group, tile_start,
    ranks, e_strides, n_strides, r_strides,
    P, TILES, GROUPS, N, K, k, x_stride, w_e_stride, w_n_stride, w_k_stride, bias_stride, s_stride,
    y_stride, WORDS, RANK_END,
    ADAPTERS: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, LOW_FIRST: tl.constexpr,
    TMA: tl.constexpr, W_KN: tl.constexpr, ALIGNED: tl.constexpr, WORD_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n, pid = tl.cdiv(N, BLOCK_N), tl.program_id(0)
    band = pid // (GROUP_M * tiles_n)
    in_band = tl.minimum(TILES + 1 - band * GROUP_M, GROUP_M)
    tile = band * GROUP_M + (pid % (GROUP_M * tiles_n)) % in_band
    n0 = (pid % (GROUP_M * tiles_n)) // in_band * BLOCK_N
    col = n0 + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    col_ok = col < N  # [BLOCK_N]
    group = tl.load(tile_group + tile, mask=tile < TILES, other=-1)
    if group < 0:
        # Rows of no group are zero. Spare tiles take them from the end, and with one more than the
        # route has there are enough for any routing, as these rows are like one group more.
        row = P - (TILES + 1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row >= tl.load(offsets + GROUPS)  # [BLOCK_M]
        at = tl.load(pairs + row, mask=row_ok, other=0) if SCATTER else row  # [BLOCK_M]
        tl.store(
            y + at.to(tl.int64)[:, None] * y_stride + col[None, :],
            tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty),
            mask=row_ok[:, None] & col_ok[None, :],
        )
    else:
        expert, adapter = group // ADAPTERS, group % ADAPTERS
        start, end = tl.load(tile_start + tile), tl.load(offsets + group + 1)
        row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < end  # [BLOCK_M]
        # rows of the next group are read as well, as they are there, and not written
        near = tl.minimum(row, P - 1)  # [BLOCK_M]
        x_row = source_rows(pairs, near, k, GATHER)  # [BLOCK_M]

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if LOW_FIRST:
            acc = add_update(
                acc, s, bs, words, ranks, e_strides, n_strides, r_strides, s_stride, expert,
                adapter, row, col, row_ok, col_ok, n0, WORDS * WORD_UNIT,
                RANK_END, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        x_at = x + x_row[:, None] * x_stride  # [BLOCK_M, 1]
        w_at = w + expert.to(tl.int64) * w_e_stride + col.to(tl.int64)[None, :] * w_n_stride
        for k0 in range(0, K, BLOCK_K):
            in_k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            k_ok = in_k < K  # [BLOCK_K]
            if x_tiles is not None:
                x_tile = x_tiles.load([start, k0])  # [BLOCK_M, BLOCK_K]
            else:
                x_tile = tl.load(
                    x_at + in_k[None, :], mask=k_ok[None, :], other=0.0
                )  # [BLOCK_M, BLOCK_K]
            if not TMA:
                w_tile = tl.load(
                    w_at + in_k.to(tl.int64)[:, None] * w_k_stride,
                    mask=k_ok[:, None] & col_ok[None, :],
                    other=0.0,
                )  # [BLOCK_K, BLOCK_N]
            elif W_KN:
                w_tile = tl.reshape(w_tiles.load([expert, k0, n0]), (BLOCK_K, BLOCK_N))
            else:
                w_rows = tl.reshape(w_tiles.load([expert, n0, k0]), (BLOCK_N, BLOCK_K))
                w_tile = tl.trans(w_rows)  # [BLOCK_K, BLOCK_N]
            acc = dot(x_tile, w_tile, acc, PRECISION)
        if s is not None and not LOW_FIRST:
            acc = add_update(
                acc, s, bs, words, ranks, e_strides, n_strides, r_strides, s_stride, expert,
                adapter, row, col, row_ok, col_ok, n0, WORDS * WORD_UNIT,
                RANK_END, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        if bias is not None:
            shift = tl.load(
                bias + expert.to(tl.int64) * bias_stride + col, mask=col_ok, other=0.0
            )  # [BLOCK_N]
            acc += shift.to(tl.float32)[None, :]
        at = tl.load(pairs + near) if SCATTER else row  # [BLOCK_M]
        tl.store(
            y + at.to(tl.int64)[:, None] * y_stride + col[None, :],
            cast(acc, y.dtype.element_ty),
            mask=row_ok[:, None] & col_ok[None, :],
        )


def _describable(t: torch.Tensor) -> bool:
    """True when a tensor descriptor can describe ``t``: inner stride 1, 16-byte base and rows."""
    whole = 16 // t.element_size()
    outer = t.stride()[:-1]
    return (
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(n > 0 and n % whole == 0 for n in outer)
    )


def _described(t: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), [*t.stride()[:-1], 1], list(block))


def plan_gemm(
    y: torch.Tensor,
    x: torch.Tensor,
    route: Route,
    w: torch.Tensor,
    s: torch.Tensor | None,
    bs: Sequence[torch.Tensor | None],
    bias: torch.Tensor | None,
    words: torch.Tensor | None,
    gather: bool,
    scatter: bool,
    arch: Arch,
    config: ExpertsGemmConfig,
) -> list[Launch]:
    """The launch that fills ``y`` [P, N]; the arguments are checked already."""
    _, N, K = w.shape
    c, block_m = config, route.block_m
    w_kn = w.stride(2) != 1 and w.stride(1) == 1
    described = w.transpose(1, 2) if w_kn else w
    tma = c.tma and _describable(described)
    x_tma = c.tma and not gather and _describable(x)
    block = (1, c.block_k, c.block_n) if w_kn else (1, c.block_n, c.block_k)
    some = next((b for b in bs if b is not None), None)
    given = [(some if b is None else b) for b in bs] if some is not None else []
    ranks = [0 if b is None else b.shape[2] for b in bs] if given else []
    unit = 4 if cdiv(N, 32) % 4 == 0 else 1  # mask words that start on 16 bytes
    low_first = some is not None and (arch.blackwell or words is not None)
    args = (
        y, x, _described(x, block_m, c.block_k) if x_tma else None,
        w, _described(described, *block) if tma else None,
        bias, s if some is not None else None, tuple(given), words if some is not None else None,
        route.pairs, route.offsets, route.tile_group, route.tile_start,
        *integers(given, ranks),
        route.P, route.tiles, route.groups, N, K, route.k, row_stride(x),
        *w.stride(), 0 if bias is None else row_stride(bias), 0 if s is None else row_stride(s),
        row_stride(y), cdiv(N, 32) // unit, rank_end(ranks, c.block_r),
    )  # fmt: skip
    meta: dict[str, Any] = dict(
        ADAPTERS=route.adapters, GATHER=gather, SCATTER=scatter, LOW_FIRST=low_first,
        TMA=tma, W_KN=w_kn, ALIGNED=aligned(given, ranks), WORD_UNIT=unit,
        BLOCK_M=block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        BLOCK_R=c.block_r, GROUP_M=c.group_m, PRECISION=precision(x.dtype),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    grid = ((route.tiles + 1) * cdiv(N, c.block_n),)
    return [Launch(_experts_gemm_kernel, grid, args, meta)]


@planned()
def gemm(
    x: torch.Tensor,
    route: Route,
    w: torch.Tensor,
    s: torch.Tensor | None = None,
    b: Sequence[torch.Tensor | None] | None = None,
    *,
    gather: bool,
    scatter: bool,
    bias: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    config: ExpertsGemmConfig | None = None,
) -> torch.Tensor:
    """Y [P, N] in x's dtype, Y[p] = X[t] W_eᵀ + mask ∘ (S[p] B_eᵀ) + bias_e, in one launch.

    Args:
        x: fp16/bf16/fp32, any row stride: [T, K] by token with ``gather``, else [P, K] by sorted
            row.
        route: of the pairs, with tiles of 16, 32, 64 or 128 rows.
        w: [E, N, K] in x's dtype, any strides.
        s: [P, r] in x's dtype by sorted row, with the scale in it, r the largest rank of ``b``.
        b: [E, N, r_i] for each of the route's adapters, fp32 or x's dtype, any strides, r_i from 1
            to 256; None for an adapter that adds nothing.
        gather: x is by token.
        scatter: y is by pair, t·k + j, else by sorted row. Rows of pairs without a group, whose
            expert is E or more, are zero either way.
        bias: [E, N].
        bits: packed keep masks int32 [P, ceil(N / 32)] of S Bᵀ, by sorted row.

    Raises:
        TypeError, ValueError: an argument does not fit; before any launch.
    """
    x = checked_rows("x", x, route, gather)
    if w.dim() != 3:
        raise ValueError(f"w has shape {tuple(w.shape)}; allowed: [E, N, K]")
    (E, N, _), P = w.shape, route.P
    checks.shape("w", w, (route.experts, N, x.shape[1]), "[experts of the route, N, columns of x]")
    if w.dtype != x.dtype:
        raise TypeError(f"w has dtype {w.dtype}; allowed: {x.dtype}, that of x")
    if route.block_m not in BLOCKS_M:
        raise ValueError(f"route has block_m {route.block_m}; allowed: 16, 32, 64, 128")
    if (s is None) != (b is None):
        raise ValueError("s and b: allowed: both, or neither")
    bs: list[torch.Tensor | None] = []
    if s is not None and b is not None:
        s = checks.rows("s", s, (x.dtype,))
        bs = check_factors("b", b, route.adapters, E, 2, N, x.dtype, may_be_none=True)
        largest = max((t.shape[2] for t in bs if t is not None), default=s.shape[1])
        checks.shape("s", s, (P, largest), "[pairs of the route, largest rank of b]")
    if bias is not None:
        checks.shape("bias", bias, (E, N), "[E, N] of w")
        bias = checks.rows("bias", bias)
    words = checks.words("bits", bits, P, N)
    checks.device(x=x, w=w, s=s, b=bs, bias=bias, bits=words, route=route.pairs)
    y = x.new_empty((P, N))
    if not y.numel():
        return y
    arch = arch_of(y.device)
    config = config or default_config(
        route.block_m, N, arch, masked=words is not None, itemsize=x.element_size()
    )
    if (needed := config.shared_bytes(route.block_m, x.element_size())) > arch.shared:
        raise ValueError(
            f"config needs {needed} bytes of shared memory; allowed: {arch.shared} here"
        )
    for launch in plan_gemm(y, x, route, w, s, bs, bias, words, gather, scatter, arch, config):
        launch.run()
    return y
