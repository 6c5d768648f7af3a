"""``ExactProduct``: a product of factors that has the same bits wherever it is computed.

Each row of the left factor and each column of the right one is rounded to integers times a power of
2. The integers are so small that their products and the sums of these are exact in float64, hence
the same in whatever order, on every device and with every number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BITS = 24  # of an integer; float32 has as many

# a part of a matrix, or of several that are stacked: (which of them, which of their rows)
Part = tuple[slice] | tuple[int | slice, slice]


class ExactProduct:
    """The float32 product [..., M, N] of copies of left [..., M, r] and right [..., r, N].

    The error of a factor is 2^-25 of the largest value of its row (its column); with ranks above
    32 a little more. Memory: 4 r (M + N) bytes.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        left, right = left.to(torch.float32), right.to(torch.float32)
        # Of each of the r terms both parts get about the same size, which changes no product: the
        # largest in a row is then of the term that matters most.
        shift = (_exponent(right, -1).mT - _exponent(left, -2)) // 2
        left, right = left * _power_of_2(shift), right * _power_of_2(-shift).mT
        # r products of two integers of `bits` bits are summed within 53 bits
        bits = min(BITS, (53 - (left.shape[-1] - 1).bit_length()) // 2)
        self.left, self.right = _rounded(left, -1, bits), _rounded(right, -2, bits)
        self.shape = (*left.shape[:-1], right.shape[-1])

    def on(self, device: torch.device) -> Callable[[Part], Tensor]:
        """A function that computes a part of the product, in float32 on this device."""
        where = device if has_float64(device) else torch.device("cpu")
        left, right = self.left.to(where), self.right.to(where, torch.float64)

        def part(index: Part) -> Tensor:
            rows = left[index].to(torch.float64)
            return (rows @ right[index[:-1]]).to(device, torch.float32)

        return part

    @property
    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [self.left, self.right]


def _exponent(x: Tensor, over: int) -> Tensor:
    """The least n, of those from -50 to 50, with |x| <= 2^n over a dimension, which is kept."""
    found = torch.frexp(x.abs().amax(over, keepdim=True)).exponent
    return found.to(torch.int32).clamp_(-50, 50)


def _power_of_2(exponent: Tensor) -> Tensor:
    """2^exponent in float32, made by its bits, for int32 from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def _rounded(x: Tensor, over: int, bits: int) -> Tensor:
    """``x`` as float32 multiples of a power of 2, of at most 2^``bits`` over a dimension.

    Values beyond 2^50 are cut off there, so that a product is finite in float32.
    """
    unit = _power_of_2(_exponent(x, over) - bits)
    return (x / unit).round_().clamp_(-(2**bits), 2**bits).mul_(unit)


@cache
def has_float64(device: torch.device) -> bool:
    """True when the device multiplies in float64."""
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        return float(one @ one) == 1.0
    except (RuntimeError, TypeError):
        return False
