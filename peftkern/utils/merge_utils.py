"""Combination of the updates of several adapters (tasks): task arithmetic, TIES and DARE.

Each function takes a tensor and a weight for each task, with all tensors of the same shape, and
returns one tensor of that shape. Task arithmetic (Ilharco et al., 2022, arXiv 2212.04089) is the
weighted sum. TIES (Yadav et al., 2023, arXiv 2306.01708) prunes small values, elects a sign for
each element and averages the tasks that agree with it. DARE (Yu et al., 2023, arXiv 2311.03099)
prunes at random and scales the rest by 1 / density.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

SignMethod = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """``weights`` [n] as [n, 1, …, 1], to multiply stacked ``task_tensors`` [n, …] by."""
    return weights.reshape(*weights.shape, *(1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """``tensor`` with only its int(density · numel) largest magnitudes, zeros elsewhere."""
    flat = tensor.flatten()
    keep = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, keep, flat[keep]).view_as(tensor)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """``tensor`` with each value kept with probability ``density``, and zeros elsewhere.

    ``rescale`` divides by the density, so that the expected value is the same.
    """
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale and density > 0 else kept


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:
    """``tensor`` with a share ``density`` of its values, and zeros elsewhere.

    A density of 1 or more keeps all values and warns.

    Raises:
        ValueError: a negative density, or an unknown method.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.",
            stacklevel=2,
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}")


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """bool [n, …], True where a value of the stacked tasks has the sign of the majority.

    ``method``: "total" weighs the signs by the values, "frequency" counts them; RuntimeError for
    others. A balance counts as +.
    """
    signs = tensor.sign()
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    votes = (tensor if method == "total" else signs).sum(0)
    return signs == torch.where(votes >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean of the stacked tasks [n, …] over those in the mask; 0 where the mask has none."""
    total = (task_tensors * majority_sign_mask).sum(0)
    return total / majority_sign_mask.sum(0).clamp(min=1)


def _stacked(
    tensors: list[Tensor], density: float | None, method: Literal["magnitude", "random"]
) -> Tensor:
    """The tensors stacked, [n, …], pruned if a density is given; random pruning rescales."""
    if density is not None:
        tensors = [prune(t, density, method, rescale=method == "random") for t in tensors]
    return torch.stack(tensors)


def _sum(stacked: Tensor, weights: Tensor) -> Tensor:
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def _elect(stacked: Tensor, weights: Tensor, majority_sign_method: SignMethod) -> Tensor:
    mask = calculate_majority_sign_mask(stacked, majority_sign_method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum Σ weight · task."""
    return _sum(_stacked(task_tensors, None, "magnitude"), weights)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The sum Σ weight · task of tasks that are pruned to their largest values."""
    return _sum(_stacked(task_tensors, density, "magnitude"), weights)


def ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> Tensor:
    """TIES: prunes to the largest values, elects signs, averages weight · task where they agree."""
    return _elect(_stacked(task_tensors, density, "magnitude"), weights, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of tasks after DARE's pruning."""
    return _sum(_stacked(task_tensors, density, "random"), weights)


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> Tensor:
    """TIES' election and average of tasks after DARE's pruning."""
    return _elect(_stacked(task_tensors, density, "random"), weights, majority_sign_method)
