"""The entry of the kernels for the gradients of S and of B, in one pass over dY or in two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import fp8_rows, grad_sb, reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    FP8_PRODUCTS,
    FP32,
    Bucket,
    Case,
    Drawn,
    Exact,
    KernelEntry,
    M,
    N,
    Operands,
    Raced,
    Run,
    TableTensors,
    Timing,
    configs,
    meta,
    named,
    room,
    tag,
)  # fmt: skip
from .traffic import Facts, Traffic, copied, copy_operations, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    dy, b, s, (blocks, split, chunks) = f["dy"], f["b"], f["s"], f["grid"]
    return Traffic(
        "grad_sb", 1,
        read=nbytes(dy) * chunks + nbytes(b) + nbytes(s),
        written=nbytes(f["ds_out"]) + nbytes(f["db_out"]) + copied(f),
        flops=4 * f["M"] * f["N"] * f["R"],
        unit=unit_of(dy.dtype),
        requested=nbytes(dy) * chunks + nbytes(b) * blocks + nbytes(s) * split,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for r, m in ((16, M), (16, 128), (32, M), (64, 128), (128, M)):
        y, b, s = meta(m, N), meta(N, r, dtype=FP32), meta(m, r)
        db, config = meta(N, r, dtype=FP32), grad_sb.default_config(m, N, r, arch)
        if config is None:
            launches = grad_sb.plan_two_pass(y, b, s, 1.0, meta(m, r), db, arch)
        else:
            launches = grad_sb.plan_grad_sb(y, b, s, 1.0, meta(m, r), db, config)
        yield from named(f"grad_sb M{m} {tag(r)}", launches)
    for r in (16, 64) if arch.capability == FP8_PRODUCTS else ():
        y, b, s = meta(M, N), meta(N, r, dtype=FP32), meta(M, r)
        db, copy = meta(N, r, dtype=FP32), room(M, N)
        config = grad_sb.default_config(M, N, r, arch, copied=True)
        if config is None:
            launches = grad_sb.plan_two_pass(y, b, s, 1.0, meta(M, r), db, arch, copy)
        else:
            launches = grad_sb.plan_grad_sb(y, b, s, 1.0, meta(M, r), db, config, copy)
        yield from named(f"grad_sb with fp8 M{M} {tag(r)}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    if len(b.Ns) == 1 and not b.mask:  # a mask would change nothing here
        yield RaceCase("grad_sb", b.M, b.Ns[0], 0, b.r)


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (128, 64, 1, 8, 3), (128, 64, 2, 8, 3), (256, 64, 2, 8, 2), (256, 64, 4, 8, 3),
        (128, 128, 2, 8, 2), (64, 128, 1, 4, 3), (64, 64, 2, 4, 4), (32, 64, 4, 4, 3),
    ]  # fmt: skip
    return configs(
        grad_sb.GradSBConfig, "block_m block_n split_n num_warps num_stages",
        [r for r in rows if r[0] <= max(16, 2 * case.m)],
    )  # fmt: skip


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    dy, b = t.some(case.m, case.n), t.adapters(case.n, case.r)
    s = t.some(case.m, case.r)
    return (
        lambda c, i: grad_sb.grad_sb(dy[i], b[i], s[i], SCALE, config=c),
        lambda: [reference.grad_s(dy[0], b[0], SCALE), reference.grad_b(dy[0], s[0])],
    )


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    dy, b, s = t("m", "n"), t.low("n", "r"), t("m", "r")
    return grad_sb.plan_grad_sb(dy, b, s, 1.0, t("m", "r"), t.grad("n", "r"), config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = grad_sb.GradSBConfig(16, 32, split, 4, 2)
        yield f"grad_sb split {split}", [*grad_sb.grad_sb(o.dy, o.b, o.s, 2.0, config=config)]
    wide, s = o(o.N, 100, dtype=FP32), o(o.M, 100)
    yield "grad_sb, two passes", [*grad_sb.grad_sb(o.dy, wide, s, 2.0)]
    dy, b = o(o.M, 256), o(256, o.r, dtype=FP32)
    copy = fp8_rows.empty(o.M, 256, dy.device)
    found = grad_sb.grad_sb(dy, b, o.s, 2.0, copy=copy)
    yield "grad_sb with fp8", [*found, copy.q.float(), copy.scales]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: grad_sb.grad_sb(o.dy, o.b, o.s, 2.0)


ENTRY = KernelEntry(
    traffic={"_grad_sb_kernel": _traffic},
    timing={"_grad_sb_kernel": Timing(streams=True, integers=copy_operations)},
    cases=_cases,
    ops={
        "grad_sb": Raced(
            "low_rank", _race_cases, _candidates, _contest, _plan, choices=(grad_sb.TWO_PASS,)
        )
    },
    sanitize=_sanitize,
    counted=_counted,
)
