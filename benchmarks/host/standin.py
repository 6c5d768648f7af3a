"""A device that does nothing: launches of kernels can be timed and looked at without a GPU.

Within :func:`device` Triton dispatches launches as for an H100, but nothing is compiled or started.
A compiled kernel is a :class:`Kernel`, which is told of a launch as Triton's own is. Tensors are on
the CPU, where torch's operations really run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

STREAM = 7
_devices = itertools.count()  # each has no compiled kernels yet


class Started(NamedTuple):
    """One launch, as a compiled kernel is told of it."""

    kernel: Kernel
    grid: tuple[int, int, int]
    stream: int
    function: Any
    metadata: Any
    hooks: tuple[Any, Any, Any]  # what they are told, the one before, the one after
    args: tuple[Any, ...]


class Kernel:
    """Stands in for Triton's CompiledKernel; ``listen`` is called with each launch."""

    listen: Callable[[Started], Any] | None = None

    def __init__(self, source: Any, options: Any) -> None:
        self.src, self.options = source, options
        self.name = source.fn.__name__
        self.function, self.packed_metadata = object(), (options["num_warps"], 1, 0)

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> Any:
        if triton.knobs.runtime.launch_enter_hook is None:
            return None
        return {"name": self.name, "grid": grid, "stream": stream}

    def run(
        self, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, told: Any,
        enter: Any, leave: Any, *args: Any,
    ) -> None:  # fmt: skip
        if Kernel.listen is not None:
            hooks = told, enter, leave
            Kernel.listen(Started(self, (x, y, z), stream, function, metadata, hooks, args))


class _Driver:
    def __init__(self) -> None:
        self.device = next(_devices)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return f"standin {self.device}"

    def get_current_stream(self, device: Any = None) -> int:
        return STREAM


def _compile(source: Any, target: Any = None, options: Any = None, **_: Any) -> Kernel:
    return Kernel(source, options)


@contextlib.contextmanager
def device() -> Iterator[list[Started]]:
    """Launches start nothing within the block; gives the list of them (:func:`listening`)."""
    from peftkern.kernels import checks, launching
    from peftkern.ops import triton_backend

    on = SimpleNamespace(value=True)  # the kernels' functions take tensors on the CPU
    before = driver._active
    launching.forget()
    driver.set_active(_Driver())
    try:
        with (
            mock.patch.object(triton.compiler, "compile", _compile),
            mock.patch.object(checks, "INTERPRET", on),
            mock.patch.object(triton_backend, "INTERPRET", on),
        ):
            yield []
    finally:
        driver.set_active(before)
        launching.forget()


@contextlib.contextmanager
def listening() -> Iterator[list[Started]]:
    """The launches that are started within the block."""
    heard: list[Started] = []
    before, Kernel.listen = Kernel.listen, heard.append
    try:
        yield heard
    finally:
        Kernel.listen = before
