"""HF PEFT itself beside its stand-in: loaded under another name, when it is first needed.

Two packages cannot both be ``peft``. The sources of HF PEFT are read with ``peft`` in their imports
replaced by :data:`REAL`, so none of its modules is ever found as ``peft`` and it works on its own
classes. Four of them get a ``__class__`` with peftkern's class, so that code that tests
``isinstance(model, peft.PeftModel)`` finds HF PEFT's models of other methods too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

from ..utils.two_libraries import both

REAL = "_hf_peft"
# {module: the class in it whose objects pass for peftkern's}
_ROOTS = {
    "config": "PeftConfigMixin",
    "mixed_model": "PeftMixedModel",
    "peft_model": "PeftModel",
    "tuners.tuners_utils": "BaseTunerLayer",
    "utils.other": "AuxiliaryTrainingWrapper",
}
_MEMBERS = f"from {__name__} import _class as __class__, _reduce as __reduce_ex__"


def real(module: str = "peft") -> Any:
    """HF PEFT's module of this name, or None if it has none."""
    name = REAL + module.removeprefix("peft")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name and (name == missing.name or name.startswith(missing.name + ".")):
            return None
        raise


def is_theirs(value: Any) -> bool:
    """True for a configuration, model or layer of HF PEFT's, or a model with its adapters in it."""
    if REAL not in sys.modules:
        return False
    if type(value).__module__.partition(".")[0] == REAL:
        return True
    configs = getattr(value, "peft_config", None)
    return isinstance(configs, dict) and any(
        type(config).__module__.partition(".")[0] == REAL for config in configs.values()
    )


class RealFinder(MetaPathFinder):
    """Finds :data:`REAL` and its modules in the folders of the installed HF PEFT."""

    def __init__(self, folders: Iterable[str] | None) -> None:
        self.folders = list(folders or ())

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != REAL:
            return None
        if name == REAL:
            # the folders themselves are the package
            for folder in self.folders:
                file = f"{folder}/__init__.py"
                return importlib.util.spec_from_file_location(
                    name, file, loader=_Loader(name, file), submodule_search_locations=[folder]
                )
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)  # its .pyc holds the names unchanged
        return compile(
            renamed(self.get_data(path), path, fullname), path, "exec", dont_inherit=True
        )


def renamed(source: bytes, path: str, name: str) -> ast.Module:
    """The syntax tree of a source of HF PEFT's, with :data:`REAL` in place of ``peft`` in imports.

    ImportError for a plain ``import peft``, which would need the name itself.
    """
    tree = ast.parse(source, path)
    root = _ROOTS.get(name.removeprefix(REAL + "."))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").partition(".")[0] == "peft":
                node.module = REAL + (node.module or "").removeprefix("peft")
        elif isinstance(node, ast.Import):
            if any(alias.name.partition(".")[0] == "peft" for alias in node.names):
                raise ImportError(f"{path}: `import peft` cannot be renamed", name=name)
        elif isinstance(node, ast.ClassDef) and node.name == root:
            node.body += ast.parse(_MEMBERS).body
    return ast.fix_missing_locations(tree)


def _counterpart(cls: type) -> type | None:
    """peftkern's class for objects of HF PEFT's class: that of the same name, or its root's."""
    from .. import configs, mixed_model, model
    from ..tuners import base_layer, modules_to_save

    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != REAL:
            continue
        for owner in (configs, model, mixed_model, base_layer, modules_to_save):
            found = getattr(owner, base.__name__, None)
            if isinstance(found, type):
                return found
    return None


@property  # type: ignore[misc]  # it becomes a member of HF PEFT's classes
def _class(theirs: Any) -> type:
    ours = _counterpart(type(theirs))
    return type(theirs) if ours is None else both(type(theirs), ours, __new__=_make)


@_class.setter
def _class(theirs: Any, cls: type) -> None:
    vars(object)["__class__"].__set__(theirs, cls)


def _make(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``dataclasses.replace`` calls the class of both libraries: the object is HF PEFT's alone."""
    return cls.__bases__[0](*args, **kwargs)


def _new(cls: Any) -> Any:
    return cls.__new__(cls)


def _reduce(theirs: Any, protocol: Any) -> Any:
    return _new, (type(theirs),), theirs.__dict__
