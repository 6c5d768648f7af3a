"""A mixture of experts with low-rank updates as one operation, forward and backward.

    y_t = Σ_j weights[t, j] · norm(down_e(gate(up_e(x_t))))        e = index[t, j]

where up_e and down_e are linears of expert e, each with its updates or without.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .experts.parts import ExpertLinear, Gate
from .experts.plain import plain_experts


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    gate: Gate,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    choice: Tensor | None = None,
    sentinels: bool = False,
) -> Tensor:
    """The output [T, N] of a mixture in x's dtype.

    Args:
        x: tokens [T, K].
        index: integers [T, k], the experts of each token.
        weights: [T, k], the routing weights; they may require a gradient.
        up, down: the experts' linears, [E, N1, K] and [E, N, I]. Weights are frozen.
        gate: makes H [P, I] of up's output.
        norm: applied to down's output before the routing weights, row by row.
        choice: integers [T], the adapter of each token, the same number in ``up`` and ``down``, or
            -1 for none. None: all adapters are added.
        sentinels: an index of E or more means that another process has the expert, and adds
            nothing.
    """
    return plain_experts(x, index, weights, up, down, gate, norm=norm, choice=choice)
