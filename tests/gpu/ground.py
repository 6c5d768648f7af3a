# ruff: noqa: E402
"""Helpers of the tests on a device; without a device the importing module is skipped.

``PEFTKERN_GPU_TESTS_ON_CPU=1 TRITON_INTERPRET=1`` runs the tests on CPU tensors of smaller shapes,
which checks the tests, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

ON_CPU = bool(os.environ.get("PEFTKERN_GPU_TESTS_ON_CPU"))
if not ON_CPU and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

# after the skip: where tests/kernels runs in this process too, nobody else may import these
from peftkern.kernels import (
    bits,
    decode,
    expand,
    gemm,
    grad_a,
    grad_sb,
    mixed,
    prefix_attention,
    prefix_backward,
    prefix_decode,
    prefix_reference,
    reference,
    shrink,
)
from peftkern.ops import backend, triton_backend

__all__ = ["backend", "bits", "gemm", "grad_a", "mixed", "grad_sb", "reference", "shrink", "decode"]
__all__ += ["triton_backend", "expand"]
__all__ += ["prefix_attention", "prefix_backward", "prefix_decode", "prefix_reference"]

DEVICE = torch.device("cpu" if ON_CPU else "cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# errors below this are the output's rounding and no more, whatever torch happens to reach
ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}


def cut(*sizes: int) -> tuple[int, ...]:
    """Sizes as they are on a device, small in the interpreter."""
    return tuple(min(s, 70) for s in sizes) if ON_CPU else sizes


def some(
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: float = 1.0,
    gap: int = 0,
) -> Tensor:
    """Normal numbers; ``gap``: rows are slices of longer ones, neither dense nor aligned."""
    g = torch.Generator(device=DEVICE).manual_seed(seed)
    *lead, last = shape
    t = torch.randn(*lead, last + 2 * gap, generator=g, device=DEVICE) * scale
    return t.to(dtype)[..., gap : gap + last]


def words_of(M: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(packed mask, bool mask [M, K])."""
    keep = some(M, K, dtype=torch.float32, seed=seed + 90) > -1.0
    return bits.pack_bits(keep), keep


def poison() -> None:
    """NaN in the memory that the next allocations get: what a kernel does not write shows."""
    if not ON_CPU:
        blocks = [torch.full((n,), float("nan"), device=DEVICE) for n in (2**20, 2**22, 2**24)]
        del blocks


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def as_good_as_torch(got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """‖got - exact‖ at most ``factor`` times torch's in this dtype, or the output's rounding."""
    assert got.shape == exact.shape and bool(got.isfinite().all())
    if not exact.numel():
        return
    error, theirs = relative(got, exact), relative(plain, exact)
    allowed = max(factor * theirs, ROUNDING[got.dtype])
    assert error <= allowed, f"error {error:.2e}, torch's {theirs:.2e}, allowed {allowed:.2e}"
