"""The kind of a call: what decides how it runs, apart from the contents of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Unplanned(Exception):
    """Such a call is not planned; the message is the reason."""


TENSORS = frozenset({Tensor, Parameter})
# and the classes of configs; in a key a class stands before its value, as 1 equals True
_CONSTANTS = {int, bool, str, float, torch.dtype, torch.device}


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a whole number of 64, each as an int32, so that every seed
    has one signature."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


class Call:
    """The key of a call's kind, and what is not in it: its tensors, addresses and numbers."""

    __slots__ = ("key", "numbers", "pointers", "tensors")

    def __init__(self, key: list[Any]) -> None:
        self.key = key
        self.tensors: list[Tensor] = []
        self.pointers: list[int] = []
        self.numbers: list[float] = []

    def read(self, values: Iterable[Any], changing: Iterable[type | None]) -> None:
        """Add arguments, each with the class of the numbers in it that only kernels are told.

        That is float, int for a seed, or None.

        Raises:
            Unplanned: a value is of a class that may change, or decide in unknown ways.
        """
        key, tensors, pointers = self.key, self.tensors, self.pointers
        for value, changes in zip(values, changing):  # noqa: B905  # checking costs time
            kind = type(value)
            if kind in TENSORS:
                tensors.append(value)
                pointers.append(pointer := value.data_ptr())
                key += value.shape, value.stride(), value.dtype, value.device, pointer & 15
            elif value is None:
                key.append(None)
            elif kind is float and changes is float:
                self.numbers.append(value)
                key.append(float)
            elif kind is int and changes is int:
                self.numbers += halves(value)
                key.append(int)
            elif kind is list or kind is tuple:
                key.append(len(value))
                self.read(value, repeat(changes))
            elif kind in _CONSTANTS or _frozen(kind):
                key += (kind, value)
            elif issubclass(kind, tuple):  # a NamedTuple
                key.append(kind)
                self.read(value, repeat(changes))
            else:
                raise Unplanned(f"an argument is a {kind.__name__}")

    def kind(self) -> tuple[Any, ...]:
        """The key, when all is read; a tensor in two places is of another kind than two tensors."""
        pointers = self.pointers
        if len(set(pointers)) != len(pointers):
            self.key.append(tuple(map(pointers.index, pointers)))
        return tuple(self.key)


def _frozen(kind: type) -> bool:
    """True for the class of a config, whose objects are constants."""
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not (params.frozen and params.eq):
        return False
    _CONSTANTS.add(kind)
    return True
