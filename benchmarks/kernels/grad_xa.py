"""The entry of the kernel for the gradients of X and of A in one pass over X."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import grad_xa, reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import RaceCase
from .entry import (
    COPIED,
    FP8_PRODUCTS,
    JOINED,
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
    Timing,
    configs,
    meta,
    named,
)  # fmt: skip
from .traffic import Facts, Traffic, cdiv, nbytes, once, total, unit_of


def _traffic(f: Facts) -> Traffic:
    x, ds, As, words = f["x"], f["ds"], f["As"], f["words"]
    strips, blocks = f["grid"][0], cdiv(f["M"], f["BLOCK_M"])
    read = nbytes(x) + nbytes(f["add"])
    return Traffic(
        "grad_xa", 1,
        read=read + total(ds) + total(As) + once(words),
        written=nbytes(f["d_out"]) + total(f["outs"]),
        flops=4 * f["M"] * f["K"] * sum(f["ranks"]),
        unit=unit_of(x.dtype),
        requested=read + strips * total(ds) + blocks * total(As) + total(words),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for g in JOINED:
        for k in (K, 14336):
            x, das = meta(M, k, dtype=g.dtype), g.grads(g.r, k)
            config = grad_xa.default_config(M, k, [g.r] * g.group, arch, g.dtype.itemsize)
            launches = grad_xa.plan_grad_xa(
                x, g.ds(), g.low(g.r, k), g.words(M, k), meta(M, k, dtype=g.dtype), das, config
            )
            yield from named(f"grad_xa K{k} {g.tag}", launches)
    for g in COPIED if arch.capability == FP8_PRODUCTS else ():
        x, das = meta(M, K), g.grads(g.r, K)
        config = grad_xa.default_config(M, K, [g.r] * g.group, arch, 2, added=2)
        launches = grad_xa.plan_grad_xa(
            x, g.ds(), g.low(g.r, K), g.words(M), meta(M, K), das, config, meta(M, K)
        )
        yield from named(f"grad_xa added K{K} {g.tag}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    if grad_xa.fits([b.r] * len(b.Ns)):
        yield RaceCase("grad_xa", b.M, 0, b.K, b.r, b.mask, group=len(b.Ns))


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (64, 64, 1, 4, 3), (64, 64, 2, 4, 3), (64, 64, 4, 4, 3), (64, 32, 1, 4, 3),
        (64, 32, 2, 4, 3), (128, 32, 2, 4, 3), (128, 64, 4, 8, 3), (32, 64, 4, 4, 3),
        (64, 128, 8, 8, 2), (64, 64, 8, 4, 3), (128, 32, 1, 8, 4), (64, 64, 2, 4, 4),
    ]  # fmt: skip
    return configs(
        grad_xa.GradXAConfig, "block_m block_k split_m num_warps num_stages",
        [r for r in rows if r[2] * r[0] <= max(64, case.m)],
    )  # fmt: skip


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    x, ds = t.some(case.m, case.k), [t.some(case.m, case.r) for _ in range(case.group)]
    As = [t.adapters(case.r, case.k) for _ in range(case.group)]

    def run(c: Any, i: int) -> list[Tensor]:
        each = [d[i] for d in ds], [a[i] for a in As]
        d, das = grad_xa.grad_xa(x[i], *each, t.words, config=c)
        return [d, *das]

    def exact() -> list[Tensor]:
        first = [d[0] for d in ds]
        d = reference.low_rank_grad_input(first, [a[0] for a in As], t.keeps)
        das = [reference.grad_a(x[0], v, m) for v, m in zip(first, t.keeps, strict=True)]
        return [d, *das]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    g = t.key.group
    ds, As, das = [t("m", "r")] * g, [t.low("r", "k")] * g, [t.grad("r", "k")] * g
    return grad_xa.plan_grad_xa(t("m", "k"), ds, As, t.words(), t("m", "k"), das, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = grad_xa.GradXAConfig(16, 32, split, 4, 2)
        d, das = grad_xa.grad_xa(o.x, [o.s, o.s], [o.a, o.a], o.words, config=config)
        yield f"grad_xa split {split}", [d, *das]
    d, das = grad_xa.grad_xa(o.x, [o.s], [o.a], o.words, add=o.x)
    yield "grad_xa added", [d, *das]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: grad_xa.grad_xa(o.x, [o.s], [o.a], o.words)


ENTRY = KernelEntry(
    traffic={"_grad_xa_kernel": _traffic},
    timing={"_grad_xa_kernel": Timing(streams=True)},
    cases=_cases,
    ops={"grad_xa": Raced("joined", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
