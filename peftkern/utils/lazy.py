"""``lazily``: imports names and files of a package when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, where: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """(``__all__``, ``__getattr__``) of a package whose names come from its files.

    The files are found too: after ``import peftkern``, ``peftkern.tuners.lora`` exists, as in HF
    PEFT, which imports all its files at once.

    Args:
        package: the package's name.
        where: {file, relative to the package: the names from it, separated by spaces}.
    """
    files = {name: file for file, names in where.items() for name in names.split()}

    def find(name: str) -> Any:
        """The object or file of this name in the package; AttributeError if there is none."""
        if name in files:
            value = getattr(importlib.import_module(files[name], package), name)
            setattr(sys.modules[package], name, value)
            return value
        try:
            if name.isidentifier() and not name.startswith("__"):
                return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{package}.{name}":
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return list(files), find
