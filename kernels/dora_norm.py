"""The norms of DoRA: ‖w_n + scale * b_n A‖ for every row of W [N, K].

W is read once, and the sum is never written. A program adds the update to a tile of W in registers
and squares it. K is split over programs, which write fp32 sums of squares; a second kernel adds
them in index order and takes the root. (The norm also follows from ‖w_n‖² and W Aᵀ, but these terms
cancel when the update removes most of a row.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Arch, Launch, arch_of, cdiv, dot, padded
from .launching import planned

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RANKS = 32  # largest rank of one product, whose halves are in registers; more are done in chunks


def reference(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The norms [N] in float64."""
    whole = w.double() + scale * (b.double() @ a.double())
    norms: torch.Tensor = torch.linalg.vector_norm(whole, dim=1)
    return norms


@dataclass(frozen=True)
class NormConfig:
    """Tiles of W [block_n, block_k]; K is split into split_k parts."""

    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, block_n=self.block_n, block_k=self.block_k)
        if self.split_k < 1:
            raise ValueError(f"NormConfig.split_k is {self.split_k}; allowed: 1 or more")


def default_config(N: int, K: int, arch: Arch, itemsize: int = 2) -> NormConfig:
    """A config with tall tiles, which read A seldom; every multiprocessor gets two programs."""
    blocks = cdiv(N, 64)
    split = max(1, min(cdiv(2 * arch.sms, blocks), cdiv(K, 256)))
    return NormConfig(split_k=split, num_stages=3)


@triton.jit
def _norm_kernel(
    w, a, b, out, scale, N, K, R, K_PART,
    w_n_stride, w_k_stride, a_r_stride, a_k_stride, b_n_stride, b_r_stride,
    ROOT: tl.constexpr, ONE_CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    part = tl.program_id(1)
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    n_ok = n < N  # [BLOCK_N]
    n64 = n.to(tl.int64)  # [BLOCK_N]
    w_row = w + n64[:, None] * w_n_stride  # [BLOCK_N, 1]
    b_row = b + n64[:, None] * b_n_stride  # [BLOCK_N, 1]
    if ONE_CHUNK:
        b_tile = tl.load(
            b_row + rank[None, :] * b_r_stride, mask=n_ok[:, None] & (rank < R)[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_R]
    total = tl.zeros((BLOCK_N,), tl.float32)
    last = tl.minimum((part + 1) * K_PART, K)
    # without a product of W, its loads are made ahead only where the loop itself asks for it
    for k0 in tl.range(part * K_PART, last, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_ok = k < last  # [BLOCK_K]
        k64 = k.to(tl.int64)  # [BLOCK_K]
        tile = tl.load(
            w_row + k64[None, :] * w_k_stride, mask=n_ok[:, None] & k_ok[None, :], other=0.0
        )  # [BLOCK_N, BLOCK_K]
        update = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for r0 in tl.range(0, BLOCK_R if ONE_CHUNK else R, BLOCK_R, num_stages=1):
            r = r0 + rank  # [BLOCK_R]
            if not ONE_CHUNK:
                b_tile = tl.load(
                    b_row + r[None, :] * b_r_stride,
                    mask=n_ok[:, None] & (r < R)[None, :],
                    other=0.0,
                )  # [BLOCK_N, BLOCK_R]
            a_tile = tl.load(
                a + r.to(tl.int64)[:, None] * a_r_stride + k64[None, :] * a_k_stride,
                mask=(r < R)[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            update = dot(b_tile, a_tile, update, PRECISION)
        whole = tile.to(tl.float32) + update * scale  # [BLOCK_N, BLOCK_K]
        total += tl.sum(whole * whole, 1)
    tl.store(out + part.to(tl.int64) * N + n, tl.sqrt(total) if ROOT else total, mask=n_ok)


@triton.jit
def _root_kernel(partials, out, P, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = n < N  # [BLOCK]
    total = tl.zeros((BLOCK,), tl.float32)
    source = partials + n  # [BLOCK]
    for _ in range(P):
        total += tl.load(source, mask=ok, other=0.0)
        source += N
    tl.store(out + n, tl.sqrt(total), mask=ok)


def plan_norms(
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    config: NormConfig,
) -> list[Launch]:
    """The launches that fill ``out`` [N] fp32; arguments are checked, a and b have one dtype."""
    (N, K), r = w.shape, a.shape[0]
    k_part = cdiv(cdiv(K, config.split_k), config.block_k) * config.block_k
    split = cdiv(K, k_part)
    block_r = min(RANKS, padded(r))
    stages = config.num_stages if r <= block_r else 1  # a loop around a loop is not pipelined
    sums = out if split == 1 else out.new_empty((split, N))
    args = (
        w, a, b, sums, float(scale), N, K, r, k_part,
        w.stride(0), w.stride(1), a.stride(0), a.stride(1), b.stride(0), b.stride(1),
    )  # fmt: skip
    meta = dict(
        ROOT=split == 1, ONE_CHUNK=r <= block_r,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        # "tf32x3": three products of halves keep the precision of fp32 adapters
        PRECISION="tf32x3" if a.dtype == torch.float32 else "ieee",
        STAGES=stages, num_warps=config.num_warps, num_stages=stages,
    )  # fmt: skip
    launches = [Launch(_norm_kernel, (cdiv(N, config.block_n), split), args, meta)]
    if split > 1:
        meta = dict(BLOCK=128, num_warps=4, num_stages=1)
        launches.append(Launch(_root_kernel, (cdiv(N, 128),), (sums, out, split, N), meta))
    return launches


@planned("scale")
def row_norms(
    w: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float = 1.0,
    *,
    config: NormConfig | None = None,
) -> torch.Tensor:
    """The norms ‖w_n + scale * b_n A‖, fp32 [N], in one launch or two.

    w [N, K] fp16/bf16/fp32, any strides (Conv1D's [K, N]: pass its transpose); a [r, K], b [N, r]
    fp32 or w's dtype, any strides, r from 1 to 256. Errors: TypeError, ValueError, before any
    launch.
    """
    checks.matrix("w", w)
    if w.dtype not in DTYPES:
        raise TypeError(f"w has dtype {w.dtype}; allowed: float16, bfloat16, float32")
    (N, K), r = w.shape, a.shape[0]
    checks.matrix("a", a)
    checks.rank("a", r)
    checks.shape("a", a, (r, K), "[r, columns of w]")
    checks.matrix("b", b)
    checks.shape("b", b, (N, r), "[rows of w, rows of a]")
    checks.adapter_dtype("a", a, w.dtype)
    checks.adapter_dtype("b", b, w.dtype)
    checks.device(w=w, a=a, b=b)
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    out = w.new_empty(N, dtype=torch.float32)
    if N == 0 or K == 0:
        return out.zero_()
    config = config or default_config(N, K, arch_of(w.device), w.element_size())
    for launch in plan_norms(w, a, b, scale, out, config):
        launch.run()
    return out
