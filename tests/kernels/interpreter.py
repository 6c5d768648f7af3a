"""Makes Triton's CPU interpreter faster, by leaving out work that it repeats needlessly.

That is more than half of the time of a kernel's test. Kernels compute the same results, and an
integer that overflows is an error; test_interpreter.py shows both. The names are private ones of
Triton: with a version that lacks one of them the import fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _patch_once(launch: Any, patch: Any) -> tuple[Any, Any]:
    """Replacements that patch the language once a launch for each set of modules to patch.

    Triton patches it member by member in every call of a function of its library.
    """
    modules: dict[int, frozenset[int]] = {}  # by the globals of a function
    done: list[set[frozenset[int]]] = []  # of the launches that are running

    def patch_once(fn: Callable[..., Any]) -> Any:
        at = fn.__globals__
        if id(at) not in modules:
            modules[id(at)] = frozenset(
                id(value) for value in at.values() if value is interpreter.tl or value is core
            )
        if done and modules[id(at)] in done[-1]:
            return None
        scope = patch(fn)
        if done:
            done[-1].add(modules[id(at)])
        return scope

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.pop()

    return launch_and_forget, patch_once


def _type_when_asked() -> tuple[Any, Any]:
    """Replacements that make the type of a tuple only when it is read.

    Each tensor has tuples of its shape. Their types have names with all members, and are rarely
    used.
    """
    whole = core.tuple.__init__

    def start(self: Any, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            whole(self, args, type)

    def get(self: Any) -> Any:
        if "type" not in self.__dict__:
            self.__dict__["type"] = core._type_for_tuple_values(self.values)
        return self.__dict__["type"]

    return start, property(get, lambda self, type: self.__dict__.update(type=type))


def _dtype_by_name(whole: Any) -> Any:
    """A cache of ``whole``, which makes the table of numpy's dtypes for every lookup."""
    found: dict[str, Any] = {}

    def dtype(type: Any) -> Any:
        if type.name not in found:
            found[type.name] = whole(type)
        return found[type.name]

    return dtype


def _check_with_numpy(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Raise OverflowError when the result of an integer operation overflows.

    The interpreter's own check takes six operations, and is ignored outside of a debugging mode.
    """
    kind, wide = lhs.type.scalar, _WIDE[operation.__name__]
    if 1 < kind.int_bitwidth < 64:
        result = wide(*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        if result.size and (result.min() < low or result.max() > high):
            raise OverflowError(
                f"{operation.__name__} gives {result.min()} to {result.max()} in {kind}"
            )


def _with_a_mask_of_bools(whole: Any, place: int) -> Any:
    """``whole``, a masked load or store whose argument at ``place`` is the mask.

    Kernels that Triton compiles have masks of one bit. In the interpreter an integer argument is
    Python's, so that ``mask & (count > 0)`` has 32 bits, which Triton 3.9 refuses.
    """

    def masked(self: Any, *args: Any, **how: Any) -> Any:
        mask = args[place]
        # of a load through a descriptor it may be a bare array, of bools
        if isinstance(mask, interpreter.TensorHandle) and mask.data.dtype != bool:
            bits = interpreter.TensorHandle(mask.data.astype(bool), core.int1)
            args = (*args[:place], bits, *args[place + 1 :])
        return whole(self, *args, **how)

    return masked


_ABSENT = object()


def _changes() -> list[tuple[Any, str, Any]]:
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    executor, check = interpreter.GridExecutor, "binary_op_sanitize_overflow_impl"
    launch, patch = _patch_once(executor.__call__, interpreter._patch_lang)
    start, kind = _type_when_asked()
    return [
        (executor, "__call__", launch),
        (interpreter, "_patch_lang", patch),
        (core.tuple, "__init__", start),
        (core.tuple, "type", kind),
        (interpreter, "_get_np_dtype", _dtype_by_name(interpreter._get_np_dtype)),
        (TritonSemantic, check, _check_with_numpy),
        (builder, "create_masked_load", _with_a_mask_of_bools(load, 1)),
        (builder, "create_masked_store", _with_a_mask_of_bools(store, 2)),
    ]


CHANGES = _changes()
PLAIN = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in CHANGES]


def install(changes: list[tuple[Any, str, Any]] = CHANGES) -> None:
    for owner, name, value in changes:
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Use the interpreter as Triton ships it within the block."""
    install(PLAIN)
    try:
        yield
    finally:
        install()
