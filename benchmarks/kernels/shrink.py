"""The entry of the kernel for S of a group of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import fp8_rows, reference, shrink
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    ADAPTERS,
    BF16,
    COPIED,
    DRAW,
    FP8_PRODUCTS,
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
    room,
)  # fmt: skip
from .traffic import (
    Facts,
    Traffic,
    copied,
    copy_operations,
    mask_operations,
    masks,
    nbytes,
    once,
    total,
    unit_of,
)


def _traffic(f: Facts) -> Traffic:
    x, As, (blocks, split) = f["x"], f["As"], f["grid"]
    words, drawn, seed = masks(f)
    rank = sum(f["ranks"])
    return Traffic(
        "shrink", 1,
        read=nbytes(x) + total(As) + once(words) + seed,
        written=split * f["M"] * rank * f["out"].element_size() + total(drawn) + copied(f),
        flops=2 * f["M"] * f["K"] * rank,
        unit=unit_of(x.dtype),
        requested=nbytes(x) + blocks * (total(As) + split * seed) + total(words),
    )  # fmt: skip


def _operations(f: Facts) -> int:
    return mask_operations(f) + copy_operations(f)


def _cases(arch: Arch) -> Iterator[Case]:
    for g in ADAPTERS:
        for m in (M, 128) if g.r == 16 and g.dtype == BF16 else (M,):
            x, s = meta(m, K, dtype=g.dtype), meta(m, g.r * g.group, dtype=g.dtype)
            config = shrink.default_config(m, K, [g.r] * g.group, arch, g.dtype.itemsize, g.masked)
            scales = [1.0] * g.group
            drawn = g.masked and shrink.draws([g.r] * g.group)
            for how, draw in (("", None), (" drawn", DRAW))[: 1 + drawn]:
                launches = shrink.plan_shrink(x, g.low(g.r, K), g.words(m), scales, s, config, draw)
                yield from named(f"shrink M{m} {g.tag}{how}", launches)
    for g in COPIED if arch.capability == FP8_PRODUCTS else ():
        x, s, copy = meta(M, K), meta(M, g.r * g.group), room(M, K)
        ranks, draw = [g.r] * g.group, DRAW if g.masked else None
        config = shrink.default_config(M, K, ranks, arch, 2, g.masked, copied=True)
        As, scales = g.low(g.r, K), [1.0] * g.group
        launches = shrink.plan_shrink(x, As, g.words(M), scales, s, config, draw, copy)
        yield from named(f"shrink with fp8 M{M} {g.tag}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("shrink", b.M, 0, b.K, b.r, b.mask, group=len(b.Ns))


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (16, 128, 1, 4, 4), (32, 128, 1, 4, 3), (64, 64, 1, 4, 3), (64, 64, 1, 4, 4),
        (64, 128, 1, 8, 3), (128, 64, 1, 8, 3), (64, 64, 2, 4, 3), (64, 128, 4, 4, 3),
        (16, 128, 4, 4, 4), (16, 128, 8, 4, 4), (16, 256, 16, 4, 3), (32, 64, 8, 4, 4),
    ]  # fmt: skip
    few = case.m <= 2048
    keep = [r for r in rows if (r[2] <= 4 or few) and r[0] <= max(16, 2 * case.m)]
    return configs(shrink.ShrinkConfig, "block_m block_k split_k num_warps num_stages", keep)


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    x, As = t.some(case.m, case.k), [t.adapters(case.r, case.k) for _ in range(case.group)]

    def exact() -> list[Tensor]:
        pairs = zip(As, t.keeps, strict=True)
        return [torch.cat([reference.shrink(x[0], a[0], SCALE, m) for a, m in pairs], dim=1)]

    def run(c: Any, i: int) -> list[Tensor]:
        return [shrink.shrink(x[i], [a[i] for a in As], SCALE, t.words, config=c)]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    k = t.key
    out = meta(k.m, k.r * k.group, dtype=t.dtype)
    As, scales = [t.low("r", "k")] * k.group, [1.0] * k.group
    return shrink.plan_shrink(t("m", "k"), As, t.words(), scales, out, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for split in (1, 2):
        config = shrink.ShrinkConfig(16, 32, split, 4, 2)
        s = shrink.shrink(o.x, [o.a, o.a], 2.0, o.words, config=config)
        yield f"shrink split {split}", [s]
        words = [torch.empty_like(o.words) for _ in range(2)]
        s = shrink.shrink(o.x, [o.a, o.a], 2.0, words, draw=DRAW, config=config)
        yield f"shrink split {split}, masks drawn", [s, *(w.float() for w in words)]
    x, a = o(o.M, 256), o(o.r, 256, dtype=torch.float32)
    copy = fp8_rows.empty(o.M, 256, x.device)
    s = shrink.shrink(x, [a], 2.0, copy=copy, config=shrink.ShrinkConfig(16, 128, 2, 4, 2))
    yield "shrink with fp8", [s, copy.q.float(), copy.scales]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: shrink.shrink(o.x, [o.a], 2.0, o.words)
    words = [torch.empty_like(o.words)]
    yield lambda: shrink.shrink(o.x, [o.a], 2.0, words, draw=DRAW)


ENTRY = KernelEntry(
    traffic={"_shrink_kernel": _traffic},
    timing={"_shrink_kernel": Timing(integers=_operations)},
    cases=_cases,
    ops={"shrink": Raced("low_rank", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
