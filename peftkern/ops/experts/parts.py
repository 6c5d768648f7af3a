"""The records of a mixture's operation: factors of an adapter, the experts' linears, their gate.

P is the number of pairs (token, expert), T·k. The factors are PEFT's parameters themselves: of the
stacked ``lora_A`` [r·E, K] expert e has rows e·r … e·r+r-1, and of ``lora_B`` [N, r·E] it has
columns e, e+E, e+2E ….
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """One adapter of one linear of the experts; it adds scale · drop(x) A_eᵀ B_eᵀ for expert e."""

    A: Tensor  # [r·E, K]
    B: Tensor  # [N, r·E]
    scale: float
    p: float = 0.0  # dropout of the adapter's input, drawn for each pair by itself

    def rank(self, experts: int) -> int:
        return self.A.shape[0] // experts

    def of_experts(self, experts: int) -> tuple[Tensor, Tensor]:
        """A as [E, r, K] and B as [E, N, r], views."""
        N, K = self.B.shape[0], self.A.shape[1]
        A = self.A.view(experts, -1, K)
        return A, self.B.view(N, -1, experts).permute(2, 0, 1)


class ExpertLinear(NamedTuple):
    """One linear of all experts, with the adapters that are added to it."""

    weight: Tensor  # [E, N, K], any strides: a transposed parameter is given as its transpose
    bias: Tensor | None  # [E, N]
    factors: tuple[Factors, ...] = ()


class Gate(NamedTuple):
    """What makes H [P, I] of the first linear's output [P, 2·I], or [P, I] without a gate.

    A gate with a name is one that kernels and formulas know; ``function`` computes any gate, row
    by row, and torch can differentiate it.
    """

    function: Callable[[Tensor], Tensor]
    name: str | None = None  # in ops.mlp_torch.ACTIVATIONS
    # where the two inputs of act(gate) ∘ up are: "halves", "interleaved", or "alone" without up
    layout: str = "halves"
