"""Adds scaled products of factors to a weight, in place, in steps that stay in the cache.

On a CPU new memory of a weight's size costs more time than all the arithmetic, so that no
intermediate result is larger than a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .restore import Factors, Kept, KeptCopy, KeptSum, Step, steps

# Of a weight of at most so many elements a copy is kept. On a CPU HF PEFT merges larger ones in new
# memory each time, and only then a record that takes more arithmetic is no slower.
SMALL, CPU_SMALL = 2**17, 2**23


class Sum:
    """W + Σ scaling · left @ right, in at least float32 and rounded once.

    Args:
        weight: W, dense, floating point, with as many elements as the products.
        factors: the factors of each product; their dtypes and devices may be others.
    """

    def __init__(self, weight: Tensor, factors: Sequence[Factors]) -> None:
        self.weight = weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.wide = wide
        self.factors = [
            (left.detach().to(weight.device, wide), right.detach().to(weight.device, wide), s)
            for left, right, s in factors
        ]
        left, right, _ = self.factors[0]
        self.shape = (*left.shape[:-1], right.shape[-1])

    def finite(self) -> list[bool]:
        """Whether the sum with the first 1, 2, ... products is finite; nothing is written."""
        ends: list[list[Tensor]] = [[] for _ in self.factors]
        matrix = self.weight.contiguous().view(self.shape)
        for step in steps(matrix):
            total = matrix[step.part].to(self.wide, copy=True)
            for factor, found in zip(self.factors, ends, strict=True):
                _add(total, factor, step)
                found.extend(torch.aminmax(total.to(matrix.dtype)))  # NaN if there is one
        return [not found or bool(torch.stack(found).isfinite().all()) for found in ends]

    def write(self, keep: bool) -> Kept | None:
        """Write the sum into the weight; returns what restores it, None unless ``keep``.

        After an error the weight is as it was, without ``keep`` within rounding.
        """
        dense = self.weight.contiguous()
        kept = self._record(dense) if keep else None
        matrix = dense.view(self.shape)
        if isinstance(kept, KeptSum):
            kept.add(matrix)
        else:
            self._write(matrix, kept)
        if dense is not self.weight:
            self.weight.copy_(dense)
        if kept is not None:
            kept.seal(self.weight)
        return kept

    def _record(self, weight: Tensor) -> Kept:
        small = CPU_SMALL if weight.device.type == "cpu" else SMALL
        if weight.numel() <= small or weight.dtype.itemsize > 4:
            return KeptCopy(weight, self.factors)
        left = torch.cat([left * s for left, _, s in self.factors], -1)
        right = torch.cat([right for _, right, _ in self.factors], -2)
        if not bool(left.isfinite().all() and right.isfinite().all()):
            return KeptCopy(weight, self.factors)
        return KeptSum(left, right)

    def _write(self, matrix: Tensor, kept: Kept | None) -> None:
        last: tuple[Step, Tensor] | None = None  # the last step that may be written, its new value
        try:
            for step in steps(matrix):
                part = matrix[step.part]
                if kept is not None and part.dtype == self.wide:  # the copy can be put back
                    total = part
                else:
                    total = part.to(self.wide, copy=True)
                for factor in self.factors:
                    _add(total, factor, step)
                if total is not part:
                    last = step, total
                    part.copy_(total)
        except BaseException:
            if isinstance(kept, KeptCopy):
                matrix.copy_(kept.copy.view(matrix.shape))
            elif last is not None:
                step, total = last
                matrix[step.part].copy_(total)
                self._subtract(matrix, step.start + total.numel())
            raise

    def _subtract(self, matrix: Tensor, end: int) -> None:
        for step in steps(matrix, end):
            total = matrix[step.part].to(self.wide, copy=True)
            for left, right, scaling in reversed(self.factors):
                _add(total, (left, right, -scaling), step)
            matrix[step.part].copy_(total)


def _add(total: Tensor, factor: Factors, step: Step) -> None:
    """Add the step's part of a scaled product to ``total``."""
    left, right, scaling = factor
    add = total.addmm_ if total.dim() == 2 else total.baddbmm_
    add(left[step.part], right[step.part[:-1]], alpha=scaling)
