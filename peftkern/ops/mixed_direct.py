"""A mixed batch on products that read each adapter's A and B where they lie.

torch's batched products want factors side by side in one tensor, and copying them costs as much as
the products. MKL, which torch has on x86, takes an address for each product: one call makes
S = X_b A_iᵀ of all samples, another adds scale_i · S B_iᵀ to their rows of Y, each of its own rank.

Kept for equal batches are shapes and places within X, Y and S. Addresses are read in each call, and
each call asks every factor whether it still has the shape that was planned for.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from itertools import groupby
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
    """

    def __init__(self, dtype: torch.dtype, count: list[int], **of_group: list[Any]) -> None:
        self.run = mkl_batches()[dtype]
        number = ctypes.c_float if dtype is torch.float32 else ctypes.c_double
        kinds: dict[str, Any] = {"transa": ctypes.c_char, "transb": ctypes.c_char}
        kinds |= dict.fromkeys(("alpha", "beta"), number)

        def address(kind: Any, values: list[Any]) -> int:
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
        runs: list[tuple[int, int, int]] = []  # place of the adapter, first sample, samples
        sample = 0
        for i, own in groupby(choice):
            samples = len(list(own))
            if i >= 0 and (at := place[i]) is not None:
                runs.append((at, sample, samples))
            sample += samples

        def group(run: tuple[int, int, int]) -> tuple[int, float, int]:
            return ranks[run[0]], scales[run[0]], run[2] * T

        runs.sort(key=group)
        groups = [(kind, len(list(own))) for kind, own in groupby(runs, group)]
        ranked, scaled, rows = ([kind[i] for kind, _ in groups] for i in range(3))
        count = [number for _, number in groups]
        self.N, self.taken = N, [run[0] for run in runs]
        self.take: Callable[[Any], Any] | None = None
        if self.taken != list(range(len(ranks))) and len(runs) > 1:
            self.take = itemgetter(*self.taken)

        def each(value: Any) -> list[Any]:
            return [value] * len(groups)

        self.shrink = _Products(
            dtype, count, transa=each(b"T"), transb=each(b"N"), m=ranked, n=rows, k=each(K),
            alpha=each(1.0), lda=each(K), ldb=each(K), beta=each(0.0), ldc=ranked,
        )  # fmt: skip
        self.expand = _Products(
            dtype, count, transa=each(b"T"), transb=each(b"N"), m=each(N), n=rows, k=ranked,
            alpha=scaled, lda=ranked, ldb=ranked, beta=each(1.0), ldc=each(N),
        )  # fmt: skip
        x_at, y_at, s_at, self.count = [], [], [], 0
        for at, first, samples in runs:
            x_at.append(first * T * K * dtype.itemsize)
            y_at.append(first * T * N * dtype.itemsize)
            s_at.append(self.count * dtype.itemsize)
            self.count += samples * T * ranks[at]
        with torch.inference_mode(False):
            self.places = torch.tensor([x_at, y_at, s_at])
        # (addresses of X, Y and S, those of each product's parts of them), of the last call; read
        # by the next one only where the first are its own
        self._last: tuple[tuple[int, ...], Tensor] = (), self.places

    def _within(self, *starts: int) -> Tensor:
        """int64 [3, runs]: where each product's X, Y and S are, for X, Y and S that start there.

        Layers often get the same memory again, and need no new numbers then.
        """
        last = self._last
        if last[0] != starts:
            with torch.inference_mode(False):
                moved = self.places + torch.tensor(starts).unsqueeze(1)
            last = self._last = starts, moved
        return last[1]

    def add(self, y: Tensor, x: Tensor, factors: Factors) -> bool:
        """Add the updates of x [M, K] to y [M, N], both contiguous; False: a factor has no memory.

        The factors are as those that the runs were made for.
        """
        if not self.taken:
            return True
        addresses = [[*map(Tensor.data_ptr, ts)] for ts in (factors.A, factors.B)]
        if self.take is not None:
            addresses = [self.take(of) for of in addresses]
        elif len(self.taken) == 1:
            addresses = [[of[self.taken[0]]] for of in addresses]
        if not (all(addresses[0]) and all(addresses[1])):
            return False
        a, b = array("Q", addresses[0]), array("Q", addresses[1])
        room = Scratch(x, self.count)
        s = room.take(1, 1, self.count)
        if s is None:
            s = x.new_empty(self.count)
        within = self._within(x.data_ptr(), y.data_ptr(), s.data_ptr())
        xs = within.data_ptr()
        ys, ss = xs + 8 * len(self.taken), xs + 16 * len(self.taken)
        self.shrink(a.buffer_info()[0], xs, ss)
        self.expand(b.buffer_info()[0], ss, ys)
        room.give_back()
        return True


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
            y = base_output(x, w, bias).contiguous()
            if runs.add(y, x, factors):
                return y
            runs = "a factor has no memory"
        reason = runs
    if reason:
        note_once(_COPIES, reason)
    return None
