"""What one launch moves: the record that every count of bytes is made of, and how operands count.

``read`` and ``written`` are bytes of device memory under the rule that holds for vendor kernels
too: each operand once for every sweep over it. Programs that run at the same time share what they
load through the L2 cache, so a tile that many of them load counts once; a rank chunk that walks the
whole of dY a second time counts it twice. ``requested`` is the other end: bytes that all programs
together ask for, repeats included, with masked lanes left out; the hardware's L2 counters should
show it (ring 4). It is 0 where a kernel is the vendor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch


class Traffic(NamedTuple):
    """Device traffic of ``launches`` kernel launches: bytes and floating-point operations."""

    name: str
    launches: int
    read: int
    written: int
    flops: int = 0
    unit: str = "none"  # which rate the flops run at: matrix, fp32, or none
    requested: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


Facts = dict[str, Any]  # a launch's arguments and constants by name, and "grid"
Rule = Callable[[Facts], Traffic]


def unit_of(dtype: torch.dtype) -> str:
    """Products of two-byte floats run on the matrix unit; fp32 products do not, as torch is set."""
    return "matrix" if dtype.itemsize <= 2 else "fp32"


def nbytes(t: Any) -> int:
    """Bytes of a tensor's elements, of what a tensor descriptor describes, or 0 for None."""
    if t is None:
        return 0
    base = getattr(t, "base", t)  # a TensorDescriptor keeps its tensor there
    return math.prod(t.shape) * base.element_size()


def total(ts: Iterable[Any]) -> int:
    """Bytes of all tensors in ``ts`` together."""
    return sum(nbytes(t) for t in ts)


def once(ts: Iterable[Any]) -> int:
    """Bytes of the tensors in ``ts``, one that is there several times counted once."""
    return total({id(t): t for t in ts if t is not None}.values())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def low_rank(f: Facts) -> tuple[int, int, int]:
    """(read, requested, flops) of the part that expand and gemm share: Ls, Rs, words, bias."""
    tiles_m, tiles_n = cdiv(f["M"], f["BLOCK_M"]), cdiv(f["N"], f["BLOCK_N"])
    left, right, bias = total(f["Ls"]), total(f["Rs"]), nbytes(f["bias"])
    return (
        left + right + once(f["words"]) + bias,
        left * tiles_n + right * tiles_m + total(f["words"]) + bias * tiles_m,
        2 * f["M"] * f["N"] * sum(f["ranks"]),
    )
