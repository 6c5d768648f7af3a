"""The compiler's facts of a launch, for the model: kept ones, or compiled now (a second)."""

from __future__ import annotations

import functools
from typing import Any

import triton

from peftkern.kernels.common import Launch

from ..static import judging, store
from ..static.compiling import compile_launch
from ..static.key import key_of


@functools.cache
def _kept() -> dict[str, store.Facts]:
    return store.load_committed() | store.load_user()


def facts_of(launch: Launch, name: str) -> dict[str, Any]:
    """Warps, registers, shared bytes, … of ``launch`` on architecture ``name`` ("sm_90").

    What has to be compiled is kept in the user's file, as ``benchmarks.static`` keeps it.

    Raises:
        RuntimeError: the launch does not compile, with the compiler's message, or kernels are
            interpreted in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled; unset it")
    key, kept = key_of(launch, name), _kept()
    if key not in kept:
        facts = compile_launch(launch, name)
        if "error" in facts:
            raise RuntimeError(f"{launch.kernel.__name__} for {name}: {facts['error']}")
        store.add_to_user({key: facts})
        kept[key] = facts
    return kept[key]


def resident(facts: dict[str, Any], name: str) -> int:
    """The number of programs that one multiprocessor of architecture ``name`` holds at a time."""
    fits = judging.resident(judging.TARGETS[name], facts)
    if facts["tensor_memory"]:
        fits = min(fits, judging.TENSOR_MEMORY // facts["tensor_memory"])
    return max(1, fits)
