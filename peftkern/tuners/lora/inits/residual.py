"""Changing base weights at the end of an injection, when nothing can fail any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


class _Injection(threading.local):
    """The changes of the injection that runs in this thread: those that wait for its end, and those
    that are made, with the old value where there is no way to compute it. None: no injection."""

    waiting: list[tuple[Tensor, Start]] | None = None
    made: list[tuple[Tensor, Start, Tensor | None]] = []


_HERE = _Injection()


def current(weight: Tensor) -> Tensor:
    """A base weight as it will be after the changes that wait: two layers may share it."""
    value = weight.detach()
    for changed, start in _HERE.waiting or ():
        if changed is weight and start.new_base is not None:
            value = start.new_base(value)
    return value


def note(weight: Tensor, start: Start, at_once: bool = False) -> None:
    """Change ``weight`` at the end of the running injection; now when none runs, or ``at_once``."""
    if start.new_base is None:
        return
    if _HERE.waiting is None:
        weight.data = start.new_base(weight.data)
    elif at_once:
        _change(weight, start)
    else:
        _HERE.waiting.append((weight, start))


def _change(weight: Tensor, start: Start) -> None:
    assert start.new_base is not None
    new = start.new_base(weight.data)
    _HERE.made.append((weight, start, weight.data if start.undo is None else None))
    weight.data = new


@contextmanager
def collect() -> Iterator[Callable[[], None]]:
    """Hold back the changes of base weights; they are made by calling what the block is given, or,
    in a block within another one, what the outer one is given.

    When the block ends in an error, the weights are as they were: those that nothing was done to to
    the bit, those that were changed already up to one rounding, as no copy of them is kept.
    """
    outer, made_before = before = _HERE.waiting, _HERE.made
    _HERE.waiting, _HERE.made = [], []

    def apply() -> None:
        if outer is not None:
            outer.extend(_HERE.waiting or ())
            _HERE.waiting = []
        while _HERE.waiting:
            _change(*_HERE.waiting.pop(0))

    try:
        yield apply
    except BaseException:
        for weight, start, old in reversed(_HERE.made):
            weight.data = old if start.undo is None else start.undo(weight.data)  # type: ignore
        raise
    else:
        if outer is not None:  # whose error takes these back as well
            made_before.extend(_HERE.made)
    finally:
        _HERE.waiting, _HERE.made = before
