"""Modules named ``peft…`` whose names come from peftkern, and where it has none, from HF PEFT."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution
from types import ModuleType
from typing import Any

from .._version import PEFT_COMPAT_VERSION
from .real import REAL, real

_NONE = object()


class Face(ModuleType):
    """``peft`` or ``peft.A.B``: its names are those of peftkern.A.B, of peftkern, of HF PEFT."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__" and self.__name__ == "peft":
            return PEFT_COMPAT_VERSION
        if name == "__all__":
            return public_names(self.__name__)
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return resolve(self.__name__, name)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *public_names(self.__name__)})


class Finder(MetaPathFinder, Loader):
    """Finds the modules that :class:`Face` stands for.

    Args:
        installed: HF PEFT is installed, so what peftkern lacks is looked for there.
    """

    def __init__(self, installed: bool) -> None:
        self.installed = installed

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "peft":
            return None
        places = ["peftkern" + name.removeprefix("peft")]
        if self.installed:
            places.append(REAL + name.removeprefix("peft"))
        if any(map(_exists, places)):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Face(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass

    def find_distributions(self, context: Any) -> Iterable[Distribution]:
        """The version of ``peft`` for ``importlib.metadata``, where HF PEFT is not installed."""
        if not self.installed and context.name in (None, "peft"):
            return [_Metadata()]
        return []


class _Metadata(Distribution):
    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: peft\nVersion: {PEFT_COMPAT_VERSION}\n"

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


def _exists(name: str) -> bool:
    """True when the module can be found; its parents are imported, it is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _import(name: str) -> Any:
    return importlib.import_module(name) if _exists(name) else None


def resolve(module: str, name: str) -> Any:
    """What ``module`` (``peft…``) has under ``name``; AttributeError if there is nothing."""
    from .handing import handed

    for place in dict.fromkeys(("peftkern" + module.removeprefix("peft"), "peftkern")):
        value = getattr(_import(place), name, _NONE)
        if value is not _NONE and not isinstance(value, ModuleType):
            return handed(name, value)
    if _exists(f"{module}.{name}"):
        return importlib.import_module(f"{module}.{name}")
    theirs = real(module) if _exists(REAL) else None
    value = getattr(theirs, name, _NONE)
    if value is _NONE:
        why = "" if theirs is not None else "; HF PEFT, which may have it, is not installed"
        raise AttributeError(f"{module}: peftkern, which stands in for it, has no {name!r}{why}")
    return value


def public_names(module: str) -> list[str]:
    """What ``from module import *`` takes: the names of both packages."""
    ours = _import("peftkern" + module.removeprefix("peft"))
    theirs = real(module) if _exists(REAL) else None
    found = {name for owner in (ours, theirs) for name in getattr(owner, "__all__", ())}
    return sorted(found - {"__version__"})
