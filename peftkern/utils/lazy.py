"""Names and files of a package that are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, where: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """(``__all__``, ``__getattr__``) of a package whose names come from its files, and those files
    themselves: after ``import peftkern``, ``peftkern.tuners.lora`` is there as it is in HF PEFT,
    which imports all of its own at once.

    Args:
        package: its name.
        where: {file, relative to the package: the names from it, with spaces between}.
    """
    files = {name: file for file, names in where.items() for name in names.split()}

    def find(name: str) -> Any:
        """The name; AttributeError when the package has neither such a name nor such a file."""
        if name in files:
            value = getattr(importlib.import_module(files[name], package), name)
            setattr(sys.modules[package], name, value)
            return value
        try:
            if not name.startswith("__"):
                return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as missing:
            if missing.name != f"{package}.{name}":
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return list(files), find
