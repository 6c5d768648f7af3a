"""The gradients through DoRA's gain, in one pass over dY [M, N].

    dZ [M, N] = gain ∘ dY                            the gradient of the gain's input
    sums_n = sum_m dY[m, n] * (V[m, n] - bias[n])    the gradient of the gain, [N]

Blocks of rows give partial sums in fp32, and a second kernel adds them in index order. So two runs
agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import checks
from .common import Arch, Launch, arch_of, cast, cdiv, row_stride
from .launching import planned
from .reduce import plan_sum


def reference(
    dy: torch.Tensor, gain: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dZ [M, N], sums [N]) in float64."""
    z = v.double() if bias is None else v.double() - bias.double()
    return dy.double() * gain.double(), (dy.double() * z).sum(0)


@dataclass(frozen=True)
class ScaleConfig:
    """Tiles [block_m, block_n]; M is split into split_m parts."""

    block_m: int = 32
    block_n: int = 64
    split_m: int = 1
    num_warps: int = 4
    num_stages: int = 1  # programs that run at once hide the latency of their loads

    def __post_init__(self) -> None:
        checks.blocks(self, low=1, block_m=self.block_m, block_n=self.block_n)
        if self.split_m < 1:
            raise ValueError(f"ScaleConfig.split_m is {self.split_m}; allowed: 1 or more")


def default_config(M: int, N: int, arch: Arch) -> ScaleConfig:
    """A config that splits M until every multiprocessor has four programs."""
    blocks = cdiv(N, 64)
    return ScaleConfig(split_m=max(1, min(cdiv(4 * arch.sms, blocks), cdiv(M, 32))))


@triton.jit(do_not_specialize=["M", "M_PART"])
def _scale_grad_kernel(
    dy, v, gain, bias, dz, sums, M, N, M_PART, dy_stride, v_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    part = tl.program_id(1)
    n_ok = n < N  # [BLOCK_N]
    factor = tl.load(gain + n, mask=n_ok, other=0.0).to(tl.float32)  # [BLOCK_N]
    total = tl.zeros((BLOCK_N,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)  # [BLOCK_N]
    last = tl.minimum((part + 1) * M_PART, M)
    for m0 in range(part * M_PART, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        ok = (m < last)[:, None] & n_ok[None, :]  # [BLOCK_M, BLOCK_N]
        m64 = m.to(tl.int64)  # [BLOCK_M]
        g = tl.load(dy + m64[:, None] * dy_stride + n[None, :], mask=ok, other=0.0).to(
            tl.float32
        )  # [BLOCK_M, BLOCK_N]
        if dz is not None:
            tl.store(
                dz + m64[:, None] * N + n[None, :],
                cast(g * factor[None, :], dz.dtype.element_ty),
                mask=ok,
            )
        if v is not None:
            z = tl.load(v + m64[:, None] * v_stride + n[None, :], mask=ok, other=0.0).to(
                tl.float32
            )  # [BLOCK_M, BLOCK_N]
            if bias is not None:
                z -= shift[None, :]
            total += tl.sum(g * z, 0)
    if v is not None:
        tl.store(sums + part.to(tl.int64) * N + n, total, mask=n_ok)


def plan_scale_grad(
    dy: torch.Tensor,
    gain: torch.Tensor,
    v: torch.Tensor | None,
    bias: torch.Tensor | None,
    dz: torch.Tensor | None,
    sums: torch.Tensor | None,
    config: ScaleConfig,
) -> list[Launch]:
    """Launches that fill dz [M, N] and sums [N] fp32, both contiguous, or None if not wanted.

    The arguments are checked already.
    """
    M, N = dy.shape
    m_part = cdiv(cdiv(M, config.split_m), config.block_m) * config.block_m
    split = cdiv(M, m_part)
    parts = sums if split == 1 or sums is None else sums.new_empty((split, N))
    args = (
        dy, v, gain, bias if v is not None else None, dz, parts, M, N, m_part,
        row_stride(dy), 0 if v is None else row_stride(v),
    )  # fmt: skip
    meta = dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launches = [Launch(_scale_grad_kernel, (cdiv(N, config.block_n), split), args, meta)]
    if parts is not sums:
        launches.append(plan_sum([(parts, sums)]))  # type: ignore[list-item]
    return launches


@planned()
def scale_grad(
    dy: torch.Tensor,
    gain: torch.Tensor,
    v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    wanted: bool = True,
    config: ScaleConfig | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dZ [M, N] in dY's dtype if ``wanted``, sums [N] in fp32 if v is given); else None.

    dy [M, N] fp16/bf16/fp32, any row stride; gain [N] fp32; v [M, N] dy's dtype, any row stride;
    bias [N]. Errors: TypeError, ValueError, before any launch.
    """
    dy = checks.rows("dy", dy)
    M, N = dy.shape
    checks.shape("gain", gain, (N,), "dy has N columns")
    if v is not None:
        v = checks.rows("v", v, (dy.dtype,))
        checks.shape("v", v, (M, N), "as dy")
    if bias is not None:
        checks.shape("bias", bias, (N,), "dy has N columns")
        bias = bias.contiguous()
    gain = gain.contiguous()
    checks.device(dy=dy, gain=gain, v=v, bias=bias)
    dz = dy.new_empty((M, N)) if wanted else None
    sums = dy.new_empty(N, dtype=torch.float32) if v is not None else None
    if M == 0 or N == 0:
        return dz, None if sums is None else sums.zero_()
    if dz is not None or sums is not None:
        config = config or default_config(M, N, arch_of(dy.device))
        for launch in plan_scale_grad(dy, gain, v, bias, dz, sums, config):
            launch.run()
    return dz, sums
