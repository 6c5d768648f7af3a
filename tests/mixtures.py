"""Small mixtures for the tests of ``lora_experts``, and their numbers by any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern.ops.experts.parts import ExpertLinear, Factors, Gate
from peftkern.ops.experts.plain import plain_experts

T, K, INNER, N, E, TOP = 7, 6, 10, 5, 4, 2


def clamped(gu: Tensor) -> Tensor:
    """A gate as gpt-oss has: interleaved, with limits."""
    g, u = gu[:, 0::2].clamp(max=0.5), gu[:, 1::2].clamp(-0.5, 0.5)
    return (u + 1) * (g * torch.sigmoid(1.7 * g))


def halves(gu: Tensor) -> Tensor:
    g, u = gu.chunk(2, 1)
    return F.silu(g) * u


def interleaved(gu: Tensor) -> Tensor:
    return F.gelu(gu[:, 0::2]) * gu[:, 1::2]


GATES = {
    "halves": Gate(halves, "silu"),
    "interleaved": Gate(interleaved, "gelu", "interleaved"),
    "alone": Gate(lambda u: F.relu(u).square(), "relu2", "alone"),
    "function": Gate(clamped, None, "interleaved"),
}


def rms(y: Tensor) -> Tensor:
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)


class Mixture(NamedTuple):
    """The arguments of ``lora_experts``."""

    x: Tensor
    index: Tensor
    weights: Tensor
    up: ExpertLinear
    down: ExpertLinear
    gate: Gate
    norm: Callable[[Tensor], Tensor] | None = None
    choice: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        found = [self.x, self.weights]
        for part in (self.up, self.down):
            found += [part.bias] if part.bias is not None else []
            found += [t for f in part.factors for t in (f.A, f.B)]
        return [t for t in found if t.requires_grad]

    def to(self, dtype: torch.dtype) -> Mixture:
        """The same numbers with every floating point tensor in ``dtype``, as leaves."""

        def cast(t: Any) -> Any:
            if t is None or not t.is_floating_point():
                return t
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        parts = [
            ExpertLinear(
                cast(part.weight),
                cast(part.bias),
                tuple(Factors(cast(f.A), cast(f.B), f.scale, f.p) for f in part.factors),
            )
            for part in (self.up, self.down)
        ]
        return self._replace(x=cast(self.x), weights=cast(self.weights), up=parts[0], down=parts[1])


def mixture(
    gate: str = "halves",
    *,
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = ((3,), (2,)),
    p: float = 0.0,
    bias: bool = False,
    norm: bool = False,
    mixed: bool = False,
    transposed: bool = False,
    dtype: torch.dtype = torch.float64,
    low: torch.dtype | None = None,
    sizes: tuple[int, ...] = (T, K, INNER, N, E, TOP),
) -> Mixture:
    """A mixture whose last expert gets no token; ``ranks`` are up's and down's adapters'."""
    tokens, k_in, inner, n, experts, top = sizes
    g = torch.Generator().manual_seed(11)

    def leaf(*shape: int, own: torch.dtype = dtype, trains: bool = True) -> Tensor:
        drawn = torch.randn(*shape, generator=g, dtype=torch.float64) / max(shape[-1], 1) ** 0.5
        return drawn.to(own).requires_grad_(trains)

    def linear(rows: int, columns: int, own: tuple[int, ...]) -> ExpertLinear:
        shape = (experts, columns, rows) if transposed else (experts, rows, columns)
        weight = leaf(*shape, trains=False)
        factors = tuple(
            Factors(
                leaf(r * experts, columns, own=low or dtype),
                leaf(rows, r * experts, own=low or dtype),
                0.5 + i,
                p / (i + 1),
            )
            for i, r in enumerate(own)
        )
        weight = weight.transpose(1, 2) if transposed else weight
        return ExpertLinear(weight, leaf(experts, rows) if bias else None, factors)

    wide = inner if GATES[gate].layout == "alone" else 2 * inner
    scores = torch.rand(tokens, max(experts - 1, 1), generator=g)
    index = scores.topk(min(top, scores.shape[1]), 1).indices
    weights = torch.rand(tokens, index.shape[1], generator=g, dtype=torch.float64)
    adapters = max(len(ranks[0]), len(ranks[1]))
    choice = torch.randint(-1, adapters, (tokens,), generator=g) if mixed else None
    return Mixture(
        leaf(tokens, k_in),
        index,
        weights.to(dtype).requires_grad_(),
        linear(wide, k_in, ranks[0]),
        linear(n, inner, ranks[1]),
        GATES[gate],
        rms if norm else None,
        choice,
    )


def formula(m: Mixture, masks: tuple[list[Any], list[Any]] | None = None) -> Tensor:
    up, down = masks or (None, None)
    return plain_experts(*m[:6], norm=m.norm, choice=m.choice, up_masks=up, down_masks=down)


def numbers(run: Callable[[Mixture], Tensor], m: Mixture) -> dict[str, Tensor]:
    """The output and all gradients of a weighted sum of it."""
    y = run(m)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().to(y.dtype)
    grads = torch.autograd.grad(y, m.leaves, weights.view_as(y), allow_unused=True)
    found = {"y": y.detach()}
    for i, (leaf, grad) in enumerate(zip(m.leaves, grads, strict=True)):
        found[str(i)] = torch.zeros_like(leaf) if grad is None else grad
    return found
