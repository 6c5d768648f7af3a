"""The entry of the kernel that makes a dense weight of a quantised one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import dequantise as kernel
from peftkern.kernels.common import Arch

from .entry import BF16, FP32, Case, K, KernelEntry, N, Operands, meta, named
from .quantised import FORMATS, drawn, packed_bytes
from .traffic import Facts, Traffic, nbytes


def _traffic(f: Facts) -> Traffic:
    packed, out = packed_bytes(f), nbytes(f["out"])
    # two operations for each number: its scale, and the place of its bits
    return Traffic("dequantise", 1, packed, out, flops=f["N"] * f["K"], requested=packed)


def _cases(arch: Arch) -> Iterator[Case]:
    for name, form in FORMATS.items():
        for dtype in (BF16, FP32) if name in ("nf4 nested", "fp8") else (BF16,):
            w = form(meta, N, K)
            config = kernel.default_config(w, arch)
            launches = kernel.plan_dequantise(meta(N, K, dtype=dtype), w, config, arch)
            yield from named(f"dequantise {name} {'bf16' if dtype is BF16 else 'fp32'}", launches)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config = kernel.DequantiseConfig(16, 32)
    for name, form in FORMATS.items():
        w = form(drawn(o.device), 40, 72)
        yield f"dequantise {name}", [kernel.dequantise(w, BF16, config=config)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    n, k = o.N, o.K // 64 * 64
    for name in ("nf4 nested", "fp8", "int4"):
        w = FORMATS[name](drawn(o.device), n, k)
        yield lambda w=w: kernel.dequantise(w, BF16)


ENTRY = KernelEntry(
    traffic={"_dequantise_kernel": _traffic},
    cases=_cases,
    sanitize=_sanitize,
    counted=_counted,
)
