"""The records that operations pass to a backend: a linear, alone or of a group; its backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """One linear, alone or of a group: the arguments of :func:`.lora.lora_linear` after x."""

    weight: Tensor  # [N, K], or [K, N] when transposed
    bias: Tensor | None
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    scale: float
    p: float
    transposed: bool

    @property
    def w(self) -> Tensor:
        """The weight as [K, N], a view."""
        return self.weight if self.transposed else self.weight.t()

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.weight, self.bias, self.A, self.B

    @property
    def settings(self) -> tuple[float, float, bool]:
        """The fields that are not tensors: scale, p, transposed."""
        return self.scale, self.p, self.transposed


class Plain(NamedTuple):
    """A linear of an MLP that has no adapter; the fields are those of :class:`Projection`."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def w(self) -> Tensor:
        """The weight as [K, N], a view."""
        return self.weight if self.transposed else self.weight.t()

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, None, None]:
        return self.weight, self.bias, None, None

    @property
    def settings(self) -> tuple[float, float, bool]:
        return 0.0, 0.0, self.transposed


class ProjectionGrad(NamedTuple):
    """The arguments of one projection's backward."""

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
    # dY in fp8 (kernels.fp8_rows.Fp8Rows), if it is made already: then dy is only its shape
    copy: Any = None


class PlainGrad(NamedTuple):
    """The arguments of the backward of a :class:`Plain`."""

    dy: Tensor  # [M, N]
    w: Tensor  # [K, N]
