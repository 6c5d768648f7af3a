"""Changing base weights at the end of an injection, when nothing can fail any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights of an adapter pass through under a base weight of ``dtype``."""
    return dtype if dtype.is_floating_point else torch.float32


@dataclass
class Start:
    """The first values of an adapter, A [r, K] and B [N, r], and what becomes of the base weight:
    ``new_base`` is None when it stays, else a function of the old weight as it is stored. ``undo``
    is its inverse up to rounding, None when there is none."""

    A: Tensor
    B: Tensor
    new_base: Callable[[Tensor], Tensor] | None = None
    undo: Callable[[Tensor], Tensor] | None = None


def minus_product(A: Tensor, B: Tensor, scaling: float, transposed: bool = False) -> Start:
    """A and B, with W -> W - scaling · B A, computed in float32 and rounded once."""

    def change(weight: Tensor, sign: float) -> Tensor:
        delta = scaling * B @ A
        wide = weight.to(torch.float32)
        return (wide - sign * (delta.T if transposed else delta)).to(weight.dtype)

    return Start(A, B, lambda weight: change(weight, 1.0), lambda weight: change(weight, -1.0))


class _Waiting(threading.local):
    """The changes that wait for the end of an injection in this thread; None when none runs."""

    changes: list[tuple[Tensor, Start]] | None = None


_WAITING = _Waiting()


def current(weight: Tensor) -> Tensor:
    """A base weight as it will be after the changes that wait: two layers may share it."""
    value = weight.detach()
    for changed, start in _WAITING.changes or ():
        if changed is weight and start.new_base is not None:
            value = start.new_base(value)
    return value


def note(weight: Tensor, start: Start) -> None:
    """Change ``weight`` at the end of the running injection, or now when none runs."""
    if start.new_base is None:
        return
    if _WAITING.changes is None:
        weight.data = start.new_base(weight.data)
    else:
        _WAITING.changes.append((weight, start))


@contextmanager
def collect() -> Iterator[Callable[[], None]]:
    """Hold back the changes of base weights. They are made by calling what the block is given: all,
    or, when that is interrupted, none (up to one rounding, as no copy of the weights is kept)."""
    before, _WAITING.changes = _WAITING.changes, []
    changes = _WAITING.changes

    def apply() -> None:
        done: list[tuple[Tensor, Start, Tensor | None]] = []
        try:
            for weight, start in changes:
                assert start.new_base is not None
                new = start.new_base(weight.data)
                done.append((weight, start, weight.data if start.undo is None else None))
                weight.data = new
        except BaseException:
            for weight, start, old in reversed(done):
                weight.data = start.undo(weight.data) if start.undo is not None else old
            raise

    try:
        yield apply
    finally:
        _WAITING.changes = before
