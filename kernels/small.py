"""Decode: Y = X Wᵀ + scale * (X Aᵀ) Bᵀ + bias for M <= 16 rows, in one launch over raw pointers.

Every program owns block_n outputs and streams its rows of W once; the low-rank S is computed again
by each program beside it (A is small and stays in L2), which costs no second launch and no exchange
between programs. Where that repetition is the larger traffic (large r, wide N), pass ``s`` from
:func:`shrink.shrink`. Nothing is allocated but the output, nothing syncs, so the launch can be
captured in a CUDA graph. With ``index``, row m uses adapter index[m] of stacked A [L, r, K], B [L,
N, r] (ranks padded with zeros); -1 is the base layer alone.
"""

from __future__ import annotations

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
    check_matrix,
    check_rank,
    check_shape,
    dot,
    next_pow2,
    precision,
    row_stride,
    rows,
)

MAX_ROWS = 16
VECTOR_RANK = 64  # above it the one-row kernel would hold too much of A in registers


@dataclass(frozen=True)
class SmallConfig:
    """Outputs a program, and how much of K it reads at a time."""

    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_blocks(self, low=1, block_n=self.block_n)
        check_blocks(self, block_k=self.block_k)


def default_config(M: int, N: int, r: int, arch: Arch) -> SmallConfig:
    """The widest block that still gives every multiprocessor a program."""
    if M == 1 and r <= VECTOR_RANK:
        block_n = 16 if cdiv(N, 16) >= arch.sms else 8 if cdiv(N, 8) >= arch.sms else 4
        return SmallConfig(
            block_n=block_n, block_k=512 if r <= 32 and arch.capability >= 90 else 256, num_warps=8
        )
    block_n = 64
    while block_n > 16 and cdiv(N, block_n) < arch.sms:
        block_n //= 2
    return SmallConfig(
        block_n=block_n,
        block_k=128 if r <= 64 else 64,
        num_stages=3 if r <= (64 if arch.shared > 80_000 else 16) else 2,
    )


