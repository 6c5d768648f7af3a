"""The order of bytes that bitsandbytes keeps 4-bit weights in on CPUs with AVX512-BF16.

Rows stand in blocks of 32. Of two neighbouring columns of a block a group of 32 bytes has the 64
numbers: byte 2 i + c has the number of row i and column c in its low half, and that of row i + 16
in its high half. The scales are [K / blocksize, N] in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32  # N must be a multiple of it


def repack(bits: Tensor, N: int, K: int) -> Tensor:
    """[N, K / 2] uint8 in this order, of packed weights in the usual one."""
    halves = bits.view(torch.uint8).view(N // ROWS, 2, ROWS // 2, K // 2).permute(1, 0, 3, 2)
    upper, lower = halves  # each [N / 32, K / 2, 16]: rows i and rows i + 16
    made = bits.new_empty((N // ROWS, K // 2, ROWS), dtype=torch.uint8)
    torch.bitwise_or(upper >> 4, lower & 0xF0, out=made[..., 0::2])
    torch.bitwise_or(upper & 0xF, lower << 4, out=made[..., 1::2])
    return made.view(N, K // 2)


def repacked_bits(packed: Tensor) -> Tensor:
    """The inverse of :func:`repack`: [N, K / 2] uint8."""
    N, half = packed.shape
    first, second = packed.view(N // ROWS, half, ROWS // 2, 2).unbind(-1)
    made = packed.new_empty((N // ROWS, 2, ROWS // 2, half))
    order = made.permute(1, 0, 3, 2)
    torch.bitwise_or((first & 0xF) << 4, second & 0xF, out=order[0])
    torch.bitwise_or(first & 0xF0, second >> 4, out=order[1])
    return made.view(N, half)
