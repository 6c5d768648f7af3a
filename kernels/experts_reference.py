"""The float64 formulas of kernels that take the sorted rows of a mixture of experts.

``route`` is a :class:`.experts_route.Route`; P sorted rows. A mask is bool [P, K], of sorted rows
too. Rows that are in no group are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .experts_route import Route


def groups_of(route: Route) -> Iterator[tuple[int, int, slice]]:
    """(expert, adapter, sorted rows) of each group that has rows."""
    bounds = route.offsets.tolist()
    for group in range(route.groups):
        rows = slice(bounds[group], bounds[group + 1])
        if rows.start < rows.stop:
            yield group // route.adapters, group % route.adapters, rows


def sorted_rows(x: Tensor, route: Route, gather: bool, keep: Tensor | None = None) -> Tensor:
    """x as float64 [P, K], a row for each sorted row, masked."""
    x = x.detach().double()
    x = x[(route.pairs // route.k).long()] if gather else x
    return x if keep is None else x * keep


def shrink(
    x: Tensor,
    route: Route,
    a: Sequence[Tensor | None],
    scale: Sequence[float],
    gather: bool,
    keep: Tensor | None = None,
) -> Tensor:
    """S [P, max r] = scale_i · (mask ∘ x) A_i,eᵀ for the adapter i and the expert e of a row."""
    x = sorted_rows(x, route, gather, keep)
    s = x.new_zeros((route.P, max(t.shape[1] for t in a if t is not None)))
    for expert, i, rows in groups_of(route):
        factor = a[i]
        if factor is not None:
            s[rows, : factor.shape[1]] = scale[i] * (x[rows] @ factor[expert].double().T)
    return s


def grad_s(dy: Tensor, route: Route, b: Tensor, scale: float, gather: bool) -> Tensor:
    """dS [P, r] = scale · dY B_e."""
    return shrink(dy, route, [b.transpose(1, 2)], [scale], gather)


def _weighted(t: Tensor, route: Route, row_weight: Tensor | None) -> Tensor:
    t = t.detach().double()
    if row_weight is None:
        return t
    return t * row_weight.detach().double().reshape(-1)[route.pairs.long()][:, None]


def outer(
    left: Tensor,
    right: Tensor,
    route: Route,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Σ over the rows p of each expert of w_p left[p]ᵀ right[p], [E, columns, columns]."""
    left = _weighted(left, route, row_weight)
    out = left.new_zeros((route.experts, left.shape[1], right.shape[1]))
    for expert, _, rows in groups_of(route):
        out[expert] = left[rows].T @ right[rows]
    return out


def grad_b(
    dy: Tensor, route: Route, s: Tensor, gather: bool, row_weight: Tensor | None = None
) -> Tensor:
    """dB [E, N, r] = Σ w_p dY[p]ᵀ S[p]."""
    return outer(s, sorted_rows(dy, route, gather), route, row_weight).transpose(1, 2)


def grad_a(
    ds: Tensor,
    x: Tensor,
    route: Route,
    gather: bool,
    row_weight: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """dA [E, r, K] = Σ w_p dS[p]ᵀ (mask ∘ x)[p]."""
    return outer(ds, sorted_rows(x, route, gather, keep), route, row_weight)


def gemm(
    x: Tensor,
    route: Route,
    w: Tensor,
    s: Tensor | None = None,
    b: Sequence[Tensor | None] | None = None,
    *,
    gather: bool,
    scatter: bool,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Y [P, N], Y[p] = X[t] W_eᵀ + keep ∘ (S[p] B_eᵀ) + bias_e, zero for pairs of no group."""
    x = sorted_rows(x, route, gather)
    y = x.new_zeros((route.P, w.shape[1]))
    for e, adapter, rows in groups_of(route):
        y[rows] = x[rows] @ w[e].double().T
        factor = None if b is None else b[adapter]
        if s is not None and factor is not None:
            low = s[rows, : factor.shape[2]].double() @ factor[e].double().T
            y[rows] += low if keep is None else low * keep[rows]
        if bias is not None:
            y[rows] += bias[e].double()
    return y[route.pairs.long().argsort()] if scatter else y


def combine(y: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """Out [T, N], Out[t] = Σ_j weights[t, j] · Y[t·k + j]."""
    each = y.detach().double().view(-1, k, y.shape[1])
    return (each if weights is None else each * weights.double()[:, :, None]).sum(1)
