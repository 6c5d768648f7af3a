"""A mixed batch on products that read each adapter's A and B where they lie.

torch's batched products want factors side by side in one tensor, and copying them costs as much as
the products. MKL, which torch has on x86, takes an address for each product: one call or two make
S = X_b A_iᵀ of all samples, another adds scale_i · S B_iᵀ to their rows of Y, each of its own rank.
S comes before the base product, which then finds X in the cache.

Kept for equal batches are shapes and places within X, Y and S. Addresses are read in each call, and
each call asks every factor whether it still has the shape that was planned for.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from ..utils.private import dispatch_depth, in_transform, like, mkl_batches
from . import autocast
from .bases.linear import base_output
from .bases.weight import BaseWeight
from .notes import note_once
from .scratch import Scratch
from .tracing import is_recording

_PLAIN = (Tensor, Parameter)
_BASES = (*_PLAIN, BaseWeight)
_COPIES = "a mixed batch copies its adapters' factors side by side: %s"


class Adapter(NamedTuple):
    """The weights and the scaling of an adapter in one layer."""

    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    scale: float


class Factors:
    """The adapters of a batch in one layer, as lists.

    Args:
        A, B, scales: of each adapter with weights in this layer.
        place: for each adapter of the batch its place in the lists, or None for one without
            weights.
    """

    __slots__ = ("A", "B", "place", "runs", "scales")

    def __init__(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scales: tuple[float, ...],
        place: tuple[int | None, ...],
    ) -> None:
        self.A, self.B, self.scales, self.place = A, B, scales, place
        self.runs: Runs | None = None  # of :meth:`Batches.recognise`

    @classmethod
    def of(cls, adapters: Sequence[Adapter | tuple[Tensor, Tensor, float] | None]) -> Factors:
        held = [a for a in adapters if a is not None]
        places = iter(range(len(held)))
        place = tuple(None if a is None else next(places) for a in adapters)
        scales = tuple(a[2] for a in held)
        return cls([a[0] for a in held], [a[1] for a in held], scales, place)

    def adapters(self) -> list[Adapter | None]:
        """An ``Adapter``, or None, for each of the batch."""
        return [
            None if i is None else Adapter(self.A[i], self.B[i], self.scales[i]) for i in self.place
        ]


class _Products:
    """C_p = alpha_g · op(A_p) op(B_p) + beta · C_p for the products p of groups g.

    Matrices are MKL's: stored column by column, so that rows and columns change their names.

    Args:
        dtype: float32 or float64.
        count: products of each group.
        of_group: MKL's arguments by name: a list with a value for each group, or one for all.
    """

    def __init__(self, dtype: torch.dtype, count: list[int], **of_group: Any) -> None:
        self.run = mkl_batches()[dtype]
        number = ctypes.c_float if dtype is torch.float32 else ctypes.c_double
        kinds: dict[str, Any] = {"transa": ctypes.c_char, "transb": ctypes.c_char}
        kinds |= dict.fromkeys(("alpha", "beta"), number)

        def address(kind: Any, value: Any) -> int:
            values = value if isinstance(value, list) else [value] * len(count)
            self.kept.append(made := (kind * len(values))(*values))
            return ctypes.addressof(made)

        self.kept: list[Any] = []  # what the addresses are of
        at = {k: address(kinds.get(k, ctypes.c_int64), v) for k, v in of_group.items()}
        self.head = tuple(at[k] for k in ("transa", "transb", "m", "n", "k", "alpha"))
        self.lda, self.ldb, self.beta, self.ldc = (at[k] for k in ("lda", "ldb", "beta", "ldc"))
        self.tail = address(ctypes.c_int64, [len(count)]), address(ctypes.c_int64, count)

    def __call__(self, a: int, b: int, c: int) -> None:
        """a, b, c: the addresses of each product's addresses."""
        self.run(*self.head, a, self.lda, b, self.ldb, self.beta, c, self.ldc, *self.tail)


class _Places:
    """Where the parts of a tensor are, for parts at these offsets in bytes."""

    def __init__(self, offsets: list[int]) -> None:
        self.offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu")
        # (the tensor's address, those of its parts) of the last call; read by the next one only
        # where the first is its own: layers often get the same memory again
        self._last: tuple[int, Tensor] = 0, self.offsets

    def of(self, t: Tensor) -> Tensor:
        """int64 addresses in the tensor; to be held as long as they are read."""
        start, last = t.data_ptr(), self._last
        if last[0] != start:
            last = self._last = start, self.offsets + start
        return last[1]


class _Group(NamedTuple):
    """What the products of a group share. One of S is [r, rows] with ``by_rows``, or [rows, r]."""

    by_rows: bool
    r: int
    rows: int  # of X and Y
    scale: float


