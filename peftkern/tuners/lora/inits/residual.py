"""Changes of base weights, made at the end of an injection, when nothing else can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....ops.bases import repack
from ....ops.bases.formats import is_packed
from ....utils.collectives import from_first_rank
from ....utils.gathering import is_shard
from ....utils.shards import part_like, put_data, whole
from ....utils.zero3 import gathered

HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype to which an adapter's weights are rounded when the base weight has ``dtype``."""
    return dtype if dtype.is_floating_point else torch.float32


class PackedWeight:
    """A quantised base weight [N, K] where changes of base weights are noted, as float32 numbers.

    A change is quantised again by the owner's code. Two objects of one layer are equal.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedWeight) and other.base is self.base

    def __hash__(self) -> int:
        return id(self.base)

    def detach(self) -> Tensor:
        return repack.dense_value(self.base)


def weight_of(base: Any) -> Tensor | PackedWeight:
    """The place of a base layer's weight, for :func:`current` and :func:`note`."""
    if is_packed(base):
        return PackedWeight(base)
    weight: Tensor = base.weight
    return weight


@dataclass
class Start:
    """The first values of an adapter, A [r, K] and B [N, r], and the change of the base weight.

    ``new_base`` is a function from the old weight, as it is stored, to the new one; None when the
    weight does not change. ``undo`` is its inverse up to rounding, None when there is none.
    ``of`` makes the same start from other factors, where they are all that it is made of.
    """

    A: Tensor
    B: Tensor
    new_base: Callable[[Tensor], Tensor] | None = None
    undo: Callable[[Tensor], Tensor] | None = None
    of: Callable[[Tensor, Tensor], Start] | None = None


def minus_product(A: Tensor, B: Tensor, scaling: float, transposed: bool = False) -> Start:
    """A start with A and B and W -> W - scaling · B A, computed in float32 and rounded once."""

    def change(weight: Tensor, sign: float) -> Tensor:
        delta = scaling * B @ A
        wide = weight.to(torch.float32)
        return (wide - sign * (delta.T if transposed else delta)).to(weight.dtype)

    return Start(
        A,
        B,
        lambda weight: change(weight, 1.0),
        lambda weight: change(weight, -1.0),
        lambda A, B: minus_product(A, B, scaling, transposed),
    )


def same_on_ranks(start: Start, weight: Any) -> Start:
    """The first rank's start, on every rank that has a part of ``weight``, a DTensor.

    A decomposition may be another on another device, and some are drawn.
    """
    group = weight.device_mesh.get_group()
    A, B = (from_first_rank(factor, group) for factor in (start.A, start.B))
    if start.new_base is None:
        return Start(A, B)
    if start.of is not None:
        return start.of(A, B)
    value = from_first_rank(start.new_base(whole(weight)), group)
    own = part_like(weight, value)  # the whole is not kept
    return Start(A, B, lambda _: own)


class _Injection(threading.local):
    """The changes of the injection that runs in this thread.

    ``waiting`` are those for its end; None when no injection runs. ``made`` are those that were
    made, with the old weight if it cannot be computed again.
    """

    waiting: list[tuple[Tensor | PackedWeight, Start]] | None = None
    made: list[tuple[Tensor | PackedWeight, Start, Tensor | repack.State | None]] = []


_HERE = _Injection()


def _same(a: Tensor | PackedWeight, b: Tensor | PackedWeight) -> bool:
    return a is b or (isinstance(a, PackedWeight) and a == b)


def current(weight: Tensor | PackedWeight) -> Tensor:
    """The value of a base weight after the waiting changes; two layers may share the weight.

    Of a DTensor, the whole value: all ranks must call.
    """
    value = whole(weight) if isinstance(weight, Tensor) else weight.detach()
    for changed, start in _HERE.waiting or ():
        if _same(changed, weight) and start.new_base is not None:
            value = start.new_base(value)
    return value


def note(weight: Tensor | PackedWeight, start: Start, at_once: bool = False) -> None:
    """Change ``weight`` at the end of the running injection; now if none runs or ``at_once``."""
    if start.new_base is None:
        return
    if _HERE.waiting is None:
        if isinstance(weight, PackedWeight):
            repack.write(weight.base, start.new_base(weight.detach()))
        else:
            _put(weight, start.new_base)
    elif at_once:
        _change(weight, start)
    else:
        _HERE.waiting.append((weight, start))


def _change(weight: Tensor | PackedWeight, start: Start) -> None:
    assert start.new_base is not None
    if isinstance(weight, PackedWeight):
        before, _ = repack.write(weight.base, start.new_base(weight.detach()))
        _HERE.made.append((weight, start, before))
        return
    _HERE.made.append((weight, start, _put(weight, start.new_base, start.undo is None)))


def _put(
    weight: Tensor, new: Callable[[Tensor], Tensor] | Tensor, keeps: bool = False
) -> Tensor | None:
    """Give a weight the value that ``new`` is or makes of the old one, which ``keeps`` returns."""
    with gathered([weight], changes=True):
        old = weight.data
        if is_shard(weight):  # it is written to in place
            old = old.clone() if keeps else old
            put_data(weight, _part_of(weight, new(whole(weight))) if callable(new) else new)
        else:
            put_data(weight, new(old) if callable(new) else new)
    return old if keeps else None


def _part_of(weight: Tensor, value: Tensor) -> Tensor:
    """This rank's part of a whole value of ``weight``; a DTensor is one already."""
    return value if is_shard(value) else part_like(weight, value)


@contextmanager
def collect() -> Iterator[Callable[[], None]]:
    """A context that holds back the changes of base weights; it gives a function that makes them.

    In a block within another one, the outer block's function makes them. When the block ends in an
    error, the weights are as before: a weight that was not changed yet bit for bit, one that was
    changed up to one rounding, as no copy of it is kept.
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
            if isinstance(weight, PackedWeight):
                old.put(weight.base)
                continue
            _put(weight, start.undo or old)
        raise
    else:
        if outer is not None:  # an error in the outer block must undo these too
            made_before.extend(_HERE.made)
    finally:
        _HERE.waiting, _HERE.made = before
