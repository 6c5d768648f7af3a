"""Routings and factors for tests of the kernels of mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from peftkern.kernels import experts_route
from peftkern.kernels.experts_route import Route
from tests.kernels.oracle import blas


def index_of(T: int, k: int, experts: int, how: str = "any", seed: int = 0) -> Tensor:
    """[T, k]; ``how``: "any", "one" (all on one expert), "few" (most have none), "elsewhere" (some
    are on an expert that is not here)."""
    g = torch.Generator().manual_seed(seed)
    if how == "one":
        return torch.full((T, k), experts // 2)
    most = {"any": experts, "few": max(1, experts // 4), "elsewhere": experts + 3}[how]
    return torch.randint(0, most, (T, k), generator=g)


def routed(
    T: int, k: int, experts: int, block_m: int = 32, how: str = "any", adapters: int = 1
) -> Route:
    """A route whose last adapter is of about as many tokens as each other."""
    g = torch.Generator().manual_seed(5)
    choice = torch.randint(0, adapters, (T,), generator=g) if adapters > 1 else None
    return experts_route.route(index_of(T, k, experts, how), experts, block_m, choice, adapters)


def factors(
    experts: int, r: int, columns: int, dtype: torch.dtype, layout: str = "a", seed: int = 1
) -> Tensor:
    """A factor [E, r, columns] in the strides of PEFT's A ("a"), or of its B transposed ("b")."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(experts, r, columns, generator=g).mul(0.3).to(dtype)
    if layout == "a":
        return drawn
    stacked = drawn.permute(2, 1, 0).reshape(columns, r * experts)  # lora_B
    return stacked.view(columns, r, experts).permute(2, 1, 0)


def by_tiles(a: Tensor, b: Tensor) -> Tensor:
    """a [m, K] @ b [K, n] in a's dtype, summed in fp32 as kernels do it.

    That is in tiles with at least 16 rows and columns; for a matrix with few rows BLAS sums in
    another order, whose errors may be smaller.
    """
    (m, K), n = a.shape, b.shape[1]
    a = pad(a, (0, -K % 128, 0, -m % 16))
    b = pad(b, (0, -n % 16, 0, -K % 128))
    total = torch.zeros(a.shape[0], b.shape[1])
    for k0 in range(0, a.shape[1], 128):
        total += blas(a[:, k0 : k0 + 128], b[k0 : k0 + 128])
    return total[:m, :n].to(a.dtype)


def used(t: Tensor, route: Route) -> Tensor:
    """The rows of ``t`` that are in a group; the others are unspecified."""
    return t[: int(route.offsets[-1])]