def _by_rows(rows: int, r: int) -> bool:
    """True when X Aᵀ of [rows, r] is faster with the rows side by side than with the ranks.

    MKL computes what lies side by side in vectors, and a part of a vector takes longer than a whole
    one: 16 rows of rank 8 take 0.65 of the time in this order, and 15 rows 1.7 of it.
    """
    of_rows, of_r = (min(n & -n, 16) for n in (rows, r))  # the largest power of 2 that divides it
    return of_rows > of_r or (of_rows == of_r >= 8 and rows > r)


class Runs:
    """The products of a batch; samples of one adapter that follow each other are one product."""

    def __init__(
        self,
        choice: Sequence[int],
        place: tuple[int | None, ...],
        ranks: list[int],
        scales: tuple[float, ...],
        sizes: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> None:
        T, K, N = sizes
        runs: list[tuple[_Group, int, int]] = []  # and the place of its adapter, its first sample
        sample = 0
        for i, own in groupby(choice):
            samples = len(list(own))
            if i >= 0 and (at := place[i]) is not None:
                r, rows = ranks[at], samples * T
                runs.append((_Group(_by_rows(rows, r), r, rows, scales[at]), at, sample))
            sample += samples
        runs.sort()
        groups = [(g, len(list(own))) for g, own in groupby(runs, itemgetter(0))]
        self.N, self.products = N, len(runs)
        self.by_rank = sum(not g.by_rows for g, _, _ in runs)
        self.shrink_by_rank = _shrink(dtype, K, [held for held in groups if not held[0].by_rows])
        self.shrink_by_rows = _shrink(dtype, K, [held for held in groups if held[0].by_rows])
        self.expand = _expand(dtype, N, groups)
        # from all addresses of A and B, one behind the other, those of the products
        taken = [at for _, at, _ in runs]
        self.take: Callable[[Any], Any] | None = None
        if taken and taken != list(range(len(ranks))):
            self.take = itemgetter(*taken, *(len(ranks) + at for at in taken))
        size = dtype.itemsize
        self.x_places = _Places([first * T * K * size for _, _, first in runs])
        self.y_places = _Places([first * T * N * size for _, _, first in runs])
        *starts, self.room = accumulate((g.r * g.rows for g, _, _ in runs), initial=0)
        self.s_places = _Places([start * size for start in starts])

    def output(self, x: Tensor, w: Tensor, bias: Tensor | None, factors: Factors) -> Tensor | None:
        """Y [M, N] for x [M, K], contiguous, and w [N, K], dense or quantised.

        The factors are as those that the runs were made for. None: one of them has no memory.
        """
        if not self.products:
            return base_output(x, w, bias)
        addresses: Any = [*map(Tensor.data_ptr, factors.A), *map(Tensor.data_ptr, factors.B)]
        if not all(addresses):
            return None
        held = array("Q", addresses if self.take is None else self.take(addresses))
        a = held.buffer_info()[0]
        b = a + 8 * self.products
        room = Scratch(x, self.room)
        s = room.take(1, 1, self.room)
        if s is None:
            s = x.new_empty(self.room)
        x_places, s_places = self.x_places.of(x), self.s_places.of(s)
        xs, ss, first = x_places.data_ptr(), s_places.data_ptr(), 8 * self.by_rank
        if first:
            self.shrink_by_rank(a, xs, ss)
        if self.by_rank < self.products:
            self.shrink_by_rows(xs + first, a + first, ss + first)
        y = base_output(x, w, bias).contiguous()
        assert y.dtype is x.dtype  # MKL asks nothing
        y_places = self.y_places.of(y)
        self.expand(b, ss, y_places.data_ptr())
        room.give_back()
        return y


_Held = list[tuple[_Group, int]]  # groups, and how many products each has


def _shrink(dtype: torch.dtype, K: int, held: _Held) -> _Products:
    """S = X Aᵀ, all by rows, for the addresses of X, A and S, or all not, for those of A, X, S."""
    sides = [(g.rows, g.r) if g.by_rows else (g.r, g.rows) for g, _ in held]
    m, n = [side[0] for side in sides], [side[1] for side in sides]
    return _Products(
        dtype, [number for _, number in held], transa=b"T", transb=b"N", m=m, n=n, k=K,
        alpha=1.0, lda=K, ldb=K, beta=0.0, ldc=m,
    )  # fmt: skip


def _expand(dtype: torch.dtype, N: int, held: _Held) -> _Products:
    """Y += scale · S Bᵀ, for the addresses of B, S and Y."""
    groups = [g for g, _ in held]
    r, rows, scale = [g.r for g in groups], [g.rows for g in groups], [g.scale for g in groups]
    return _Products(
        dtype, [number for _, number in held], transa=b"T", m=N, n=rows, k=r, alpha=scale, lda=r,
        transb=[b"T" if g.by_rows else b"N" for g in groups],
        ldb=[g.rows if g.by_rows else g.r for g in groups], beta=1.0, ldc=N,
    )  # fmt: skip


class _Seen:
    """Factors that a batch had: what tells them, and their runs, or why they have none."""

    def __init__(self, facts: list[Any], runs: Runs | str) -> None:
        self.facts, self.runs = facts, runs
        self.check: Callable[..., bool] | None = None  # the same as the facts, and faster


class Batches:
    """The runs of one choice of adapters, for layers of all shapes."""

    def __init__(self, choice: Sequence[int]) -> None:
        self.choice = choice
        self._seen: dict[Any, list[_Seen]] = {}

    def __reduce__(self) -> Any:
        return Batches, (self.choice,)  # addresses are this process's

    def recognise(self, x: Tensor, N: int, factors: Factors) -> bool:
        """True, and ``factors.runs`` is set, if an earlier call had such factors and such an x.

        They are then plain, contiguous, on a CPU and of x's dtype.
        """
        for seen in self._seen.get(self._key(x, N, factors), ()):
            if seen.check is not None and seen.check(*factors.A, *factors.B):
                assert not isinstance(seen.runs, str)
                factors.runs = seen.runs
                return True
        return False

    def _key(self, x: Tensor, N: int, factors: Factors) -> Any:
        return x.shape[1:], N, x.dtype, factors.scales, factors.place

    def runs(self, x: Tensor, N: int, factors: Factors) -> Runs | str:
        """The runs, or the reason that there are none."""
        if factors.runs is not None and factors.runs.N == N:
            return factors.runs
        facts = [
            (t.__class__, t.dtype, t.device, t.shape, t.is_contiguous(), t.is_neg())
            if t.layout is torch.strided
            else (t.__class__, t.layout)
            for t in (*factors.A, *factors.B)
        ]
        held = self._seen.setdefault(self._key(x, N, factors), [])
        for seen in held:
            if seen.facts == facts:
                # Making the check takes as long as asking for the facts a few times.
                if not isinstance(seen.runs, str):
                    seen.check = like([*factors.A, *factors.B])
                return seen.runs
        found: Runs | str | None = _why_not_factors(x, N, factors)
        if found is None:
            T = x.shape[1:-1].numel()
            ranks = [A.shape[0] for A in factors.A]
            sizes = T, x.shape[-1], N
            found = Runs(self.choice, factors.place, ranks, factors.scales, sizes, x.dtype)
        if len(held) >= _LIMIT:
            held.clear()
        held.append(_Seen(facts, found))
        return found


_LIMIT = 8  # ranks that are changed again and again must not fill memory


def _why_not_factors(x: Tensor, N: int, factors: Factors) -> str | None:
    K = x.shape[-1]
    for A, B in zip(factors.A, factors.B, strict=True):
        for t in (A, B):
            if t.__class__ not in _PLAIN or t.layout is not torch.strided or not t.is_cpu:
                return "a factor is not a plain tensor on a CPU"
            if t.dtype is not x.dtype:
                return "their dtype is not the activations'"
            if not t.is_contiguous() or t.is_neg() or t.numel() == 0:
                return "a factor is not contiguous"
        if A.dim() != 2 or A.shape[1] != K or B.shape != (N, A.shape[0]):
            return "shapes do not fit"  # torch's products raise the error
    return None


def _why_not(x: Tensor, w: Tensor, bias: Tensor | None) -> str | None:
    """The reason that a call has no direct products, "" for one that is not worth saying."""
    if not x.is_cpu or x.numel() == 0 or w.numel() == 0:
        return ""
    if is_recording() or in_transform() or dispatch_depth():
        return ""
    if x.__class__ not in _PLAIN or w.__class__ not in _BASES or w.dtype is not x.dtype:
        return "activations and weight are not plain tensors of one dtype"
    if bias is not None and (bias.__class__ not in _PLAIN or bias.dtype is not x.dtype):
        return "the bias is not a plain tensor of the activations' dtype"
    if autocast.is_on(x):
        return "autocast is on"
    if x.dtype not in mkl_batches():
        return f"no products by address in this torch, for {x.dtype} on this processor"
    return None


def mixed(
    x: Tensor, w: Tensor, bias: Tensor | None, factors: Factors, batches: Batches
) -> Tensor | None:
    """Y [M, N] for x [samples, ..., K], w [N, K], dense or quantised, without gradients.

    None when it cannot be.
    """
    reason = _why_not(x, w, bias)
    if reason is None:
        runs = batches.runs(x, w.shape[0], factors)
        if not isinstance(runs, str):
            x = x.reshape(-1, x.shape[-1]).contiguous().resolve_neg()
            y = runs.output(x, w, bias, factors)
            if y is not None:
                return y
            runs = "a factor has no memory"
        reason = runs
    if reason:
        note_once(_COPIES, reason)
    return None
