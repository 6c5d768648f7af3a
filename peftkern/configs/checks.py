"""Checks of single values of configurations: one error that names the field and what was given."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def one_of(enum_cls: type, value: Any, what: str) -> Any:
    """``value`` as a member of the string enum ``enum_cls``; a ValueError names what is allowed."""
    try:
        return enum_cls(value)
    except ValueError:
        allowed = ", ".join(member.value for member in enum_cls)  # type: ignore[attr-defined]
        raise ValueError(
            f"Invalid {what}: {value!r}. Must be one of the following {what}s: {allowed}."
        ) from None


def positive(name: str, value: Any, optional: bool = False) -> None:
    """Raise a ValueError, naming the field, unless ``value`` is an integer above 0."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}")


def fits_type(value: Any, hint: Any) -> bool:
    """True when a value read from JSON has the type of a field's hint."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits_type(value, h) for h in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return value in args
    if origin in (list, set, Sequence) or hint in (list, set):
        return isinstance(value, list) and all(fits_type(v, h) for v in value for h in args[:1])
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(args) and all(map(fits_type, value, args))
        )
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(
            fits_type(v, h) for v in value.values() for h in args[1:]
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return True  # the class of the hint checks its own values
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    return isinstance(value, hint if hint in (str, bool) else (str, dict))


def check_types(cls: type, values: dict[str, Any]) -> None:
    """Raise a ValueError, naming the key, for a value from a file with a wrong type."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        # old files have null for fields that had no default then
        if name in hints and value is not None and not fits_type(value, hints[name]):
            shown = str(hints[name]).replace("typing.", "").replace("NoneType", "None")
            raise ValueError(f"`{name}` must be {shown}, got {value!r}")


class _Checked(threading.local):
    def __init__(self) -> None:
        self.ids: tuple[int, ...] = ()


_checked = _Checked()


@contextmanager
def checked(config: Any) -> Iterator[None]:
    """Check a configuration, before anything is changed or read; inside the block not again.

    Raises:
        NotImplementedError, ValueError: see ``PeftConfig.check_supported``.
    """
    check_once(config)
    before, _checked.ids = _checked.ids, (*_checked.ids, id(config))
    try:
        yield
    finally:
        _checked.ids = before


def check_once(config: Any) -> None:
    """Call ``config.check_supported()``, unless inside a block of :func:`checked` for it."""
    if id(config) not in _checked.ids:
        config.check_supported()
