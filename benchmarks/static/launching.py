"""Builds the launcher of a compiled kernel without a GPU.

A launcher is code that Triton makes for a kernel's signature, to start the kernel on a device: C
for every signature in 3.6, one routine that reads the signature in later versions. Neither a
compilation nor the interpreter notices when it cannot be made: the first launch on a machine with a
GPU would fail. Here it is made from the launch's arguments, and gcc compiles it if it is C.
"""

from __future__ import annotations

import functools
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.nvidia import driver as cuda
from triton.runtime import driver

from peftkern.kernels.common import Launch

from .compiling import NoDevice, gpu_target


class _Seen(Exception):
    """Ends a compilation as soon as its input is known."""


class _Device(NoDevice):
    """Stands in for Triton's driver, with the routine of newer launchers."""

    utils = SimpleNamespace(
        launch=None, build_signature_metadata=lambda kinds: [cuda.ty_to_cpp(kind) for kind in kinds]
    )


def _source(launch: Launch, name: str) -> Any:
    """The input of Triton's compiler for the launch: signature, constants, and kernel."""
    driver.set_active(_Device(gpu_target(name), label=f"launcher {id(launch)} "))
    found: list[Any] = []

    def stop(src: Any, *_: Any, **__: Any) -> None:
        found.append(src)
        raise _Seen

    launch.kernel.create_binder()  # done later, it would replace the patch by Triton's compiler
    with (
        mock.patch.object(triton.runtime.jit, "compile", stop),
        mock.patch.object(triton.compiler, "compile", stop),
        mock.patch.object(launch.kernel, "compile", stop, create=True),
    ):
        try:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
        except _Seen:
            return found[0]
    raise RuntimeError("Triton compiled nothing")


@functools.cache
def _compiles(text: str) -> str | None:
    """The first line of gcc's error for a launcher's text; None when it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launcher.c"
        path.write_text(text, encoding="utf-8")
        include = [*cuda.include_dirs, sysconfig.get_paths()["include"]]
        command = ["gcc", "-fsyntax-only", "-w", *(f"-I{d}" for d in include), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr.strip().splitlines()[0] if done.returncode else None


def launcher_problem(launch: Launch, name: str, c: bool = True) -> str | None:
    """The reason that no launcher can be built for ``launch``, in one line; None when one can.

    The architecture ``name`` is such as "sm_90"; AMD's launchers are not tested. Without ``c`` gcc,
    which takes most of the time, is not run.
    """
    if gpu_target(name).backend != "cuda":
        return None

    def compiled(src: str, **_: Any) -> Any:
        error = _compiles(src) if c else None
        if error is not None:
            raise RuntimeError(error)
        return SimpleNamespace(launch=None)

    source = _source(launch, name)
    described = sum(str(kind).count("tensordesc") for kind in source.signature.values())
    # bulk copies if the architecture has them: the condition that the compiler uses too
    how = [{}] * described if gpu_target(name).arch >= 90 and described else None
    metadata = SimpleNamespace(
        tensordesc_meta=how, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False,
        global_scratch_size=0, global_scratch_align=1,
        profile_scratch_size=0, profile_scratch_align=1,
    )  # fmt: skip
    try:
        with (
            mock.patch.object(cuda, "library_dirs", lambda: []),
            mock.patch.multiple(
                cuda, create=True, compile_module_from_src=compiled,
                PyKernelArg=dict, ARG_CONSTEXPR=0, ARG_KERNEL=1, ARG_TUPLE=2,
            ),
        ):  # fmt: skip
            cuda.CudaLauncher(source, metadata)
    except Exception as error:  # whatever fails here would fail in a launch
        lines = str(error).strip().splitlines()
        return f"no launcher: {type(error).__name__}: {lines[0] if lines else ''}"[:200]
    return None
