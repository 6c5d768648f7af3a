"""Assertions of kernel tests, which compare a kernel's error with that of torch.

Both errors are against float64, and torch computes the same formula in the same dtype.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from tests.closeness import assert_as_good_as_torch as assert_as_good_as_torch  # for kernel tests

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Interpreted kernels take tens of milliseconds and more; shrinking a failure would take minutes for
# little.
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def blas(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, multiplied as the interpreter does it.

    The BLAS of numpy may sum in another order than torch's and have larger errors, which is no
    property of a kernel.
    """
    return torch.from_numpy(a.float().numpy() @ b.float().numpy())


def matrix(
    rows: int, columns: int, dtype: torch.dtype, *, seed: int, offset: int = 0, scale: float = 1.0
) -> Tensor:
    """A random matrix; with ``offset`` its rows are slices of longer ones, not dense or aligned."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, columns + 2 * offset, generator=g) * scale
    return wide.to(dtype)[:, offset : offset + columns]


def keep_mask(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=g) > 0.3


def masked(t: Tensor, keep: Tensor | None) -> Tensor:
    return t if keep is None else t * keep


def far_rows(rows: int, columns: int, seed: int) -> Tensor:
    """fp16 rows 2**30 elements apart, so that the third starts beyond int32.

    Only the pages that are touched take memory.
    """
    storage = torch.empty(2**31 + 4096, dtype=torch.float16)
    far = storage.as_strided((rows, columns), (2**30, 1))
    return far.copy_(matrix(rows, columns, torch.float16, seed=seed))
