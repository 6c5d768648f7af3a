"""The kind of a call: what decides how it runs, apart from the contents of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Unplanned(Exception):
    """Such a call is not planned; the message is the reason."""


TENSORS = frozenset({Tensor, Parameter})
# and the classes of configs; in a key a class stands before its value, as 1 equals True
_CONSTANTS = {int, bool, str, float, torch.dtype, torch.device}


class Call:
    """The key of a call's kind, and what is not in it: its tensors, addresses and numbers."""

    __slots__ = ("key", "numbers", "pointers", "tensors")

    def __init__(self, key: list[Any]) -> None:
        self.key = key
        self.tensors: list[Tensor] = []
        self.pointers: list[int] = []
        self.numbers: list[float] = []

    def read(self, values: Iterable[Any], changing: bool) -> None:
        """Add arguments; ``changing`` floats are numbers that only the kernels are told.

        Raises:
            Unplanned: a value is of a class that may change, or decide in unknown ways.
        """
        for value in values:
            kind = type(value)
            if kind in TENSORS:
                self.add(value)
            elif value is None:
                self.key.append(None)
            elif kind is float and changing:
                self.numbers.append(value)
                self.key.append(float)
            elif kind is list or kind is tuple:
                self.key.append(len(value))
                self.read(value, changing)
            elif kind in _CONSTANTS or _frozen(kind):
                self.key += (kind, value)
            else:
                raise Unplanned(f"an argument is a {kind.__name__}")

    def add(self, t: Tensor) -> None:
        pointer = t.data_ptr()
        self.tensors.append(t)
        self.pointers.append(pointer)
        self.key += (t.shape, t.stride(), t.dtype, t.device, pointer & 15)


def _frozen(kind: type) -> bool:
    """True for the class of a config, whose objects are constants."""
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not (params.frozen and params.eq):
        return False
    _CONSTANTS.add(kind)
    return True
