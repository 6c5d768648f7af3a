"""The entry of the kernel that expands the low-rank part of Y and of dX to a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import expand, reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import RaceCase
from .entry import (
    ADAPTERS,
    Bucket,
    Case,
    Drawn,
    Exact,
    K,
    KernelEntry,
    M,
    N,
    Operands,
    Raced,
    Run,
    TableTensors,
    meta,
    named,
)  # fmt: skip
from .traffic import Facts, Traffic, low_rank, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    read, requested, flops = low_rank(f)
    add = nbytes(f["add"])
    unit = unit_of(f["Ls"][0].dtype)
    return Traffic("expand", 1, read + add, nbytes(f["out"]), flops, unit, requested + add)


def _cases(arch: Arch) -> Iterator[Case]:
    for g in ADAPTERS:
        config = expand.default_config(M, [g.r] * g.group)
        x, a = meta(M, K, dtype=g.dtype), g.low(g.r, K)
        launches = expand.plan_expand(x, g.ds(), a, g.words(), None, None, config)
        yield from named(f"expand dX {g.tag}", launches)
        if g.group == 1 and not g.masked:
            y, bias, (b,) = meta(M, N, dtype=g.dtype), meta(N, dtype=g.dtype), g.low(N, g.r)
            launches = expand.plan_expand(y, g.ds(), [b.T], [None], bias, None, config)
            yield from named(f"expand Y {g.tag}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    if len(b.Ns) == 1 and not b.mask:  # only dX has a mask
        yield RaceCase("expand", b.M, b.Ns[0], 0, b.r)


def _race_cases_dx(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("low_rank_grad_input", b.M, 0, b.K, b.r, b.mask, group=len(b.Ns))


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (64, 128, 8, 2), (64, 128, 4, 2), (128, 128, 8, 2), (32, 256, 4, 2), (64, 256, 8, 2),
        (32, 128, 4, 1), (16, 256, 4, 1), (128, 64, 4, 2),
    ]  # fmt: skip
    block_r = min(64, max(16, 1 << (case.r - 1).bit_length()))
    return [
        expand.ExpandConfig(m, n, block_r, warps, stages)
        for m, n, warps, stages in rows
        if m <= max(16, 2 * case.m)
    ]


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    s, b = t.some(case.m, case.r), t.adapters(case.n, case.r)
    return (
        lambda c, i: [expand.expand(s[i], b[i], config=c)],
        lambda: [reference.expand(s[0], b[0])],
    )


def _contest_dx(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    ds = [t.some(case.m, case.r) for _ in range(case.group)]
    As = [t.adapters(case.r, case.k) for _ in range(case.group)]

    def run(c: Any, i: int) -> list[Tensor]:
        each = [d[i] for d in ds], [a[i] for a in As]
        return [expand.low_rank_grad_input(*each, t.words, config=c)]

    def exact() -> list[Tensor]:
        return [reference.low_rank_grad_input([d[0] for d in ds], [a[0] for a in As], t.keeps)]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    y, s, b = t("m", "n"), t("m", "r"), t.low("n", "r")
    return expand.plan_expand(y, [s], [b.T], [None], None, None, config)


def _plan_dx(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    ds, As = [t("m", "r")] * t.key.group, [t.low("r", "k")] * t.key.group
    return expand.plan_expand(t("m", "k"), ds, As, t.words(), None, None, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config = expand.ExpandConfig(16, 32, 16, 4, 1)
    yield "expand", [expand.expand(o.s, o.b, o(o.N), config=config)]
    yield "expand dX", [expand.low_rank_grad_input([o.s, o.s], [o.a, o.a], o.words)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: expand.expand(o.s, o.b)
    yield lambda: expand.low_rank_grad_input([o.s], [o.a], o.words)


ENTRY = KernelEntry(
    traffic={"_expand_kernel": _traffic},
    cases=_cases,
    ops={
        "expand": Raced("low_rank", _race_cases, _candidates, _contest, _plan),
        "low_rank_grad_input": Raced(
            "low_rank", _race_cases_dx, _candidates, _contest_dx, _plan_dx
        ),
    },
    sanitize=_sanitize,
    counted=_counted,
)
