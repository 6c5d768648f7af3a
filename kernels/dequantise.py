"""W [N, K] of a quantised weight as a dense matrix, in one launch: nested statistics included.

It is what a product of many rows takes: the dense matrix lives for that product alone. The kernel
writes two bytes or more for each number and reads about half of one, so it is bound by what it
writes; fused multiply-adds are off, as the owners round each operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Arch, Launch, arch_of, cdiv, next_pow2
from .launching import planned
from .quantised import Quantised, checked
from .quantised_tile import loadable, operands, quantised_tile


@dataclass(frozen=True)
class DequantiseConfig:
    """Tiles of W [block_n, block_k]."""

    block_n: int = 16
    block_k: int = 256
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        checks.blocks(self, low=8, block_n=self.block_n, block_k=self.block_k)


def default_config(w: Quantised, arch: Arch) -> DequantiseConfig:
    """4096 numbers a program, 32 a thread: wide tiles, or tall ones where words run along n."""
    if w.layout.along == "n":
        return DequantiseConfig(block_n=128, block_k=32)
    block_k = max(32, min(256, next_pow2(w.shape[1])))
    return DequantiseConfig(block_n=4096 // block_k, block_k=block_k)


@triton.jit
def _dequantise_kernel(
    out, bits, scales, code, zeros, groups, overall, inner_scales, inner_code, offset, strides,
    N, K, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    w = bits, scales, code, zeros, groups, overall, inner_scales, inner_code, offset, strides
    n0, k0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    tile = quantised_tile(w, n0, k0, N, K, out.dtype.element_ty, LAYOUT, BLOCK_N, BLOCK_K)
    n, k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, BLOCK_K)
    ok = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], tile, mask=ok)


def plan_dequantise(
    out: torch.Tensor, w: Quantised, config: DequantiseConfig, arch: Arch
) -> list[Launch]:
    """The launch that fills ``out`` [N, K] (contiguous); the arguments are checked already."""
    (N, K), w = w.shape, loadable(w)
    meta = dict(
        LAYOUT=w.layout, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    grid = cdiv(N, config.block_n), cdiv(K, config.block_k)
    return [Launch(_dequantise_kernel, grid, (out, *operands(w, arch), N, K), meta)]


@planned()
def dequantise(
    w: Quantised, dtype: torch.dtype, *, config: DequantiseConfig | None = None
) -> torch.Tensor:
    """W [N, K] in ``dtype`` (fp16, bf16, fp32), contiguous.

    Equal to :func:`.quantised.dense` bit for bit. Errors: TypeError or ValueError naming the
    argument, before any launch.
    """
    w = checked("w", w)
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: float16, bfloat16, float32")
    checks.device(**{name: t for name, t in zip(w._fields[2:], w.tensors, strict=True)})
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    if not out.numel():
        return out
    arch = arch_of(w.device)
    for launch in plan_dequantise(out, w, config or default_config(w, arch), arch):
        launch.run()
    return out
