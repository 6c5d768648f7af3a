"""The record of what a call does, and the Python code that does it (see :mod:`.launching`).

The code is generated, as Triton's own binders are: it places a few dozen arguments, most of them
constants, and a loop over the record would cost as much as what a plan saves. For the shrink of
two adapters with one buffer it is

    def run(stream, t, p, n):
        p0, p1, p2 = p
        a0 = empty(c0, c1, dtype=c2, device=c3)
        q0 = a0.data_ptr()
        enter, leave = hooks()
        args = (p0, (p1, p2), c4, q0, c5, (n[0], n[1]), ...)
        told = None if enter is None else c9.launch_metadata(c10, stream, *args)
        c6(64, 1, 1, stream, c7, c8, told, enter, leave, *args)
        return a0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Filled(NamedTuple):
    """A list of arguments and where those that change come from; the others are constants.

    Each entry starts with the place in ``constants``. Tensors are numbered: those of the call, then
    those that the plan allocates; numbers of the call have an order of their own.
    """

    constants: list[Any]
    pointers: list[tuple[int, int, int]]  # (place, tensor, bytes from its start)
    numbers: list[tuple[int, int]]  # (place, number)
    tuples: list[tuple[int, Filled]]
    descriptors: list[tuple[int, int, type, dict[str, Any]]]  # (place, tensor, class, other fields)
    kept: list[tuple[int, Callable[[], Tensor]]]  # (place, what finds a tensor kept for good)


class Start(NamedTuple):
    """One launch of a plan."""

    compiled: Any  # Triton's CompiledKernel, loaded
    grid: tuple[int, ...]
    args: Filled


class Allocation(NamedTuple):
    """A tensor that a plan allocates."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class View(NamedTuple):
    """A result that is a part of a tensor, in elements of its storage."""

    tensor: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Named(NamedTuple):
    """Results in a NamedTuple."""

    kind: type
    results: list[Any]


# (stream, tensors, addresses, numbers of the call) -> its result
Run = Callable[[Any, list[Tensor], list[int], list[float]], Any]


_runtime = triton.knobs.runtime


def hooks() -> tuple[Any, Any]:
    """Triton's hooks before and after a launch; None for a chain of hooks that is empty."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return (
        enter if getattr(enter, "calls", True) else None,
        leave if getattr(leave, "calls", True) else None,
    )


def describe(kind: type, others: dict[str, Any], base: Tensor) -> Any:
    """A tensor descriptor whose fields have been checked before, on another tensor."""
    made: Any = object.__new__(kind)
    made.__dict__.update(others)
    made.__dict__["base"] = base
    return made


class _Writer:
    """Writes the code of one plan; ``scope`` has its constants by name."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.scope: dict[str, Any] = {
            # on the host torch.empty takes half as long again, which finds the strides itself
            "empty": torch.empty_strided, "hooks": hooks, "describe": describe,
        }  # fmt: skip

    def constant(self, value: Any) -> str:
        """A name for the value, or the value itself where it can be written."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"c{len(self.scope)}"
        self.scope[name] = value
        return name

    def tensor(self, number: int) -> str:
        return f"t[{number}]" if number < self.inputs else f"a{number - self.inputs}"

    def pointer(self, number: int, offset: int) -> str:
        name = f"p{number}" if number < self.inputs else f"q{number - self.inputs}"
        return f"{name} + {offset}" if offset else name

    def arguments(self, filled: Filled) -> str:
        parts: list[str | None] = [None] * len(filled.constants)
        for place, tensor, offset in filled.pointers:
            parts[place] = self.pointer(tensor, offset)
        for place, number in filled.numbers:
            parts[place] = f"n[{number}]"
        for place, inner in filled.tuples:
            parts[place] = self.arguments(inner)
        for place, tensor, kind, others in filled.descriptors:
            fields = f"{self.constant(kind)}, {self.constant(others)}"
            parts[place] = f"describe({fields}, {self.tensor(tensor)})"
        for place, find in filled.kept:
            parts[place] = f"{self.constant(find)}().data_ptr()"
        written = [
            self.constant(value) if part is None else part
            for part, value in zip(parts, filled.constants, strict=True)
        ]
        return f"({', '.join(written)},)" if written else "()"

    def allocation(self, made: Allocation) -> str:
        place = f"{self.constant(made.shape)}, {self.constant(made.stride)}"
        how = f"dtype={self.constant(made.dtype)}, device={self.constant(made.device)}"
        return f"empty({place}, {how})"

    def result(self, result: Any) -> str:
        if type(result) is int:
            return self.tensor(result)
        if type(result) is View:
            parts = ", ".join(map(self.constant, result[1:]))
            return f"{self.tensor(result.tensor)}.as_strided({parts})"
        if result is None:
            return "None"
        if type(result) is Named:
            return f"{self.constant(result.kind)}(*{self.result(result.results)})"
        inner = ", ".join(map(self.result, result))
        return f"[{inner}]" if type(result) is list else f"({inner},)" if inner else "()"


def write(inputs: int, allocations: list[Allocation], starts: list[Start], result: Any) -> Run:
    """The function that does a call with ``inputs`` tensors.

    ``result`` is the number of a tensor, a View, None, or a list, tuple or Named of these.
    """
    writer = _Writer(inputs)
    lines = ["".join(f"p{i}, " for i in range(inputs)) + "= p" if inputs else ""]
    for i, allocation in enumerate(allocations):
        lines += [f"a{i} = {writer.allocation(allocation)}", f"q{i} = a{i}.data_ptr()"]
    if starts:
        lines.append("enter, leave = hooks()")
    for start in starts:
        kernel, grid = writer.constant(start.compiled), writer.constant(start.grid)
        x, y, z = (*start.grid, 1, 1)[:3]
        of = start.compiled
        run, function, metadata = map(writer.constant, (of.run, of.function, of.packed_metadata))
        lines += [
            f"args = {writer.arguments(start.args)}",
            f"told = None if enter is None else {kernel}.launch_metadata({grid}, stream, *args)",
            f"{run}({x}, {y}, {z}, stream, {function}, {metadata}, told, enter, leave, *args)",
        ]
    lines.append(f"return {writer.result(result)}")
    body = "\n".join(f"    {line}" for line in lines if line)
    exec(compile(f"def run(stream, t, p, n):\n{body}", "<plan>", "exec"), writer.scope)
    written: Run = writer.scope["run"]
    return written
