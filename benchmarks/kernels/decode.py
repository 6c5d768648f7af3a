"""The entry of the kernels for Y of at most 16 rows, of one projection or of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import decode, reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    BF16,
    FP32,
    Bucket,
    Case,
    Drawn,
    Exact,
    K,
    KernelEntry,
    N,
    Operands,
    Raced,
    Run,
    TableTensors,
    configs,
    meta,
    named,
    tag,
)  # fmt: skip
from .traffic import Facts, Traffic, cdiv, nbytes, total, unit_of


def _traffic(f: Facts) -> Traffic:
    x, ws, s, biases = f["x"], f["ws"], f["s"], total(f["biases"])
    M, (programs,), K, ranks = f.get("M", 1), f["grid"], f["K"], f["ranks"]
    tiles = [cdiv(n, f["BLOCK_N"]) for n in f["Ns"]]
    As, Bs = f["As"], total(f["Bs"])
    flops = sum(2 * M * n * (K + r) for n, r in zip(f["Ns"], ranks, strict=True))
    again = programs * nbytes(x)
    for t, r, a in zip(tiles, ranks, As, strict=True):
        if s is None:
            again, flops = again + t * nbytes(a), flops + t * 2 * M * K * r
        else:
            again += t * f["PARTS"] * M * r * s.element_size()
    return Traffic(
        "decode", 1,
        read=nbytes(x) + total(ws) + total(As) + Bs + nbytes(s) + biases,
        written=total(f["ys"]),
        flops=flops,
        unit="fp32" if M == 1 else unit_of(x.dtype),
        requested=total(ws) + Bs + again + biases,
    )  # fmt: skip


def _shrink(f: Facts) -> Traffic:
    x, As, (chunks, _), rank = f["x"], f["As"], f["grid"], sum(f["ranks"])
    return Traffic(
        "decode_shrink", 1,
        read=nbytes(x) + total(As),
        written=nbytes(f["parts"]),
        flops=2 * f["M"] * f["K"] * rank,
        unit="fp32" if f["BLOCK_M"] == 1 else unit_of(x.dtype),
        requested=chunks * nbytes(x) + total(As),
    )  # fmt: skip


def launches(
    m: int,
    ns: Sequence[int],
    k: int,
    ranks: Sequence[int],
    arch: Arch,
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
    config: decode.DecodeConfig | None = None,
) -> list[Launch]:
    """The launches for a group of projections [N_i, K] of ranks r_i, on meta tensors."""
    if config is None:
        sizes = dtype.itemsize, adapter.itemsize
        config = decode.default_config(m, ns, k, ranks, arch, *sizes)
    return decode.plan_decode(
        [meta(m, n, dtype=dtype) for n in ns], meta(m, k, dtype=dtype),
        [meta(n, k, dtype=dtype) for n in ns], [meta(r, k, dtype=adapter) for r in ranks],
        [meta(n, r, dtype=adapter) for n, r in zip(ns, ranks, strict=True)],
        None, [None] * len(ns), [1.0] * len(ns), config, arch,
    )  # fmt: skip


GROUPS = {"qkv": (4096, 1024, 1024), "gate,up": (14336, 14336)}  # Llama-8B's


def _cases(arch: Arch) -> Iterator[Case]:
    for m in (1, 16):
        for r, dtype, adapter in (
            (16, BF16, FP32),
            (16, BF16, BF16),
            (64, BF16, FP32),
            (128, BF16, FP32),
            (256, BF16, FP32),
            (16, FP32, FP32),
        ):
            found = launches(m, [N], K, [r], arch, dtype, adapter)
            yield from named(f"decode M{m} {tag(r, 1, False, dtype, adapter)}", found)
        for name, ns in GROUPS.items():
            found = launches(m, ns, K, [16] * len(ns), arch)
            yield from named(f"decode M{m} {name} {tag(16, len(ns))}", found)
        for r in (16, 64):  # small projections, in one launch
            found = launches(m, [256], 256, [r], arch)
            yield from named(f"decode M{m} small {tag(r)}", found)
        s, y = meta(m, 16), [meta(m, N)]
        given = decode.plan_decode(
            y, meta(m, K), [meta(N, K)], [], [meta(N, 16, dtype=FP32)], s, [None], [1.0],
            decode.default_config(m, [N], K, [16], arch), arch,
        )  # fmt: skip
        yield from named(f"decode M{m} S given {tag(16)}", given)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("decode", b.M, sum(b.Ns), b.K, b.r, group=len(b.Ns), ns=b.Ns)


def _candidates(case: RaceCase) -> list[Any]:
    one = [
        (32, 256, 4, 5, 1), (32, 256, 4, 4, 4), (16, 512, 8, 4, 2), (16, 512, 8, 3, 4),
        (32, 512, 8, 3, 2), (8, 1024, 8, 4, 2), (64, 128, 2, 5, 2), (16, 256, 4, 5, 2),
        (8, 512, 4, 4, 2), (32, 128, 2, 5, 4), (16, 512, 8, 3, 0), (4, 1024, 8, 3, 0),
    ]  # fmt: skip
    few = [
        (32, 128, 4, 5, 4), (32, 256, 4, 4, 4), (16, 256, 4, 4, 4), (16, 128, 4, 5, 4),
        (64, 128, 4, 4, 4), (64, 64, 4, 5, 4), (32, 256, 8, 4, 8), (16, 256, 2, 4, 2),
        (32, 128, 4, 3, 0), (16, 128, 4, 3, 0),
    ]  # fmt: skip
    rows = one if case.m == 1 else few
    return configs(decode.DecodeConfig, "block_n block_k num_warps num_stages split_k", rows)


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    x, ns = t.some(case.m, case.k), case.ns
    ws = [t.some(n, case.k, scale=case.k**-0.5) for n in ns]
    As = [t.adapters(case.r, case.k) for _ in ns]
    Bs = [t.adapters(n, case.r) for n in ns]

    def run(c: Any, i: int) -> list[Tensor]:
        each = [w[i] for w in ws], [a[i] for a in As], [b[i] for b in Bs]
        return decode.decode_group(x[i], *each, SCALE, config=c)

    def exact() -> list[Tensor]:
        return [
            reference.linear(x[0], w[0], reference.shrink(x[0], a[0], SCALE), b[0])
            for w, a, b in zip(ws, As, Bs, strict=True)
        ]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    k = t.key
    # n is the sum over the group; the compiled code does not depend on how it is divided
    ns = [k.n // k.group] * k.group
    return launches(k.m, ns, k.k, [k.r] * k.group, arch, t.dtype, t.adapter, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for rows in (1, 3):
        x, s = o.x[:rows], o.s[:rows]
        for split in (2, 0):
            config = decode.DecodeConfig(16, 32, 4, 3, split)
            ys = decode.decode_group(
                x, [o.w, o.w[:5]], [o.a, o.a], [o.b, o.b[:5]], 2.0, config=config
            )
            yield f"decode M={rows}, K in {split} parts", ys
        yield f"decode M={rows}, S given", [decode.decode(x, o.w, None, o.b, s=s)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: decode.decode(o.x[:1], o.w, o.a, o.b)
    yield lambda: decode.decode(o.x[:16], o.w, o.a, o.b)
    yield lambda: decode.decode_group(o.x[:1], [o.w, o.w], [o.a, o.a], [o.b, o.b])


ENTRY = KernelEntry(
    traffic={
        "_decode_shrink_kernel": _shrink,
        "_gemv_kernel": _traffic,
        "_rows_kernel": _traffic,
    },
    cases=_cases,
    ops={"decode": Raced("few", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
