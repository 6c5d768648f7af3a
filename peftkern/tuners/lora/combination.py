"""``Combination``: the rules that make one A and B of those of several adapters, for each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...utils import merge_utils

CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
# rules that combine A with A and B with B, and so need equal ranks
BY_FACTOR = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
BY_PRODUCT = ("svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")


class AdapterFactors(NamedTuple):
    """One adapter's factors, scaling and weight in one layer, in at least float32."""

    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    scaling: float
    weight: float


@dataclass(frozen=True)
class Combination:
    """A rule with its settings for combining the updates of several adapters into one.

    See :meth:`peftkern.tuners.lora.weighted.Weighted.add_weighted_adapter`.
    """

    kind: str
    rank: int
    clamp: float | None
    full_matrices: bool
    driver: str | None
    density: float | None
    signs: Any

    def combine(self, tensors: list[Tensor], weights: list[float]) -> Tensor:
        """Tensors of one shape combined into one, by the rule (its name without "_svd")."""
        w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        rule = self.kind.removesuffix("_svd")
        if rule in ("linear", "svd"):
            return merge_utils.task_arithmetic(tensors, w)
        args = (self.density, self.signs) if rule.endswith("ties") else (self.density,)
        return getattr(merge_utils, rule)(tensors, w, *args)

    def factors(self, parts: list[AdapterFactors], transposed: bool) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of the new adapter, for a scaling of 1; r is at most ``rank``.

        ``transposed``: the layer's weight is [K, N]. Random pruning then draws in that order, as
        HF PEFT's does.
        """
        scaled = [p.weight * p.scaling for p in parts]
        if self.kind in BY_FACTOR:
            roots = [math.sqrt(abs(w)) for w in scaled]
            # the sign goes to one factor only: on both it would cancel
            signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
            return self.combine([p.A for p in parts], signed), self.combine(
                [p.B for p in parts], roots
            )
        if self.kind == "cat":
            side = torch.cat([p.A * w for p, w in zip(parts, scaled, strict=True)])
            return side, torch.cat([p.B for p in parts], 1)
        ranks, N, K = sum(len(p.A) for p in parts), len(parts[0].B), parts[0].A.shape[1]
        if self.kind == "svd" and self.clamp is None and ranks < min(N, K):
            return self._svd_of_sum(parts, scaled)
        deltas = [(p.B @ p.A) * p.scaling for p in parts]
        if transposed:
            deltas = [delta.T for delta in deltas]
        delta = self.combine(deltas, [p.weight for p in parts])
        return self._svd(delta.T if transposed else delta)

    def _svd(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(delta, full_matrices=self.full_matrices, driver=self.driver)
        r = min(self.rank, len(s))
        A, B = vh[:r], u[:, :r] * s[:r]
        if self.clamp is not None:
            high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), self.clamp)
            A, B = A.clamp(-high, high), B.clamp(-high, high)
        return A, B

    def _svd_of_sum(
        self, parts: list[AdapterFactors], scaled: list[float]
    ) -> tuple[Tensor, Tensor]:
        """The truncated SVD of Σ w B A, without making the sum [N, K].

        With all w A below each other as A, and all B side by side as B, the sum is B A. With the QR
        decompositions Aᵀ = Q_A R_A and B = Q_B R_B, the SVD of the small R_B R_Aᵀ gives its SVD.
        """
        q_a, r_a = torch.linalg.qr(
            torch.cat([p.A * w for p, w in zip(parts, scaled, strict=True)]).T
        )
        q_b, r_b = torch.linalg.qr(torch.cat([p.B for p in parts], 1))
        A, B = self._svd(r_b @ r_a.T)
        return A @ q_a.T, q_b @ B
