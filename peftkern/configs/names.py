"""Checks of configuration values that hold names or numbers: one error that says what was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

# not only list and set, as libraries that read configurations may have types of their own
_COLLECTIONS = (Sequence, Set)


def shown(value: Any) -> str:
    """A value with its type, as text, since "8" and 8 look alike in a message."""
    return f"{value!r} ({type(value).__name__})"


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_names(field: str, value: Any, one: str | None = None) -> None:
    """Raise a ValueError unless ``value`` is a list (tuple, set) of names, or None.

    Args:
        field: the field's name in the configuration.
        value: the given value.
        one: the meaning of a single string, for the message; None: a string is not allowed.
    """
    if value is None or (one is not None and isinstance(value, str)):
        return
    # in a dict the keys are the names, as in HF PEFT
    many = isinstance(value, (*_COLLECTIONS, Mapping)) and not isinstance(value, (str, bytes))
    if many and all(isinstance(name, str) and name for name in value):
        return
    allowed = "a list of names" + (f", or a str: {one}" if one is not None else "")
    raise ValueError(f"`{field}` must be {allowed}, got {_items(value)}")


def check_ints(field: str, value: Any, one: bool = False) -> None:
    """Raise a ValueError unless ``value`` is a list (tuple, set, range) of integers, or None.

    With ``one`` a single integer is allowed too.
    """
    if value is None or (one and is_int(value)):
        return
    if isinstance(value, _COLLECTIONS) and all(
        isinstance(n, Integral) and not isinstance(n, bool) for n in value
    ):
        return
    allowed = "an integer or a list of integers" if one else "a list of integers"
    raise ValueError(f"`{field}` must be {allowed}, got {_items(value)}")


def check_pattern(field: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is a dict with names or regular expressions as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(
            f"`{field}` must be a dict of names or regular expressions to numbers, got "
            f"{_items(value)}"
        )


def _items(value: Any) -> str:
    """``value`` as text; for a collection with the types of its elements."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        return shown(value)
    kinds = sorted({type(item).__name__ for item in value})
    return f"{value!r} (a {type(value).__name__} of {', '.join(kinds) or 'nothing'})"


def as_names(field: str, value: Any) -> Any:
    """``modules_to_save`` as a list; a str is one name (iterating over it would give letters).

    Raises:
        ValueError: ``value`` holds anything but names.
    """
    check_names(field, value, one="one name")
    if value is None:
        return None
    return [value] if isinstance(value, str) else list(value)
