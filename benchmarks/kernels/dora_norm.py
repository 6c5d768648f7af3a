"""The entry of the kernel for DoRA's row norms of W + scale B A."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from peftkern.kernels import dora_norm
from peftkern.kernels.common import Arch

from .entry import BF16, FP32, Case, K, KernelEntry, N, Operands, Timing, meta, named, tag
from .traffic import Facts, Traffic, nbytes, unit_of


def _norm(f: Facts) -> Traffic:
    w, a, b, (blocks, split) = f["w"], nbytes(f["a"]), nbytes(f["b"]), f["grid"]
    return Traffic(
        "norm", 1,
        read=nbytes(w) + a + b,
        written=nbytes(f["out"]),
        flops=f["N"] * f["K"] * (2 * f["R"] + 4),
        unit=unit_of(w.dtype),
        requested=nbytes(w) + a * blocks + b * split,
    )  # fmt: skip


def _root(f: Facts) -> Traffic:
    read = nbytes(f["partials"])
    return Traffic("root", 1, read, nbytes(f["out"]), requested=read)


def _cases(arch: Arch) -> Iterator[Case]:
    for r, dtype, adapter, transposed in (
        (16, BF16, FP32, False),
        (16, BF16, BF16, False),
        (16, BF16, FP32, True),
        (128, BF16, FP32, False),
        (16, FP32, FP32, False),
    ):
        w = meta(K, N, dtype=dtype).T if transposed else meta(N, K, dtype=dtype)
        config = dora_norm.default_config(N, K, arch, dtype.itemsize)
        a, b = meta(r, K, dtype=adapter), meta(N, r, dtype=adapter)
        launches = dora_norm.plan_norms(w, a, b, 1.0, meta(N, dtype=FP32), config)
        layout = "[K,N] " if transposed else ""
        yield from named(f"dora norms {layout}{tag(r, 1, False, dtype, adapter)}", launches)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = dora_norm.NormConfig(16, 32, split, 4, 2)
        yield (
            f"dora norms split {split}",
            [dora_norm.row_norms(o.w, o.a, o.b, 2.0, config=config)],
        )


ENTRY = KernelEntry(
    traffic={"_norm_kernel": _norm, "_root_kernel": _root},
    timing={"_root_kernel": Timing(near=True)},
    cases=_cases,
    sanitize=_sanitize,
)
