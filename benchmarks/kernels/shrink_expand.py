"""The entry of the kernel for S and the low-rank part of Y in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import reference, shrink_expand
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.grad_xa import fits

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    DRAW,
    JOINED,
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
    Timing,
    configs,
    meta,
    named,
)  # fmt: skip
from .traffic import Facts, Traffic, mask_operations, masks, nbytes, once, total, unit_of


def _traffic(f: Facts) -> Traffic:
    x, As, Bs, (blocks,) = f["x"], f["As"], f["Bs"], f["grid"]
    whole = total(Bs) + total(f["biases"])
    words, drawn, seed = masks(f)
    return Traffic(
        "shrink_expand", 1,
        read=nbytes(x) + total(As) + once(words) + whole + seed,
        written=nbytes(f["s_out"]) + total(f["ys"]) + total(drawn),
        flops=2 * f["M"] * sum(r * (f["K"] + n) for r, n in zip(f["ranks"], f["Ns"], strict=True)),
        unit=unit_of(x.dtype),
        requested=nbytes(x) + blocks * (total(As) + whole + seed) + total(words),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for g in JOINED:
        x, s = meta(M, K, dtype=g.dtype), meta(M, g.r * g.group, dtype=g.dtype)
        ys = [meta(M, N, dtype=g.dtype)] * g.group
        biases = [meta(N, dtype=g.dtype), *[None] * g.group][: g.group]
        scales = [1.0] * g.group
        for m in (M, 4096):  # with the smaller M a program has fewer rows
            config = shrink_expand.default_config(
                m, [g.r] * g.group, arch, g.dtype.itemsize, g.masked
            )
            for how, draw in (("", None), (" drawn", DRAW))[: 1 + g.masked]:
                launches = shrink_expand.plan_shrink_expand(
                    x, g.low(g.r, K), g.low(N, g.r), g.words(), biases, scales, s, ys, config, draw
                )
                yield from named(f"shrink_expand M{m} {g.tag}{how}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    group = len(b.Ns)
    if fits([b.r] * group):  # the same condition as for the backward's joined kernel
        yield RaceCase("shrink_expand", b.M, sum(b.Ns), b.K, b.r, b.mask, group=group, ns=b.Ns)


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (64, 64, 128, 4, 3), (32, 64, 128, 4, 3), (32, 128, 128, 4, 3), (64, 64, 64, 4, 3),
        (64, 128, 128, 8, 3), (128, 64, 128, 8, 3), (64, 64, 256, 8, 3), (16, 128, 128, 4, 3),
        (64, 128, 128, 8, 4), (64, 64, 128, 8, 4), (32, 128, 128, 4, 4),
    ]  # fmt: skip
    return configs(
        shrink_expand.ShrinkExpandConfig, "block_m block_k block_n num_warps num_stages",
        [r for r in rows if r[0] <= max(16, 2 * case.m)],
    )  # fmt: skip


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    x, As = t.some(case.m, case.k), [t.adapters(case.r, case.k) for _ in range(case.group)]
    Bs = [t.adapters(n, case.r) for n in case.ns]

    def exact() -> list[Tensor]:
        pairs = zip(As, t.keeps, strict=True)
        parts = [reference.shrink(x[0], a[0], SCALE, m) for a, m in pairs]
        ys = [reference.expand(s, b[0]) for s, b in zip(parts, Bs, strict=True)]
        return [torch.cat(parts, dim=1), *ys]

    def run(c: Any, i: int) -> list[Tensor]:
        each = [a[i] for a in As], [b[i] for b in Bs]
        s, ys = shrink_expand.shrink_expand(x[i], *each, SCALE, t.words, config=c)
        return [s, *ys]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    k, g = t.key, t.key.group
    s = meta(k.m, k.r * g, dtype=t.dtype)
    # n is the sum over the group; the compiled code does not depend on how it is divided
    Bs, ys = [t.low("n", "r")] * g, [t("m", "n")] * g
    As, scales = [t.low("r", "k")] * g, [1.0] * g
    x, biases = t("m", "k"), [None] * g
    return shrink_expand.plan_shrink_expand(x, As, Bs, t.words(), biases, scales, s, ys, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config, biases = shrink_expand.ShrinkExpandConfig(16, 32, 32, 4, 2), [o(o.N), None]
    s, ys = shrink_expand.shrink_expand(
        o.x, [o.a, o.a], [o.b, o.b], 2.0, o.words, biases, config=config
    )
    yield "shrink_expand", [s, *ys]
    words = [torch.empty_like(o.words) for _ in range(2)]
    s, ys = shrink_expand.shrink_expand(
        o.x, [o.a, o.a], [o.b, o.b], 2.0, words, biases, draw=DRAW, config=config
    )
    yield "shrink_expand, masks drawn", [s, *ys, *(w.float() for w in words)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: shrink_expand.shrink_expand(o.x, [o.a], [o.b], 2.0, o.words)
    words = [torch.empty_like(o.words)]
    yield lambda: shrink_expand.shrink_expand(o.x, [o.a], [o.b], 2.0, words, draw=DRAW)


ENTRY = KernelEntry(
    traffic={"_shrink_expand_kernel": _traffic},
    timing={"_shrink_expand_kernel": Timing(integers=mask_operations)},
    cases=_cases,
    ops={"shrink_expand": Raced("joined", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
