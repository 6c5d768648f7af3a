"""The records of a mixture's operation: factors, linears, their gate, and what a way gives back.

P is the number of pairs (token, expert), T·k. The factors are PEFT's parameters themselves: of the
stacked ``lora_A`` [r·E, K] expert e has rows e·r … e·r+r-1, and of ``lora_B`` [N, r·E] it has
columns e, e+E, e+2E ….
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .order import Order


class Factors(NamedTuple):
    """One adapter of one linear of the experts; it adds scale · drop(x) A_eᵀ B_eᵀ for expert e.

    With r = 0 it adds nothing: an adapter of a mixed batch that the linear does not have.
    """

    A: Tensor  # [r·E, K]
    B: Tensor  # [N, r·E]
    scale: float
    p: float = 0.0  # dropout of the adapter's input, drawn for each pair by itself

    def rank(self, experts: int) -> int:
        return self.A.shape[0] // experts

    def of_experts(self, experts: int) -> tuple[Tensor, Tensor]:
        """A as [E, r, K] and B as [E, N, r], views."""
        N, K, r = self.B.shape[0], self.A.shape[1], self.rank(experts)
        A = self.A.reshape(experts, r, K)
        return A, self.B.reshape(N, r, experts).permute(2, 0, 1)


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
    # (α, limit, plus) of a gate that kernels know beside those with a name, such as gpt-oss':
    # min(G, limit)·σ(α·min(G, limit)) ∘ (clip(U, ±limit) + plus); ``function`` computes the same
    clamp: tuple[float, float, float] | None = None


class Call(NamedTuple):
    """A checked call of ``lora_experts``, in the dtype of its weights."""

    x: Tensor  # [T, K]
    chosen: Tensor  # [T, k], the index of each token's experts
    weights: Tensor  # [T, k]
    up: ExpertLinear
    down: ExpertLinear
    gate: Gate
    norm: Callable[[Tensor], Tensor] | None
    choice: Tensor | None  # [T]
    sentinels: bool

    @property
    def experts(self) -> int:
        return self.up.weight.shape[0]

    @property
    def adapters(self) -> int:
        return max(len(self.up.factors), len(self.down.factors))


class Kept(NamedTuple):
    """What a way keeps for its backward, on rows sorted by expert; None for what is not needed."""

    order: Order
    gu: Tensor | None  # [P, N1], up's output
    s_up: Tensor | None  # [P, R], the adapters' S side by side; with ``choice`` R is the largest r
    s_down: Tensor | None
    y: Tensor | None  # [P, N], down's output, for a norm


class Wants(NamedTuple):
    """The gradients that are wanted; of a linear (A, B) of each adapter."""

    x: bool
    weights: bool
    up: tuple[tuple[bool, bool], ...]
    down: tuple[tuple[bool, bool], ...]
    up_bias: bool
    down_bias: bool

    @property
    def behind_gate(self) -> bool:
        """True when a gradient is wanted for which up's output has one."""
        return self.x or self.up_bias or any(a or b for a, b in self.up)

    @property
    def hidden(self) -> bool:
        """True when the backward needs H or the gate."""
        return self.behind_gate or self.weights or any(a for a, _ in self.down)


class LinearGrads(NamedTuple):
    bias: Tensor | None
    factors: list[tuple[Tensor | None, Tensor | None]]  # (dA [r·E, K], dB [N, r·E])


class Grads(NamedTuple):
    x: Tensor | None
    weights: Tensor | None
    up: LinearGrads
    down: LinearGrads
