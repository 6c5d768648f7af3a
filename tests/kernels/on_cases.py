"""Checks of a plan's code for each launch that ships, in a process that compiles kernels."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.host import standin
from peftkern.kernels import plans, recording
from peftkern.kernels.common import Launch
from tests.kernels.planning import tensors_in, told


def on_the_cpu(launch: Launch) -> Launch:
    """The launch with its meta tensors on the CPU, in memory that nobody touches."""
    made: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype
                )
            return made[id(value)]
        if isinstance(value, TensorDescriptor):
            return TensorDescriptor(real(value.base), value.shape, value.strides, value.block_shape)
        return tuple(map(real, value)) if type(value) is tuple else value

    return launch._replace(args=real(launch.args))


def direct(
    launch: Launch, prepare: Callable[[Any], None] | None = None
) -> tuple[list[Tensor], Callable[[], Any]]:
    """(the launch's tensors, the code that a plan has for it); ``prepare`` gets its kernel."""
    bases = tuple(v.base if isinstance(v, TensorDescriptor) else v for v in launch.args)
    tensors = list({id(t): t for t in tensors_in(bases)}.values())
    number = {id(t): i for i, t in enumerate(tensors)}
    numbers = sorted({v for v in flat(launch.args) if type(v) is float})
    origins = recording.Origins(
        lambda t: (number[id(t)], 0), {(float, v): i for i, v in enumerate(numbers)}
    )
    compiled = launch.kernel[launch.grid](*launch.args, **launch.meta)
    if prepare is not None:
        prepare(compiled)
    filled = origins.filled(recording.arguments(launch))
    run = plans.write(len(tensors), [], [plans.Start(compiled, launch.grid, filled)], None)
    return tensors, lambda: run(standin.STREAM, tensors, [t.data_ptr() for t in tensors], numbers)


def check_every_case_that_ships() -> None:
    """The code that a plan has for a launch tells a kernel what Triton tells it."""
    from benchmarks.static.run import TARGETS, all_cases

    count = 0
    for name in TARGETS:
        if not name.startswith("sm_"):
            continue
        for case in all_cases(name, Path("kernels/tuning")):
            launch = on_the_cpu(case.launch)
            tensors, run = direct(launch)
            with standin.listening() as heard:
                launch.run()
            with standin.listening() as ours:
                run()
            assert len(ours) == len(heard) == 1
            wanted = told(tensors, None, heard)
            assert told(tensors, None, ours) == wanted, (name, case.name)
            count += 1
    assert count > 500


def check_what_tritons_launcher_makes_of_it() -> None:
    """Beneath its Python, where descriptors are made, Triton's launcher gets the same again."""
    from triton.backends.nvidia import driver as cuda

    from benchmarks.static.run import all_cases

    got: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.data_ptr()
        if type(value).__name__ == "HookChain" or (isinstance(value, dict) and "stream" in value):
            return None  # an empty chain of hooks, and what they would be told
        return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value

    def record(*args: Any) -> None:
        got.append(plain(args))

    def described(*args: Any) -> Any:
        return "map", plain(args)

    utils = types.SimpleNamespace(
        launch=record, build_signature_metadata=list,
        fill_tma_descriptor=described, fill_tma_descriptor_tiled=described,
    )  # fmt: skip
    kinds = dict(PyKernelArg=dict, ARG_CONSTEXPR=0, ARG_KERNEL=1, ARG_TUPLE=2)
    tile = dict(swizzle=3, elem_size=2, elem_type=9, block_size=[64, 64], fp4_padded=False)
    count = 0
    with (
        mock.patch.object(triton.runtime.driver.active, "utils", utils, create=True),
        mock.patch.multiple(
            cuda, create=True, library_dirs=lambda: [],
            compile_module_from_src=lambda **_: types.SimpleNamespace(launch=record), **kinds,
        ),
    ):  # fmt: skip
        for case in all_cases("sm_90", Path("kernels/tuning")):
            launch = on_the_cpu(case.launch)
            many = 0

            def real(compiled: Any) -> None:
                nonlocal many
                many = sum("tensordesc" in str(k) for k in compiled.src.signature.values())
                metadata = types.SimpleNamespace(
                    tensordesc_meta=[tile] * many or None, num_ctas=1, launch_pdl=False,
                    launch_cooperative_grid=False, global_scratch_size=0, global_scratch_align=1,
                    profile_scratch_size=0, profile_scratch_align=1, instrumentation_mode="",
                )  # fmt: skip
                compiled.run = cuda.CudaLauncher(compiled.src, metadata)

            _, run = direct(launch, real)
            got.clear()
            launch.run()
            run()
            through_triton, ours = got
            assert ours == through_triton, case.name
            count += many > 0
    assert count > 5


def flat(values: Any) -> list[Any]:
    return [u for v in values for u in (flat(v) if type(v) is tuple else [v])]
