"""A few numbers of an MLP's middle, with the same numbers in float64; see :mod:`.sampled`.

forward    Y at 8 rows x 64 columns, S at these rows
backward   dG and dU at 8 rows x 64 columns; dA of down at 64 columns, from all rows
           dB of down at 64 rows
           dS and dB of gate's and up's adapters, of the dG and dU that the way itself made
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mlp_parts import Member
from .mlp_torch import ACTIVATIONS, _derivative
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .sampled import (
    COLUMNS,
    ROWS,
    Exact,
    Sample,
    _grad_b,
    _grad_s,
    _kept,
    _linear,
    _masked,
    of_other_shapes,
    places,
    product,
)

_ROWS_AT_ONCE = 1024


def _hidden(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """H of some rows and columns in float64."""
    h = ACTIVATIONS[act](gate.double())
    return h if up is None else h * up.double()


def forward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: Projection | Plain,
    words: Sequence[Tensor | None],
) -> Exact:
    """The samples of (Y [M, N], S [M, r] or None, mask); ``words`` has down's packed mask."""
    n, device = down.w.shape[1], gate.device

    @functools.cache
    def truth() -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows, columns = places(gate.shape[0], ROWS, device), places(n, COLUMNS, device)
        h = _hidden(gate[rows], None if up is None else up[rows], act)
        if isinstance(down, Projection):
            word = words[0] if words else None
            y, s = _linear(h, down, None if word is None else word[rows], columns)
            return rows, columns, y, s
        y = product(h, down.w[:, columns])
        return rows, columns, y if down.bias is None else y + down.bias[columns].double(), None

    def samples(result: Any) -> list[Sample]:
        y, s, _ = result
        outputs, shapes = [y], [(gate.shape[0], n)]
        if isinstance(down, Projection):
            outputs.append(s)
            shapes.append((gate.shape[0], down.A.shape[0]))
        if found := of_other_shapes(outputs, shapes):
            return found
        rows, columns, exact_y, exact_s = truth()
        found = [Sample("Y", y[rows][:, columns], exact_y)]
        if exact_s is not None:
            found.append(Sample("S", s[rows], exact_s))
        return found

    return samples


def backward(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    down: ProjectionGrad | PlainGrad,
    members: tuple[Member | None, Member | None],
) -> Exact:
    """The samples of (Grads, dB [N, r] of down or None)."""
    (M, K), device = gate.shape, gate.device
    of_down = down if isinstance(down, ProjectionGrad) else None
    wants_a = of_down is not None and of_down.needs_a
    wants_b = of_down is not None and of_down.needs_b and of_down.s is not None

    @functools.cache
    def truth() -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(rows, columns, dG, dU, dA of down)."""
        rows, columns = places(M, ROWS, device), places(K, COLUMNS, device)
        dh = product(down.dy[rows], down.w[columns].t())
        if of_down is not None:
            kept = None if of_down.bits is None else of_down.bits[rows]
            low = product(_grad_s(of_down, None, rows), of_down.A[:, columns])
            dh = dh + _masked(low, _kept(kept, columns))
        g = gate[rows][:, columns].double()
        u = None if up is None else up[rows][:, columns].double()
        du = None if u is None else dh * ACTIVATIONS[act](g)
        dg = _derivative(act, g, dh if u is None else dh * u)
        return rows, columns, dg, du, _grad_a(columns) if wants_a else None

    def _grad_a(columns: Tensor) -> Tensor:
        assert of_down is not None
        total = torch.zeros(len(of_down.A), len(columns), dtype=torch.float64, device=device)
        for i in range(0, M, _ROWS_AT_ONCE):
            part = slice(i, i + _ROWS_AT_ONCE)
            h = _hidden(gate[part][:, columns], None if up is None else up[part][:, columns], act)
            kept = None if of_down.bits is None else of_down.bits[part]
            total.addmm_(_grad_s(of_down, None, part).t(), _masked(h, _kept(kept, columns)))
        return total

    def samples(result: Any) -> list[Sample]:
        made, db = result
        pairs = zip(members, (made.dgate, made.dup), made.ds, made.dbs, strict=True)
        inner = [(m, dy, ds, d) for m, dy, ds, d in pairs if m is not None]
        wanted: list[Any] = [(made.dgate, (M, K))]
        wanted += [(made.dup, (M, K))] if up is not None else []
        if of_down is not None:
            wanted += [(made.da, of_down.A.shape)] if wants_a else []
            wanted += [(db, of_down.B.shape)] if wants_b else []
        for m, _, ds, d in inner:
            wanted.append((ds, (M, m.B.shape[1])))
            wanted += [(d, m.B.shape)] if m.s is not None else []
        if found := of_other_shapes([t for t, _ in wanted], [s for _, s in wanted]):
            return found
        rows, columns, exact_g, exact_u, exact_a = truth()
        found = [Sample("dG", made.dgate[rows][:, columns], exact_g)]
        if exact_u is not None:
            found.append(Sample("dU", made.dup[rows][:, columns], exact_u))
        if exact_a is not None:
            found.append(Sample("dA", made.da[:, columns], exact_a))
        if wants_b and of_down is not None:
            at = places(db.shape[0], COLUMNS, device)
            found.append(Sample("dB", db[at], _grad_b(of_down)))
        for m, dy, ds, d in inner:
            found.append(Sample("dS", ds[rows], m.factor * product(dy[rows], m.B)))
            if m.s is not None:
                found.append(Sample("dB", d[columns], product(dy[:, columns].t(), m.s)))
        return found

    return samples
