"""The entry of the kernel for the gradients of A."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import grad_a, reference
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
    Operands,
    Raced,
    Run,
    TableTensors,
    configs,
    meta,
    named,
)  # fmt: skip
from .traffic import Facts, Traffic, nbytes, once, total, unit_of


def _traffic(f: Facts) -> Traffic:
    x, ds, words = f["x"], f["ds"], f["words"]
    return Traffic(
        "grad_a", 1,
        read=nbytes(x) + total(ds) + once(words),
        written=total(f["outs"]),
        flops=2 * f["M"] * f["K"] * sum(f["ranks"]),
        unit=unit_of(x.dtype),
        requested=nbytes(x) + f["grid"][0] * total(ds) + total(words),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for g in ADAPTERS:
        for k in (K, 14336):  # the default config has narrow strips for one, wide for the other
            x, das = meta(M, k, dtype=g.dtype), g.grads(g.r, k)
            config = grad_a.default_config(M, k, arch, [g.r] * g.group, g.dtype.itemsize)
            launches = grad_a.plan_grad_a(x, g.ds(), g.words(M, k), das, config)
            yield from named(f"grad_a K{k} {g.tag}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("grad_a", b.M, 0, b.K, b.r, b.mask, group=len(b.Ns))


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (64, 64, 1, 4, 3), (64, 64, 2, 4, 3), (64, 64, 4, 4, 3), (128, 64, 4, 4, 3),
        (64, 128, 4, 4, 3), (64, 128, 8, 4, 3), (128, 32, 2, 4, 4), (64, 32, 2, 4, 4),
        (64, 64, 8, 4, 4), (64, 64, 16, 4, 3), (128, 128, 8, 8, 2),
    ]  # fmt: skip
    return configs(
        grad_a.GradAConfig, "block_m block_k split_m num_warps num_stages",
        [r for r in rows if r[2] * r[0] <= max(64, case.m)],
    )  # fmt: skip


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    x, ds = t.some(case.m, case.k), [t.some(case.m, case.r) for _ in range(case.group)]

    def exact() -> list[Tensor]:
        return [reference.grad_a(x[0], d[0], m) for d, m in zip(ds, t.keeps, strict=True)]

    return lambda c, i: grad_a.grad_a(x[i], [d[i] for d in ds], t.words, config=c), exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    ds, das = [t("m", "r")] * t.key.group, [t.grad("r", "k")] * t.key.group
    return grad_a.plan_grad_a(t("m", "k"), ds, t.words(), das, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = grad_a.GradAConfig(16, 32, split, 4, 2)
        yield f"grad_a split {split}", grad_a.grad_a(o.x, [o.s, o.s], o.words, config=config)


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: grad_a.grad_a(o.x, [o.s], o.words)


ENTRY = KernelEntry(
    traffic={"_grad_a_kernel": _traffic},
    cases=_cases,
    ops={"grad_a": Raced("low_rank", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
