"""What the operations hand to a backend: one linear of a group, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """One linear of a group; the arguments of :func:`.lora.lora_linear` beside x."""

    weight: Tensor  # [N, K], or [K, N] when transposed
    bias: Tensor | None
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    scale: float
    p: float
    transposed: bool

    @property
    def w(self) -> Tensor:
        """The weight as [K, N]."""
        return self.weight if self.transposed else self.weight.t()


class Part(NamedTuple):
    """What the backward of one projection needs."""

    dy: Tensor  # [M, N]
    w: Tensor  # [K, N]
    A: Tensor
    B: Tensor
    s: Tensor | None  # [M, r]
    bits: Tensor | None
    scale: float
    p: float
    needs_a: bool
    needs_b: bool
