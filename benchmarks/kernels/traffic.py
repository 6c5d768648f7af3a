"""The record of one launch's traffic, and helpers that count its operands.

``read`` and ``written`` are bytes of device memory. The rule is the one for vendor kernels: each
operand counts once for every sweep over it. Programs that run at the same time share their loads
through the L2 cache, so a tile that many of them load counts once. A rank chunk that walks the
whole of dY a second time counts it twice.

``requested`` is the bytes that all programs together load, repeats included and masked lanes left
out; the hardware's L2 counters should show it (ring 4). It is 0 for a vendor's kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch


class Traffic(NamedTuple):
    """Device traffic of ``launches`` kernel launches: bytes and floating-point operations."""

    name: str
    launches: int
    read: int
    written: int
    flops: int = 0
    unit: str = "none"  # the rate at which the flops run: matrix, fp32, or none
    requested: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


Facts = dict[str, Any]  # a launch's arguments and constants by name, and "grid"
Rule = Callable[[Facts], Traffic]


def unit_of(dtype: torch.dtype) -> str:
    """The unit for products of ``dtype``: "matrix" for two-byte floats, else "fp32".

    torch's default setting keeps fp32 products off the matrix units.
    """
    return "matrix" if dtype.itemsize <= 2 else "fp32"


def nbytes(t: Any) -> int:
    """Bytes of the elements of a tensor or of a tensor descriptor; 0 for None."""
    if t is None:
        return 0
    base = getattr(t, "base", t)  # the tensor of a TensorDescriptor
    return math.prod(t.shape) * base.element_size()


def total(ts: Iterable[Any]) -> int:
    """Bytes of all tensors in ``ts`` together."""
    return sum(nbytes(t) for t in ts)


def once(ts: Iterable[Any]) -> int:
    """Bytes of the distinct tensors in ``ts``; one that repeats counts once."""
    return total({id(t): t for t in ts if t is not None}.values())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def masks(f: Facts) -> tuple[Sequence[Any], Sequence[Any], int]:
    """(masks that are read, masks that are drawn and written, bytes of their seed) of a shrink."""
    if f["DIGITS"]:
        return (), f["words"], nbytes(f["seed_ptr"])
    return f["words"], (), 0


def drawn_operations(words: int, f: Facts) -> int:
    """Integer operations that draw a number of words with a launch's DIGITS and ROUNDS.

    A word is DIGITS random words, each with one operation that adds its digit, and nine for what
    its columns share and the end of a row; a round of Philox is two wide products, two high halves
    and four exclusive ors, and its rounds make four words.
    """
    return words * (f["DIGITS"] * (8 * f["ROUNDS"] // 4 + 1) + 9)


def mask_operations(f: Facts) -> int:
    """Integer operations of the masks of a shrink.

    A word's 32 bits take two each to become columns; if the words are drawn, that comes on top.
    """
    words = [w for w in f["words"] if w is not None]
    count = sum(math.prod(w.shape) for w in words)
    return 64 * count + (drawn_operations(count, f) if f["DIGITS"] else 0)


def copied(f: Facts) -> int:
    """Bytes of the fp8 copies that a launch writes, with their scales."""
    if "qs" in f:
        return total(f["qs"]) + total(f["q_scales"])
    return nbytes(f["q"]) + nbytes(f["q_scales"])


def copy_operations(f: Facts) -> int:
    """Operations of the fp8 copies that a launch writes, in those of one integer lane.

    A number takes eight: its size, its share in the maximum of 128, the conversions, and a division
    rounded to nearest, whose nine run at twice the rate.
    """
    found = f["qs"] if "qs" in f else (f["q"],)
    return 8 * sum(math.prod(t.shape) for t in found if t is not None)


def low_rank(f: Facts) -> tuple[int, int, int]:
    """(read, requested, flops) of the operands of both expand and gemm: Ls, Rs, words, bias."""
    tiles_m, tiles_n = cdiv(f["M"], f["BLOCK_M"]), cdiv(f["N"], f["BLOCK_N"])
    left, right, bias = total(f["Ls"]), total(f["Rs"]), nbytes(f["bias"])
    return (
        left + right + once(f["words"]) + bias,
        left * tiles_n + right * tiles_m + total(f["words"]) + bias * tiles_m,
        2 * f["M"] * f["N"] * sum(f["ranks"]),
    )