@triton.jit
def _gemv_kernel(
    y, x, w, a, b, s, bias, index, scales, scale, N, K, R, L,
    w_n_stride, w_k_stride, a_l_stride, a_r_stride, b_l_stride, b_n_stride, b_r_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One row, no tensor core: products stay apart by column of K and are summed at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    n_ok, rank_ok = n < N, rank < R
    n64 = n.to(tl.int64)
    if index is not None:
        adapter = tl.load(index).to(tl.int64)
        used = (adapter >= 0) & (adapter < L)
        adapter = tl.where(used, adapter, 0)
        scale = tl.load(scales + adapter)
        if a is not None:
            a += adapter * a_l_stride
        b += adapter * b_l_stride
        rank_ok = rank < tl.where(used, R, 0)  # no adapter: nothing of it is read
    w_row = w + n64[:, None] * w_n_stride
    y_acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < K
        xs = tl.load(x + k, mask=k_ok, other=0.0)
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        wide = xs.to(tl.float32)[None, :]
        y_acc += ws.to(tl.float32) * wide
        if s is None:
            a_tile = tl.load(
                a + rank.to(tl.int64)[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )
            s_acc += cast(a_tile, xs.dtype).to(tl.float32) * wide
    if s is None:
        low = cast(tl.sum(s_acc, 1) * scale, x.dtype.element_ty)
    else:
        low = tl.load(s + rank, mask=rank_ok, other=0.0)
    b_tile = tl.load(
        b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride,
        mask=n_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )
    b_tile = cast(b_tile, x.dtype.element_ty).to(tl.float32)
    out = tl.sum(y_acc, 1) + tl.sum(b_tile * low.to(tl.float32)[None, :], 1)
    if bias is not None:
        out += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)
    tl.store(y + n, cast(out, y.dtype.element_ty), mask=n_ok)


@triton.jit
def _rows_kernel(
    y, x, w, a, b, s, bias, index, scales, scale, M, N, K, R, L, x_stride, s_stride,
    w_n_stride, w_k_stride, a_l_stride, a_r_stride, b_l_stride, b_n_stride, b_r_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to 16 rows. The products are transposed (W tile times Xᵀ), so that W is the tall operand
    of the tensor core.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    n_ok, m_ok, rank_ok = n < N, m < M, rank < R
    n64, rank64 = n.to(tl.int64), rank.to(tl.int64)
    dtype = x.dtype.element_ty
    x_row = x + m.to(tl.int64)[:, None] * x_stride
    w_row = w + n64[:, None] * w_n_stride
    b_tiles = b + n64[:, None] * b_n_stride + rank[None, :] * b_r_stride
    b_ok = n_ok[:, None] & rank_ok[None, :]
    y_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < K
        xs = tl.trans(tl.load(x_row + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0))
        ws = tl.load(
            w_row + k.to(tl.int64)[None, :] * w_k_stride,
            mask=n_ok[:, None] & k_ok[None, :],
            other=0.0,
        )
        y_acc = dot(ws, xs, y_acc, PRECISION)
        if s is None and index is None:
            a_tile = tl.load(
                a + rank64[:, None] * a_r_stride + k[None, :],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )
            s_acc = dot(cast(a_tile, dtype), xs, s_acc, PRECISION)

    if index is None:
        if s is None:
            low = cast(s_acc * scale, dtype)
        else:
            low = tl.trans(
                tl.load(
                    s + m.to(tl.int64)[:, None] * s_stride + rank[None, :],
                    mask=m_ok[:, None] & rank_ok[None, :],
                    other=0.0,
                )
            )
        y_acc = dot(cast(tl.load(b_tiles, mask=b_ok, other=0.0), dtype), low, y_acc, PRECISION)
    else:
        adapters = tl.load(index + m, mask=m_ok, other=-1).to(tl.int64)
        for j in range(0, M):
            # Each distinct adapter once, at its first row, for all rows that name it.
            adapter = tl.load(index + j).to(tl.int64)
            seen = tl.sum(((adapters == adapter) & (m < j)).to(tl.int32), 0)
            if (adapter >= 0) & (adapter < L) & (seen == 0):
                if s is None:
                    part = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
                    for k0 in range(0, K, BLOCK_K):
                        k = k0 + tl.arange(0, BLOCK_K)
                        k_ok = k < K
                        xs = tl.trans(
                            tl.load(
                                x_row + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0
                            )
                        )
                        a_tile = tl.load(
                            a + adapter * a_l_stride + rank64[:, None] * a_r_stride + k[None, :],
                            mask=rank_ok[:, None] & k_ok[None, :],
                            other=0.0,
                        )
                        part = dot(cast(a_tile, dtype), xs, part, PRECISION)
                    low = cast(part * tl.load(scales + adapter), dtype)
                else:
                    low = tl.trans(
                        tl.load(
                            s + m.to(tl.int64)[:, None] * s_stride + rank[None, :],
                            mask=m_ok[:, None] & rank_ok[None, :],
                            other=0.0,
                        )
                    )
                low = tl.where((adapters == adapter)[None, :], low, 0.0).to(dtype)
                b_tile = tl.load(b_tiles + adapter * b_l_stride, mask=b_ok, other=0.0)
                y_acc = dot(cast(b_tile, dtype), low, y_acc, PRECISION)
    if bias is not None:
        y_acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + m.to(tl.int64)[None, :] * N + n[:, None],
        cast(y_acc, y.dtype.element_ty),
        mask=n_ok[:, None] & m_ok[None, :],
    )


def plan_small(
    y: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    s: torch.Tensor | None,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    scales: torch.Tensor | None,
    scale: float,
    config: SmallConfig,
) -> list[Launch]:
    """The one launch that fills ``y`` [M, N] (contiguous); arguments already checked, a [L, r, K]
    and b [L, N, r].
    """
    (M, K), N, r = x.shape, w.shape[0], b.shape[2]
    a_strides = (0, 0) if a is None else (a.stride(0), a.stride(1))
    tail = (w.stride(0), w.stride(1), *a_strides, b.stride(0), b.stride(1), b.stride(2))
    block_r = max(16, next_pow2(r))
    meta = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    grid = (cdiv(N, config.block_n),)
    if M == 1 and r <= VECTOR_RANK:
        args = (y, x, w, a, b, s, bias, index, scales, scale, N, K, r, b.shape[0], *tail)
        meta |= dict(BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r)
        return [Launch(_gemv_kernel, grid, args, meta)]
    s_stride = 0 if s is None else row_stride(s)
    args = (
        y,
        x,
        w,
        a,
        b,
        s,
        bias,
        index,
        scales,
        scale,
        M,
        N,
        K,
        r,
        b.shape[0],
        row_stride(x),
        s_stride,
        *tail,
    )
    meta |= dict(
        BLOCK_M=16, BLOCK_N=max(16, config.block_n), BLOCK_K=config.block_k, BLOCK_R=block_r,
        PRECISION=precision(x.dtype),
    )  # fmt: skip
    return [Launch(_rows_kernel, (cdiv(N, max(16, config.block_n)),), args, meta)]


def check_index(index: torch.Tensor, M: int, L: int) -> None:
    """Shape and dtype always; the values (-1 to L - 1) where they can be seen without a sync, i.e.
    on the CPU.

    Call it on the host copy before moving an index to the GPU: the kernels treat an index out of
    range as -1.
    """
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index has dtype {index.dtype}; allowed: torch.int32, torch.int64")
    check_shape("index", index, (M,), "one adapter for each row of x")
    if index.device.type == "cpu" and M and not -1 <= int(index.min()) <= int(index.max()) < L:
        bad = int(index.min()) if int(index.min()) < -1 else int(index.max())
        raise ValueError(f"index holds {bad}; allowed: -1 (base only) to {L - 1}, for {L} adapters")


def decode(
    x: torch.Tensor,
    w: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    *,
    index: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
    config: SmallConfig | None = None,
) -> torch.Tensor:
    """Y [M, N] in x's dtype = x Wᵀ + scale * (x Aᵀ) Bᵀ + bias, M <= 16, one launch.

    x [M, K] fp16/bf16/fp32; w [N, K] x's dtype, any strides (for Conv1D's [K, N] pass its
    transpose); a [r, K], b [N, r] fp32 or x's dtype, r from 1 to 256; bias [N]. Mixed batch: index
    int32/int64 [M] of -1..L-1, a [L, r, K], b [L, N, r], scales fp32 [L] in place of scale. s [M,
    r] x's dtype, scale included, replaces a where given. Errors: TypeError, ValueError, before any
    launch.
    """
    x = rows("x", x)
    M, K = x.shape
    if M > MAX_ROWS:
        raise ValueError(
            f"x has {M} rows; allowed: at most {MAX_ROWS} (use the gemm or write kernels)"
        )
    check_matrix("w", w)
    N = w.shape[0]
    check_shape("w", w, (N, K), "[N, K], K as x")
    if w.dtype != x.dtype:
        raise TypeError(f"w has dtype {w.dtype}; allowed: {x.dtype}, that of x")
    if (a is None) == (s is None):
        raise ValueError("a and s: allowed: exactly one of them")
    dims = 2 if index is None else 3
    for name, t in (("a", a), ("b", b)):
        if t is not None and t.dim() != dims:
            shape = "[r, K], [N, r]" if index is None else "[L, r, K], [L, N, r] with index"
            raise ValueError(f"{name} has shape {tuple(t.shape)}; allowed: a, b of {shape}")
    r = b.shape[-1]
    check_rank("b", r)
    check_adapter_dtype("b", b, x.dtype)
    if index is None:
        b = b[None]
        a = None if a is None else a[None]
    L = b.shape[0]
    check_shape("b", b, (L, N, r), "N rows as w")
    if a is not None:
        check_shape("a", a, (L, r, K), "adapters and rank as b, K as x")
        check_adapter_dtype("a", a, x.dtype)
        if a.stride(2) != 1 and K > 1:
            a = a.contiguous()
    if s is not None:
        s = rows("s", s, (x.dtype,))
        check_shape("s", s, (M, r), "[rows of x, rank]")
    if bias is not None:
        check_shape("bias", bias, (N,), "w has N rows")
        bias = bias.contiguous()
    if index is not None:
        check_index(index, M, L)
        index = index.contiguous()
        if scales is None or scales.dtype != torch.float32:
            raise TypeError(
                f"scales is {None if scales is None else scales.dtype}; "
                "allowed with index: torch.float32"
            )
        check_shape("scales", scales, (L,), "one for each adapter")
    check_device(x=x, w=w, a=a, b=b, bias=bias, index=index, scales=scales, s=s)
    y = x.new_empty((M, N))
    if y.numel():
        config = config or default_config(M, N, r, arch_of(x.device))
        for launch in plan_small(y, x, w, a, b, s, bias, index, scales, float(scale), config):
            launch.run()
    return y
