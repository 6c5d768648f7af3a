"""Decoding: Y = X Wᵀ + scale * (X Aᵀ) Bᵀ + bias for M <= 16 rows, in one launch.

Every program computes block_n outputs and reads its rows of W once. Each program also computes the
low-rank S [M, r] again (A is small and stays in L2), which needs no second launch and no exchange
between programs. If that repetition moves more bytes (large r, wide N), pass ``s`` from
:func:`shrink.shrink`. Only the output is allocated and nothing syncs, so the launch can be captured
in a CUDA graph. For batches whose rows name different adapters see :mod:`.mixed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from . import checks
from .common import Arch, Launch, arch_of, cast, cdiv, dot, padded, precision, row_stride

MAX_ROWS = 16
VECTOR_RANK = 64  # with a larger rank the one-row kernel would need too many registers for A


@dataclass(frozen=True)
class DecodeConfig:
    """Outputs of a program (block_n), and the part of K that it reads at a time (block_k)."""

    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, low=1, block_n=self.block_n)
        checks.blocks(self, block_k=self.block_k)


def default_config(M: int, N: int, r: int, arch: Arch) -> DecodeConfig:
    """The config with the widest block that gives every multiprocessor a program."""
    if M == 1 and r <= VECTOR_RANK:
        block_n = 16 if cdiv(N, 16) >= arch.sms else 8 if cdiv(N, 8) >= arch.sms else 4
        return DecodeConfig(
            block_n=block_n, block_k=512 if r <= 32 and arch.capability >= 90 else 256, num_warps=8
        )
    block_n = 64
    while block_n > 16 and cdiv(N, block_n) < arch.sms:
        block_n //= 2
    return DecodeConfig(
        block_n=block_n,
        block_k=128 if r <= 64 else 64,
        num_stages=3 if r <= (64 if arch.shared > 80_000 else 16) else 2,
    )


@triton.jit
def _gemv_kernel(
    y, x, w, a, b, s, bias, scale, N, K, R,
    w_n_stride, w_k_stride, a_r_stride, b_n_stride, b_r_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row, no tensor cores: a sum for each column of a K block, all added at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok, rank_ok = n < N, rank < R  # [BLOCK_N], [BLOCK_R]
    n64 = n.to(tl.int64)  # [BLOCK_N]
    w_row = w + n64[:, None] * w_n_stride  # [BLOCK_N, 1]
    y_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < K  # [BLOCK_K]
        xs = tl.load(x + k, mask=k_ok, other=0.0)  # [BLOCK_K]
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        wide = xs.to(tl.float32)[None, :]  # [1, BLOCK_K]
        y_acc += ws.to(tl.float32) * wide
        if s is None:
            a_tile = tl.load(
                a + rank.to(tl.int64)[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            s_acc += cast(a_tile, xs.dtype).to(tl.float32) * wide
    if s is None:
        low = cast(tl.sum(s_acc, 1) * scale, x.dtype.element_ty)  # [BLOCK_R]
    else:
        low = tl.load(s + rank, mask=rank_ok, other=0.0)  # [BLOCK_R]
    b_tile = tl.load(
        b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride,
        mask=n_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_R]
    b_tile = cast(b_tile, x.dtype.element_ty).to(tl.float32)
    out = tl.sum(y_acc, 1) + tl.sum(b_tile * low.to(tl.float32)[None, :], 1)  # [BLOCK_N]
    if bias is not None:
        out += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n_ok)


@triton.jit(do_not_specialize=["M"])
def _rows_kernel(
    y, x, w, a, b, s, bias, scale, M, N, K, R, x_stride, s_stride,
    w_n_stride, w_k_stride, a_r_stride, b_n_stride, b_r_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to 16 rows; products are transposed (W tile times Xᵀ), as tensor cores need a tall W."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok, m_ok, rank_ok = n < N, m < M, rank < R  # [BLOCK_N], [BLOCK_M], [BLOCK_R]
    n64, rank64 = n.to(tl.int64), rank.to(tl.int64)  # [BLOCK_N], [BLOCK_R]
    dtype = x.dtype.element_ty
    x_row = x + m.to(tl.int64)[:, None] * x_stride  # [BLOCK_M, 1]
    w_row = w + n64[:, None] * w_n_stride  # [BLOCK_N, 1]
    b_tiles = b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride  # [BLOCK_N, BLOCK_R]
    b_ok = n_ok[:, None] & rank_ok[None, :]  # [BLOCK_N, BLOCK_R]
    y_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < K  # [BLOCK_K]
        xs = tl.trans(
            tl.load(x_row + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        )  # [BLOCK_K, BLOCK_M]
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        y_acc = dot(ws, xs, y_acc, PRECISION)
        if s is None:
            a_tile = tl.load(
                a + rank64[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            s_acc = dot(cast(a_tile, dtype), xs, s_acc, PRECISION)

    if s is None:
        low = cast(s_acc * scale, dtype)  # [BLOCK_R, BLOCK_M]
    else:
        low = tl.trans(
            tl.load(
                s + m.to(tl.int64)[:, None] * s_stride + rank[None, :],
                mask=m_ok[:, None] & rank_ok[None, :],
                other=0.0,
            )
        )  # [BLOCK_R, BLOCK_M]
    y_acc = dot(cast(tl.load(b_tiles, mask=b_ok, other=0.0), dtype), low, y_acc, PRECISION)
    if bias is not None:
        y_acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + m.to(tl.int64)[None, :] * N + n[:, None],
        cast(y_acc, y.dtype.element_ty),
        mask=n_ok[:, None] & m_ok[None, :],
    )


def plan_decode(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    s: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    config: DecodeConfig,
) -> list[Launch]:
    """The launch that fills ``y`` [M, N] (contiguous); the arguments are checked already."""
    (M, K), (N, r) = x.shape, b.shape
    a_stride = 0 if a is None else a.stride(0)
    tail = (w.stride(0), w.stride(1), a_stride, b.stride(0), b.stride(1))
    block_r = padded(r)
    meta: dict[str, Any] = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    if M == 1 and r <= VECTOR_RANK:
        vector = (y, x, w, a, b, s, bias, scale, N, K, r, *tail)
        meta |= dict(BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r)
        return [Launch(_gemv_kernel, (cdiv(N, config.block_n),), vector, meta)]
    s_stride = 0 if s is None else row_stride(s)
    args = (y, x, w, a, b, s, bias, scale, M, N, K, r, row_stride(x), s_stride, *tail)
    block_n = max(16, config.block_n)
    meta |= dict(
        BLOCK_M=16, BLOCK_N=block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    return [Launch(_rows_kernel, (cdiv(N, block_n),), args, meta)]


def decode(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    *,
    s: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Y [M, N] in x's dtype = x Wᵀ + scale * (x Aᵀ) Bᵀ + bias, for M <= 16, in one launch.

    x [M, K] fp16/bf16/fp32; w [N, K] x's dtype, any strides (for Conv1D's [K, N] pass its
    transpose); a [r, K], b [N, r] fp32 or x's dtype, r from 1 to 256; bias [N]. s [M, r] x's dtype,
    with the scale in it, is given in place of a. Errors: TypeError, ValueError, before any launch.
    """
    x = checks.rows("x", x)
    M, K = x.shape
    if M > MAX_ROWS:
        raise ValueError(
            f"x has {M} rows; allowed: at most {MAX_ROWS} (use the gemm or expand kernels)"
        )
    checks.matrix("w", w)
    N = w.shape[0]
    checks.shape("w", w, (N, K), "[N, K], K as x")
    if w.dtype != x.dtype:
        raise TypeError(f"w has dtype {w.dtype}; allowed: {x.dtype}, that of x")
    if (a is None) == (s is None):
        raise ValueError("a and s: allowed: exactly one of them")
    checks.matrix("b", b)
    r = b.shape[1]
    checks.rank("b", r)
    checks.adapter_dtype("b", b, x.dtype)
    checks.shape("b", b, (N, r), "N rows as w")
    if a is not None:
        checks.matrix("a", a)
        checks.shape("a", a, (r, K), "rank as b, K as x")
        checks.adapter_dtype("a", a, x.dtype)
        if a.stride(1) != 1 and K > 1:
            a = a.contiguous()
    if s is not None:
        s = checks.rows("s", s, (x.dtype,))
        checks.shape("s", s, (M, r), "[rows of x, rank]")
    if bias is not None:
        checks.shape("bias", bias, (N,), "w has N rows")
        bias = bias.contiguous()
    checks.device(x=x, w=w, a=a, b=b, bias=bias, s=s)
    y = x.new_empty((M, N))
    if y.numel():
        config = config or default_config(M, N, r, arch_of(x.device))
        for launch in plan_decode(y, x, w, a, b, s, bias, float(scale), config):
            launch.run()
    return y
