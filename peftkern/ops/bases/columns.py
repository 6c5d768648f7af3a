"""A packed weight whose numbers come out as [K, N]: GPTQ and AWQ pack the turned matrix."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .weight import Packed, multiplied


class Columns(Packed):
    """A :class:`Packed` weight that multiplies with Wᵀ [K, N] as it is dequantised."""

    __slots__ = ()

    @abstractmethod
    def columns(self, dtype: torch.dtype) -> Tensor:
        """Wᵀ [K, N] in ``dtype``, as its owner dequantises it."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.columns(dtype).t().contiguous()

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        return multiplied(x, self.columns(self.compute_dtype(x.dtype)), y)

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        return multiplied(dy, self.columns(self.compute_dtype(dy.dtype)).t(), dx)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes of ``bits`` bits from integers, along ``dim``; the first code in the low bits.

    ``bits`` divides a word, or is 3 and the words are int32: 32 codes then stand in three of them,
    two across a border. The result is int32.
    """
    width = 8 * words.element_size()
    words = words.int().movedim(dim, -1)
    if bits == 3:
        low, mid, high = words.unflatten(-1, (-1, 3)).unbind(-1)
        codes = [low >> 3 * i for i in range(10)]
        codes += [(low >> 30 & 3) | (mid << 2 & 4)]
        codes += [mid >> 3 * i + 1 for i in range(10)]
        codes += [(mid >> 31 & 1) | (high << 1 & 6)]
        codes += [high >> 3 * i + 2 for i in range(10)]
        found = torch.stack(codes, -1)
    else:
        shifts = torch.arange(0, width, bits, device=words.device, dtype=torch.int32)
        found = words.unsqueeze(-1) >> shifts
    codes_of: Tensor = (found & 2**bits - 1).flatten(-2)
    return codes_of.movedim(-1, dim)
