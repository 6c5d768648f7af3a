"""The entry of the kernel for dY times DoRA's gain, and the gain's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.kernels import dora_grad
from peftkern.kernels.common import Arch

from .entry import BF16, FP32, Case, KernelEntry, M, N, Operands, Timing, meta, named
from .traffic import Facts, Traffic, nbytes


def _traffic(f: Facts) -> Traffic:
    row, (_, split) = nbytes(f["gain"]) + nbytes(f["bias"]), f["grid"]
    read = nbytes(f["dy"]) + nbytes(f["v"])
    return Traffic(
        "scale_grad", 1,
        read=read + row,
        written=nbytes(f["dz"]) + nbytes(f["sums"]),
        flops=4 * f["M"] * f["N"],
        unit="fp32",
        requested=read + row * split,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    gain, sums = meta(N, dtype=FP32), meta(N, dtype=FP32)
    for dtype in (BF16, FP32):
        dy, v, dz = (meta(M, N, dtype=dtype) for _ in range(3))
        config, bias = dora_grad.default_config(M, N, arch), meta(N, dtype=dtype)
        launches = dora_grad.plan_scale_grad(dy, gain, v, bias, dz, sums, config)
        yield from named(f"dora gradient bias {str(dtype).removeprefix('torch.')}", launches)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = dora_grad.ScaleConfig(16, 32, split, 4, 2)
        gain = torch.rand(o.N, device=o.device)
        yield (
            f"dora gradient split {split}",
            list(dora_grad.scale_grad(o.dy, gain, o.dy, o(o.N), config=config)),
        )


ENTRY = KernelEntry(
    traffic={"_scale_grad_kernel": _traffic},
    timing={"_scale_grad_kernel": Timing(streams=True)},
    cases=_cases,
    sanitize=_sanitize,
)
