"""Compiles one launch with Triton and no GPU, and reads facts from the machine code.

The facts come from the compiler alone; ``benchmarks.static`` judges them. A change to the code in
this file or in :mod:`.accesses` makes every kept result stale (``benchmarks.static.key``), so they
hold nothing else.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from peftkern.kernels.common import Launch

from .accesses import summary

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "cp.async": r"cp\.async\.c[ag]",
    "cp.async.bulk.tensor": r"cp\.async\.bulk\.tensor",
    "mfma": r"v_mfma",
    "global_load_lds": r"(?:global|buffer)_load\w*.*\blds\b",
}
NOTHING: dict[str, Any] = {"loads": {}, "stores": {}, "products": 0}


class NoDevice:
    """Stands in for Triton's driver, so that the compiler sees ``target`` instead of a GPU.

    Triton keeps compiled kernels per device; two with different labels share none.
    """

    def __init__(self, target: GPUTarget, label: str = "") -> None:
        self.target, self.label = target, label

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.label}{self.target}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0


_compilations = itertools.count()


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for an architecture such as "sm_90" or "gfx942"."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def _read_cuda(compiled: Any, log: str) -> tuple[dict[str, int], str]:
    """({"registers", "serialized", "spilled", "stack"}, PTX).

    The numbers are from ptxas's log of this very compilation.
    """

    def bytes_of(what: str) -> int:
        found = re.findall(rf"(\d+) bytes {what}", log)
        if not found:
            raise RuntimeError(f"ptxas named no bytes of {what}")
        return sum(map(int, found))

    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
        "spilled": bytes_of("spill stores") + bytes_of("spill loads"),
        "stack": bytes_of("stack frame"),
    }, compiled.asm["ptx"]


def _read_hip(compiled: Any, log: str) -> tuple[dict[str, int], str]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return {
        "registers": field("vgpr_count"),
        "serialized": False,
        "spilled": spilled,
        "stack": field("private_segment_fixed_size"),
    }, text


def compile_launch(launch: Launch, name: str) -> dict[str, Any]:
    """Facts of the launch compiled for architecture ``name``; ``{"error": ...}`` if that fails.

    They are warps, registers a thread, whether the assembler makes products of warpgroups wait for
    each other, bytes spilled and bytes of stack a thread, shared bytes a program, columns of tensor
    memory, how often each instruction of INSTRUCTIONS occurs, and what :func:`.accesses.summary`
    tells (nothing for AMD's architectures).
    """
    target = gpu_target(name)
    # No cache may answer for the compiler: each call has another device, and no file is read.
    driver.set_active(NoDevice(target, label=f"{next(_compilations)} "))
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
        read, text = (_read_hip if target.backend == "hip" else _read_cuda)(
            compiled, log.getvalue()
        )
        ir = compiled.asm
        moved = summary(ir["ttir"], ir["ttgir"], text) if target.backend == "cuda" else NOTHING
    except Exception as error:  # whatever the compiler raises is the result
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
    counts = {k: len(re.findall(pattern, text)) for k, pattern in INSTRUCTIONS.items()}
    return {
        "warps": compiled.metadata.num_warps,
        **read,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "instructions": {k: n for k, n in counts.items() if n},
        **moved,
    }
