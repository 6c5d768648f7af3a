"""Names of base models and other files in an adapter's files: no absolute path of this machine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

# the settings of a configuration, or of a dict in it, that may be a path
_PATHS = ("base_model_name_or_path", "tokenizer_name_or_path", "cache_file", "covariance_file")
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")

_MOVED: ContextVar[tuple[str, str] | None] = ContextVar("moved", default=None)


@contextlib.contextmanager
def written_to_be_moved(
    here: str | os.PathLike[str], there: str | os.PathLike[str]
) -> Iterator[None]:
    """A context in which files in ``here`` get the names that are right in ``there``.

    What is inside the folder ``here`` will have the same place inside ``there``.
    """
    token = _MOVED.set((os.path.realpath(here), os.path.realpath(there)))
    try:
        yield
    finally:
        _MOVED.reset(token)


def name_for_file(name: str, folder: str | os.PathLike[str]) -> str:
    """The name of a base model as a file in ``folder`` has it.

    A name on the hub and a plain relative path ("models/llama") stay as they are, as in HF PEFT.
    What is given by its absolute path, or by one that begins with a dot, is named as seen from
    ``folder``: "../llama". If nothing but the root is above both, that would be the absolute path
    again: only the last part is left, "./llama". A snapshot in the hub's cache has the hub's name.
    """
    name = _hub_name(name)
    if not is_place(name):
        return name
    place, here = os.path.realpath(name), os.path.realpath(folder)
    moved = _MOVED.get()
    if moved is not None and (here + os.sep).startswith(moved[0] + os.sep):
        here = moved[1] + here[len(moved[0]) :]
    try:
        above = os.path.commonpath([place, here])
    except ValueError:  # other drives
        above = os.sep
    if os.path.dirname(above) == above:
        seen = os.path.basename(place)
    else:
        seen = os.path.relpath(place, here).replace(os.sep, "/")
    return seen if seen.startswith(".") else f"./{seen}"


def name_from_file(name: str, folder: str | os.PathLike[str]) -> str:
    """The name of a base model that a file in ``folder`` has, as seen from the present folder."""
    if os.path.isabs(name) or not is_place(name):
        return name
    place = os.path.normpath(os.path.join(folder, name))
    return place if os.path.exists(place) else name


def public_name(name: str) -> str:
    """The name of a base model for readers: of a place on this machine, the last part."""
    name = _hub_name(name)
    return os.path.basename(os.path.realpath(name)) if is_place(name) else name


def is_place(name: str) -> bool:
    """True for an absolute path and one that begins with a dot, which no name on the hub does."""
    name = _hub_name(name)
    return os.path.isabs(name) or name.startswith(("./", "../")) or name in (".", "..")


def renamed(values: dict[str, Any], change: Callable[[str, Any], str], folder: Any) -> None:
    """Apply ``change(name, folder)`` to the paths in a configuration's values, and in its dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            renamed(value, change, folder)
        elif key in _PATHS and isinstance(value, str):
            values[key] = change(value, folder)


def _hub_name(name: str) -> str:
    found = _SNAPSHOT.search(name)
    return "/".join(found.groups()) if found else name
