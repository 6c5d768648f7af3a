"""The gradients of X and A through (mask X) Aᵀ, in one pass over X.

    dA_i [r_i, K] = dS_iᵀ (mask_i X)                  for each adapter of a group
    D    [M, K]   = sum over i of mask_i * (dS_i A_i)   the low-rank part of dX

The vendor's products dY_i W_i are then added to D; one that adds to nothing is what D is added to.
The mask is used nowhere else in the backward. A program reads a strip of columns of X, block by
block of rows: the mask and dS are read once for both results. :func:`.grad_a.grad_a` with
:func:`.expand.low_rank_grad_input` would be one launch more. M is not split if the strips fill the
device, so that dA needs no second stage.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    padded,
    precision,
    row_stride,
)  # fmt: skip
from .flight import stages
from .grad_a import GROUP_RANK, GradAConfig, strips
from .launching import planned
from .reduce import plan_sum


@dataclass(frozen=True)
class GradXAConfig(GradAConfig):
    """Tiles of X [block_m, block_k]; M is split into split_m parts, as for ``grad_a``."""


def fits(ranks: Sequence[int]) -> bool:
    """True when one launch can hold the accumulators of these ranks."""
    return padded(*ranks) <= GROUP_RANK


def default_config(
    M: int, K: int, ranks: Sequence[int], arch: Arch, itemsize: int = 2, added: int = 0
) -> GradXAConfig:
    """A config with strips as for ``grad_a``, but narrow for several adapters or fp32 products.

    Wide strips would need too many registers for these (not on Blackwell, with accumulators in
    tensor memory). Narrow strips that have a multiprocessor each are walked in tall tiles by eight
    warps; two on one have half the registers. Large ranks too want tall tiles, as each tile reads
    A's strip again. Exact fp32 products keep operands in registers: on sm_80 (Triton 3.9) and
    sm_100 (with six stages) these spill on 4 warps, elsewhere on 8. ``added``: bytes of an element
    of what D is added to, which each step reads as well.
    """
    held = padded(*ranks)
    block_k, split = strips(M, K, arch)
    if len(ranks) > 1 or itemsize == 4 or (held > 64 and arch.capability == 90):
        block_k = 64 if arch.blackwell and itemsize == 2 and held <= 64 else 32
        split = max(1, min(arch.sms // cdiv(K, block_k), cdiv(M, 256)))
    programs = cdiv(K, block_k) * split
    alone = block_k == 32 and itemsize == 2 and programs <= arch.sms
    # short tiles if wide accumulators fill the registers; on sm_90 only in wide strips (in narrow
    # ones ptxas of Triton 3.9 spills with the short tile)
    block_m = 64 if held <= 64 or (block_k == 32 and arch.capability == 90) else 32
    own = block_k == 64 and arch.blackwell and held <= 64
    tall = alone or (block_k == 32 and held > 64 and arch.warpgroups)
    if (tall and arch.shared > 160_000) or (own and held <= 32):
        block_m = 128
    many = programs > arch.sms
    exact = arch.capability in (80, 120) or (arch.blackwell and not many)
    full = held > 64 or (itemsize == 4 and exact)
    num_warps = 8 if alone or own or full else 4
    resident = 2 if many and (num_warps == 4 or not arch.warpgroups) else 1
    tile, most = (
        block_m * block_k * (itemsize + added),
        3 if own and held <= 32 else 6,
    )  # 4 spill with a mask
    beside = (block_m * itemsize + block_k * 4) * held + len(ranks) * block_m * block_k // 8
    return GradXAConfig(
        block_m=block_m,
        block_k=block_k,
        split_m=split,
        num_warps=num_warps,
        num_stages=stages(arch, programs, tile, beside, resident, most=most),
    )


@triton.jit(do_not_specialize=["M", "M_PART"])
def _grad_xa_kernel(
    x, ds, As, words, d_out, outs, ranks, ds_strides, a_r_strides, a_k_strides,
    part_strides, r_strides, k_strides, M, K, M_PART, x_stride, d_stride, WORDS, add, add_stride,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_ok = k < K  # [BLOCK_K]
    k64 = k.to(tl.int64)  # [BLOCK_K]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    rank64 = rank.to(tl.int64)  # [BLOCK_R]
    acc = ()
    for _ in tl.static_range(G):
        acc = acc + (tl.zeros((BLOCK_K, BLOCK_R), tl.float32),)
    first = part * M_PART
    last = tl.minimum(first + M_PART, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row_ok = row < last  # [BLOCK_M]
        row64 = row.to(tl.int64)  # [BLOCK_M]
        ok = row_ok[:, None] & k_ok[None, :]  # [BLOCK_M, BLOCK_K]
        xs = tl.load(
            x + row64[:, None] * x_stride + k[None, :], mask=ok, other=0.0
        )  # [BLOCK_M, BLOCK_K]
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        if add is not None:
            base = tl.load(
                add + row64[:, None] * add_stride + k[None, :], mask=ok, other=0.0
            )  # [BLOCK_M, BLOCK_K]
        new = ()
        for i in tl.static_range(G):
            rank_ok = rank < ranks[i]  # [BLOCK_R]
            d = tl.load(
                ds[i] + row64[:, None] * ds_strides[i] + rank[None, :],
                mask=row_ok[:, None] & rank_ok[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_R]
            # loaded again each time: A's strip stays in the L1 cache, in registers it would spill
            a = tl.load(
                As[i] + rank64[:, None] * a_r_strides[i] + k64[None, :] * a_k_strides[i],
                mask=rank_ok[:, None] & k_ok[None, :],
                other=0.0,
            )  # [BLOCK_R, BLOCK_K]
            kept = xs
            if words[i] is not None:
                keep = keep_tile(words[i], row, row_ok, k0, WORDS, BLOCK_M, BLOCK_K)
                kept = tl.where(keep, xs, 0.0)  # [BLOCK_M, BLOCK_K]
                low = dot(
                    d, cast(a, d.dtype), tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION
                )  # [BLOCK_M, BLOCK_K]
                total += tl.where(keep, low, 0.0)
            else:
                total = dot(d, cast(a, d.dtype), total, PRECISION)
            new = new + (dot(tl.trans(kept.to(xs.dtype)), d, acc[i], PRECISION),)
        acc = new
        if add is not None:
            total += base.to(tl.float32)
        tl.store(
            d_out + row64[:, None] * d_stride + k[None, :],
            cast(total, d_out.dtype.element_ty),
            mask=ok,
        )
    for i in tl.static_range(G):
        at = outs[i] + part.to(tl.int64) * part_strides[i]
        tl.store(
            at + rank64[None, :] * r_strides[i] + k64[:, None] * k_strides[i],
            cast(acc[i], outs[i].dtype.element_ty),
            mask=k_ok[:, None] & (rank < ranks[i])[None, :],
        )


def plan_grad_xa(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    words: Sequence[torch.Tensor | None],
    d_out: torch.Tensor,
    das: Sequence[torch.Tensor],
    config: GradXAConfig,
    add: torch.Tensor | None = None,
) -> list[Launch]:
    """Launches that fill ``d_out`` [M, K], with ``add`` in it, and das[i] [r_i, K] (contiguous).

    The arguments are checked already, and one launch can hold the ranks.
    """
    M, K = x.shape
    m_part = cdiv(cdiv(M, config.split_m), config.block_m) * config.block_m
    split = cdiv(M, m_part)
    partials = [
        o if split == 1 else o.new_empty((split, *o.shape), dtype=torch.float32) for o in das
    ]
    ranks = tuple(d.shape[1] for d in ds)
    args = (
        x, tuple(ds), tuple(As), tuple(words), d_out, tuple(partials), ranks,
        tuple(row_stride(d) for d in ds),
        tuple(a.stride(0) for a in As), tuple(a.stride(1) for a in As),
        tuple(o.numel() for o in das),
        tuple(p.stride(-2) for p in partials), tuple(p.stride(-1) for p in partials),
        M, K, m_part, row_stride(x), row_stride(d_out), cdiv(K, 32),
        add, 0 if add is None else row_stride(add),
    )  # fmt: skip
    meta = dict(
        G=len(ds), BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        BLOCK_R=padded(max(ranks)), PRECISION=precision(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_grad_xa_kernel, (cdiv(K, config.block_k), split), args, meta)]
    if split > 1:
        launches.append(plan_sum(list(zip(partials, das, strict=True))))
    return launches


@planned()
def grad_xa(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    As: Sequence[torch.Tensor],
    bits: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    *,
    add: torch.Tensor | None = None,
    out_dtypes: Sequence[torch.dtype] | None = None,
    config: GradXAConfig | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(D [M, K] in x's dtype, [dA_i [r_i, K]]); X, dS and the masks are read once.

    D = sum over i of mask_i * (dS_i A_i), and ``add`` [M, K] of any float dtype, if it is given;
    dA_i = dS_iᵀ (mask_i X), in out_dtypes[i] (default fp32).
    x [M, K] fp16/bf16/fp32, any row stride; ds[i] [M, r_i] x's dtype, any row stride; As[i]
    [r_i, K] fp32 or x's dtype, any strides; ranks as for :func:`.shrink_expand.shrink_expand`; bits
    as in :func:`.shrink.shrink`. Errors: TypeError, ValueError naming the argument, before any
    launch.
    """
    x = checks.rows("x", x)
    M, K = x.shape
    ds, As = list(ds), list(As)
    checks.counts(ds=ds, As=As)
    ds = checks.low_rank("ds", ds, M, x.dtype, "x has M rows")
    ranks = [d.shape[1] for d in ds]
    if not fits(ranks):
        raise ValueError(
            f"ds have ranks {ranks}; allowed: {GROUP_RANK} together, each padded to a power of two "
            "of at least 16 (use grad_a and low_rank_grad_input)"
        )
    why = "[columns of ds[{i}], columns of x]"
    As = checks.adapters("As", As, [(r, K) for r in ranks], why, x.dtype)
    words = checks.masks(bits, len(ds), M, K)
    if add is not None:
        checks.shape("add", add, (M, K), "as x")
        add = checks.rows("add", add)
    checks.device(x=x, ds=ds, As=As, bits=words, add=add)
    dtypes = list(out_dtypes) if out_dtypes is not None else [torch.float32] * len(ds)
    das = [x.new_empty((r, K), dtype=t) for r, t in zip(ranks, dtypes, strict=True)]
    d_out = x.new_empty((M, K))
    if M == 0 or K == 0:
        return d_out, [o.zero_() for o in das]
    if config is None:
        added = 0 if add is None else add.element_size()
        config = default_config(M, K, ranks, arch_of(x.device), x.element_size(), added)
    for launch in plan_grad_xa(x, ds, As, words, d_out, das, config, add):
        launch.run()
    return d_out, das
