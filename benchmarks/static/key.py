"""A short hash of everything that the compiled code of a launch depends on.

It covers the kernel's statements with those of every function and constant it names, the launch as
Triton specialises it (types, divisibility, constexprs, warps, stages), the architecture, the
versions of Triton and its assembler, and the code that reads the result. It does not cover
comments, docstrings, layout, the position in a file, sizes that Triton does not specialise on, or
the names of cases. So an edit makes only those results stale that it can change.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from peftkern.kernels.common import Launch

from . import accesses, compiling
from .compiling import NoDevice, gpu_target


def statements(tree: ast.AST) -> str:
    """``tree`` as text that is the same for every Python.

    Docstrings are left out, and empty fields, of which newer versions have more.
    """

    def show(node: Any) -> str:
        if isinstance(node, list):
            return f"[{' '.join(map(show, node))}]"
        if isinstance(node, ast.Constant):
            return repr(node.value)
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = dict(ast.iter_fields(node))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(
            node, clean=False
        ):
            fields["body"] = fields["body"][1:]
        kept = [f"{k}={show(v)}" for k, v in fields.items() if v is not None and v != []]
        return f"{type(node).__name__}({' '.join(kept)})"

    return show(tree)


def _is_triton(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (name or "").split(".")[0] == "triton"


def _named(tree: ast.AST, scope: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of everything outside ``tree`` that it reads.

    That is globals, closures, and attributes of modules other than Triton's, whose version is part
    of the key.
    """
    local = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    local |= {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }

    def find(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id not in local:
            return scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = find(node.value)
            if isinstance(owner, ModuleType) and not _is_triton(owner):
                return getattr(owner, node.attr, None)
        return None

    found = {
        ast.unparse(n): find(n) for n in ast.walk(tree) if isinstance(n, (ast.Name, ast.Attribute))
    }
    return {k: v for k, v in found.items() if v is not None and not isinstance(v, ModuleType)}


def source_text(kernel: Any) -> str:
    """The statements and constants of this project that the kernel's code is made from."""
    parts: dict[Any, str] = {}

    def add(function: Any) -> None:
        if function in parts:
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parts[function] = statements(tree)
        scope: dict[str, Any] = {}
        if inspect.isfunction(function):
            scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
        for name, value in sorted(_named(tree, scope).items()):
            code = getattr(value, "fn", value)  # a decorated function holds the plain one
            if inspect.isfunction(code) or inspect.isclass(code):
                if not _is_triton(code):
                    add(code)
            elif isinstance(value, triton.language.constexpr) or not _is_triton(value):
                parts[f"{function.__module__}.{name}"] = f"{name}={value!r}"

    add(kernel.fn)
    return "\n".join(parts.values())


_sources: dict[Any, str] = {}  # by plain function, as Triton gives decorated kernels its own hash


def _source_hash(kernel: Any) -> str:
    if kernel.fn not in _sources:
        _sources[kernel.fn] = hashlib.sha256(source_text(kernel).encode()).hexdigest()
    return _sources[kernel.fn]


@functools.cache
def _reader_hash() -> str:
    files = (Path(module.__file__ or "") for module in (accesses, compiling))
    texts = [statements(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@functools.cache
def _compiler(name: str) -> str:
    return f"{triton.__version__} {make_backend(gpu_target(name)).hash()}"


def specialization(launch: Launch, name: str) -> str:
    """The key of the launch in Triton's own cache, from a hook that then stops the compiler."""
    told: list[str] = []

    def stop(*, key: Any, **_: Any) -> bool:
        told.append(str(key))
        return True

    driver.set_active(NoDevice(gpu_target(name), label="key "))
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = stop
    try:
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    (key,) = told
    return key


def key_of(launch: Launch, name: str) -> str:
    """The key, 16 hexadecimal digits, of ``launch`` compiled for architecture ``name``."""
    covered = [
        _source_hash(launch.kernel),
        specialization(launch, name),
        name,
        _compiler(name),
        str(sorted(get_cache_invalidating_env_vars().items())),
        _reader_hash(),
    ]
    return hashlib.sha256("\n".join(covered).encode()).hexdigest()[:16]
