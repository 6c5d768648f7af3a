"""A few numbers of a LoRA operation's result, with the same numbers in float64.

A race (:mod:`.race`) judges every way by them, also torch's own. Each function here takes the
arguments of an operation and returns another function, which takes the result of a way and returns
:class:`Sample` s; nothing is computed before that is called. The float64 numbers come from the
formulas of :mod:`peftkern.kernels.reference`, on the tensors of the call, once for each race:

    forward    Y at 8 rows x 64 columns, S at these rows        16 K (64 + r) FLOP a projection
    infer      Y at 8 rows x 64 columns                         the same
    mixed      Y at up to 18 rows of 9 samples x 64 columns     36 K (64 + r)
    backward   dX at 8 rows x 64 columns                        16 N (64 + r)
               dA at 64 columns, from all rows                  2 M N r + 128 M r
               dB at 64 rows, from all rows of the given S      128 M r

Places are spread evenly, with the first and the last among them, and are the same in every race: no
random number is drawn. At most 2**22 numbers (32 MiB) and the results above are converted to
float64 at a time; the chosen rows and columns are also copied in their own dtype. No race runs
while a CUDA graph is captured, so this does not either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .projection import Projection, ProjectionGrad

ROWS, COLUMNS = 8, 64
MOST_ADAPTERS = 8  # in a mixed batch
BLOCK = 2**22  # numbers that are converted to float64 at a time
_ROWS_AT_ONCE = 1024


class Sample(NamedTuple):
    """Numbers of one output of a way, and the correct ones."""

    name: str  # the output's name
    got: Tensor  # in the output's dtype
    exact: Tensor  # float64, got's shape
    # errors are relative to this if it is above the norm of ``exact``, as when terms cancel
    size: float = 0.0


Exact = Callable[[Any], list[Sample]]


def places(n: int, count: int, device: torch.device) -> Tensor:
    """``count`` of the numbers 0 to n - 1, int64 and ascending; all of them if n is smaller.

    They are spread evenly, with the first and the last among them.
    """
    if n <= count:
        return torch.arange(n, device=device)
    spread = torch.linspace(0, n - 1, count, dtype=torch.float64, device=device)
    return spread.round().long()


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of a [m, k] and b [k, n] in float64, converted in blocks of k."""
    (m, k), n = a.shape, b.shape[1]
    step = max(1, BLOCK // max(1, m + n))
    total = torch.zeros(m, n, dtype=torch.float64, device=a.device)
    for i in range(0, k, step):
        total.addmm_(a[:, i : i + step].double(), b[i : i + step].double())
    return total


def of_other_shapes(found: Sequence[Tensor | None], shapes: Sequence[Any]) -> list[Sample]:
    """A sample with an infinite error when the outputs have other shapes; none when they fit."""
    if [None if t is None else tuple(t.shape) for t in found] == [tuple(s) for s in shapes]:
        return []
    nothing = torch.zeros(1, dtype=torch.float64, device="cpu")
    return [Sample("shape", nothing.add(float("inf")), nothing)]


def _kept(words: Tensor | None, columns: Tensor) -> Tensor | None:
    """Some columns of a packed mask [rows, ceil(K / 32)] as 0 and 1 in float64."""
    if words is None:
        return None
    return (words[:, columns // 32] >> (columns % 32) & 1).double()


def _masked(t: Tensor, keep: Tensor | None) -> Tensor:
    return t.double() if keep is None else t.double() * keep


# ------------------------------------------------------------------------------ forward


def _linear(
    x: Tensor, m: Projection, words: Tensor | None, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """(Y [rows, columns], S [rows, r]) of some rows of x and of their packed mask."""
    every = torch.arange(x.shape[1], device=x.device)
    s = m.scale / (1.0 - m.p) * product(_masked(x, _kept(words, every)), m.A.t())
    y = product(x, m.w[:, columns]) + product(s, m.B[columns].t())
    return (y if m.bias is None else y + m.bias[columns].double()), s


def forward(x: Tensor, members: list[Projection], words: Sequence[Tensor | None]) -> Exact:
    """The samples of [(Y_i [M, N_i], S_i [M, r_i], mask_i)] of projections of x [M, K].

    ``words`` are their packed masks.
    """
    rows = functools.cache(lambda: places(x.shape[0], ROWS, x.device))

    @functools.cache
    def truth() -> list[tuple[Tensor, Tensor, Tensor]]:
        """(columns, Y, S) of each projection."""
        found = []
        for m, word in zip(members, words, strict=True):
            columns = places(m.B.shape[0], COLUMNS, x.device)
            of_rows = None if word is None else word[rows()]
            found.append((columns, *_linear(x[rows()], m, of_rows, columns)))
        return found

    def samples(result: Any) -> list[Sample]:
        outputs = [t for y, s, _ in result for t in (y, s)]
        shapes = [(x.shape[0], size) for m in members for size in m.B.shape]
        found = of_other_shapes(outputs, shapes)
        if found:
            return found
        for (y, s, _), (columns, exact_y, exact_s) in zip(result, truth(), strict=True):
            found.append(Sample("Y", y[rows()][:, columns], exact_y))
            found.append(Sample("S", s[rows()], exact_s))
        return found

    return samples


def infer(
    x: Tensor, w: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, transposed: bool
) -> Exact:
    """The samples of Y [..., N] for x [..., K]; ``w`` is [K, N] when ``transposed``."""
    exact = infer_group(x, [Projection(w, bias, A, B, scale, 0.0, transposed)])
    return lambda y: exact([y])


def infer_group(x: Tensor, members: list[Projection]) -> Exact:
    """The samples of [Y_i [..., N_i]] of projections of x [..., K], without their dropout."""

    @functools.cache
    def truth() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """(rows, (columns, Y) of each projection)."""
        x2, found = x.reshape(-1, x.shape[-1]), []
        rows = places(len(x2), ROWS, x.device)
        for m in members:
            columns = places(m.B.shape[0], COLUMNS, x.device)
            found.append((columns, _linear(x2[rows], m._replace(p=0.0), None, columns)[0]))
        return rows, found

    def samples(ys: Any) -> list[Sample]:
        found = of_other_shapes(ys, [(*x.shape[:-1], m.B.shape[0]) for m in members])
        if found:
            return found
        rows, exact = truth()
        for y, (columns, numbers) in zip(ys, exact, strict=True):
            found.append(Sample("Y", y.reshape(-1, y.shape[-1])[rows][:, columns], numbers))
        return found

    return samples


def mixed(x: Tensor, w: Tensor, bias: Tensor | None, adapters: Any, index: Any) -> Exact:
    """The samples of Y [M, N] for x [M, K], w [N, K] and adapters as in :mod:`.lora_mixed`.

    The rows are the first and the last of the first and the last sample of the batch, and of the
    first sample of each of up to 8 adapters, of which "none" is one.
    """
    choice, N = index.choice, w.shape[0]
    T = x.shape[0] // max(len(choice), 1)

    @functools.cache
    def truth() -> tuple[Tensor, Tensor, Tensor]:
        columns = places(N, COLUMNS, x.device)
        firsts = [choice.index(i) for i in dict.fromkeys(choice)][:MOST_ADAPTERS]
        rows: list[int] = []
        parts = []
        for j in sorted({*firsts, len(choice) - 1}):
            of = sorted({j * T, j * T + T - 1})
            y = product(x[of], w[columns].t())
            adapter = adapters[choice[j]] if choice[j] >= 0 else None
            if adapter is not None:
                s = adapter.scale * product(x[of], adapter.A.t())
                y += product(s, adapter.B[columns].t())
            rows += of
            parts.append(y if bias is None else y + bias[columns].double())
        return torch.tensor(rows, device=x.device), columns, torch.cat(parts)

    def samples(y: Tensor) -> list[Sample]:
        if found := of_other_shapes([y], [(x.shape[0], N)]):
            return found
        rows, columns, exact = truth()
        return [Sample("Y", y[rows][:, columns], exact)]

    return samples


# ----------------------------------------------------------------------------- backward


def backward(
    x: Tensor, members: list[ProjectionGrad], needs_x: bool, given: list[Tensor] | None = None
) -> Exact:
    """The samples of (dX [M, K], [(dA_i [r_i, K], dB_i [N_i, r_i])]) of projections of x.

    Each gradient may be None. dB is that for the given S. With ``given`` dS_i the samples
    are those for that dS, and none of dB.
    """
    (M, K), device = x.shape, x.device
    wants_b = [given is None and m.needs_b and m.s is not None for m in members]
    made: list[Tensor | None] = [*given] if given is not None else [None] * len(members)

    @functools.cache
    def columns() -> Tensor:
        return places(K, COLUMNS, device)

    @functools.cache
    def truth() -> tuple[Tensor, Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        rows = places(M, ROWS, device)
        dx = None
        if needs_x:
            both = zip(members, made, strict=True)
            dx = torch.stack([_grad_x(m, ds, rows, columns()) for m, ds in both]).sum(0)
        pairs = [
            (_grad_a(x, m, ds, columns()) if m.needs_a else None, _grad_b(m) if wants else None)
            for m, ds, wants in zip(members, made, wants_b, strict=True)
        ]
        return rows, dx, pairs

    def samples(result: Any) -> list[Sample]:
        dx, pairs = result
        wanted: list[tuple[Any, Any]] = [(dx, (M, K))] if needs_x else []
        for m, (da, db), wants in zip(members, pairs, wants_b, strict=True):
            wanted += [(da, m.A.shape)] if m.needs_a else []
            wanted += [(db, m.B.shape)] if wants else []
        found = of_other_shapes([t for t, _ in wanted], [s for _, s in wanted])
        if found:
            return found
        rows, exact_x, exact_pairs = truth()
        if exact_x is not None:
            found.append(Sample("dX", dx[rows][:, columns()], exact_x))
        for (da, db), (exact_a, exact_b) in zip(pairs, exact_pairs, strict=True):
            if exact_a is not None:
                found.append(Sample("dA", da[:, columns()], exact_a))
            if exact_b is not None:
                at = places(db.shape[0], COLUMNS, device)
                found.append(Sample("dB", db[at], exact_b))
        return found

    return samples


def _grad_s(m: ProjectionGrad, made: Tensor | None, rows: Any) -> Tensor:
    """dS of some rows, with the factor 1 / (1 - p)."""
    if made is not None:
        return made[rows].double()
    return m.scale / (1.0 - m.p) * product(m.dy[rows], m.B)


def _grad_x(m: ProjectionGrad, made: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """One projection's part of dX [rows, columns]: dY W + mask * (dS A)."""
    dy = m.dy[rows]
    low = product(_grad_s(m, made, rows), m.A[:, columns])
    kept = None if m.bits is None else m.bits[rows]
    return product(dy, m.w[columns].t()) + _masked(low, _kept(kept, columns))


def _grad_a(x: Tensor, m: ProjectionGrad, made: Tensor | None, columns: Tensor) -> Tensor:
    """dA [r, columns] = dSᵀ (X masked)."""
    total = torch.zeros(len(m.A), len(columns), dtype=torch.float64, device=x.device)
    for i in range(0, x.shape[0], _ROWS_AT_ONCE):
        part = slice(i, i + _ROWS_AT_ONCE)
        kept = _kept(None if m.bits is None else m.bits[part], columns)
        total.addmm_(_grad_s(m, made, part).t(), _masked(x[part][:, columns], kept))
    return total


def _grad_b(m: ProjectionGrad) -> Tensor:
    """dB = dYᵀ S at some of its rows."""
    assert m.s is not None
    return product(m.dy[:, places(m.dy.shape[1], COLUMNS, m.dy.device)].t(), m.s)
