"""The kind of a call: what decides how it runs, apart from the contents of its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Unplanned(Exception):
    """Such a call is not planned; the message is the reason."""


# and the classes of configs; in a key a class stands before its value, as 1 equals True
_CONSTANTS = {int, bool, str, float, torch.dtype, torch.device}
_SEQUENCES: set[type] = {list, tuple}  # and the classes of NamedTuples


def halves(seed: int) -> tuple[int, int]:
    """The low and the high 32 bits of a whole number of 64, each as an int32, so that every seed
    has one signature."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


class Call(NamedTuple):
    """The key of a call's kind, and what is not in it: its tensors, addresses and numbers.

    All are lists, to be filled by :func:`read`.
    """

    key: list[Any]
    tensors: list[Tensor]
    pointers: list[int]
    numbers: list[float]


def read(
    values: Iterable[Any],
    changing: Iterable[type | None],
    key: list[Any],
    tensors: list[Tensor],
    pointers: list[int],
    numbers: list[float],
) -> None:
    """Add arguments to the parts of a :class:`Call`.

    ``changing`` has the class of the numbers in each argument that only kernels are told: float,
    int for a seed, or None.

    Raises:
        Unplanned: a value is of a class that may change, or decide in unknown ways.
    """
    # This runs in every launch, and each statement for each of its tensors.
    for value, changes in zip(values, changing):  # noqa: B905  # checking costs time
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            tensors.append(value)
            pointers.append(pointer := value.data_ptr())
            key += value.shape, value.stride(), value.dtype, value.device, pointer & 15
        elif value is None:
            key.append(None)
        elif kind in _SEQUENCES:
            key.append(len(value) if kind is list or kind is tuple else kind)
            for one in value:
                kind = type(one)
                if kind is Tensor or kind is Parameter:
                    tensors.append(one)
                    pointers.append(pointer := one.data_ptr())
                    key += one.shape, one.stride(), one.dtype, one.device, pointer & 15
                elif one is None:
                    key.append(None)
                elif kind is changes:
                    numbers += (one,) if kind is float else halves(one)
                    key.append(kind)
                elif kind in _CONSTANTS:
                    key += (kind, one)
                else:
                    read((one,), (changes,), key, tensors, pointers, numbers)
        elif kind is changes:
            numbers += (value,) if kind is float else halves(value)
            key.append(kind)
        elif kind in _CONSTANTS or _frozen(kind):
            key += (kind, value)
        elif issubclass(kind, tuple):  # a NamedTuple
            _SEQUENCES.add(kind)
            read((value,), (changes,), key, tensors, pointers, numbers)
        else:
            raise Unplanned(f"an argument is a {kind.__name__}")


def kind_of(key: list[Any], pointers: list[int]) -> tuple[Any, ...]:
    """The key, when all is read; a tensor in two places is of another kind than two tensors."""
    if len(set(pointers)) != len(pointers):
        key.append(tuple(map(pointers.index, pointers)))
    return tuple(key)


def _frozen(kind: type) -> bool:
    """True for the class of a config, whose objects are constants."""
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not (params.frozen and params.eq):
        return False
    _CONSTANTS.add(kind)
    return True
