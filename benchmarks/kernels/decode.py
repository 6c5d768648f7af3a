"""The entry of the kernel for Y of at most 16 rows in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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
from .traffic import Facts, Traffic, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    x, w, s, a, b = f["x"], f["w"], f["s"], nbytes(f["a"]), nbytes(f["b"])
    M, (programs,) = f.get("M", 1), f["grid"]
    N, K, R = f["N"], f["K"], f["R"]
    low = (2 * M * K * R * programs if s is None else 0) + 2 * M * N * R
    return Traffic(
        "decode", 1,
        read=nbytes(x) + nbytes(w) + a + b + nbytes(s) + nbytes(f["bias"]),
        written=nbytes(f["y"]),
        flops=2 * M * N * K + low,
        unit="fp32" if M == 1 else unit_of(x.dtype),
        requested=nbytes(w) + b + programs * (nbytes(x) + a + nbytes(s)) + nbytes(f["bias"]),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for m in (1, 16):
        for r, dtype, adapter in (
            (16, BF16, FP32),
            (16, BF16, BF16),
            (64, BF16, FP32),
            (128, BF16, FP32),
            (16, FP32, FP32),
        ):
            launches = decode.plan_decode(
                meta(m, N, dtype=dtype), meta(m, K, dtype=dtype), meta(N, K, dtype=dtype),
                meta(r, K, dtype=adapter), meta(N, r, dtype=adapter),
                None, None, 1.0, decode.default_config(m, N, r, arch),
            )  # fmt: skip
            yield from named(f"decode M{m} {tag(r, 1, False, dtype, adapter)}", launches)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("decode", b.M, *b.Ns, b.K, b.r)


def _candidates(case: RaceCase) -> list[Any]:
    one = [(4, 512, 8, 3), (8, 512, 8, 3), (16, 512, 8, 3), (4, 1024, 8, 2), (8, 256, 4, 3),
           (16, 256, 4, 3), (4, 512, 4, 4), (2, 1024, 8, 3)]  # fmt: skip
    few = [(16, 128, 4, 4), (16, 256, 4, 3), (32, 128, 4, 3), (32, 256, 8, 3), (64, 128, 4, 3),
           (64, 64, 4, 4), (16, 256, 2, 3), (32, 64, 4, 5)]  # fmt: skip
    rows = one if case.m == 1 else few
    return configs(decode.DecodeConfig, "block_n block_k num_warps num_stages", rows)


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    w = t.some(case.n, case.k, scale=case.k**-0.5)
    x, a, b = t.some(case.m, case.k), t.adapters(case.r, case.k), t.adapters(case.n, case.r)
    return (
        lambda c, i: [decode.decode(x[i], w[i], a[i], b[i], SCALE, config=c)],
        lambda: [reference.linear(x[0], w[0], reference.shrink(x[0], a[0], SCALE), b[0])],
    )


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    y, x, w = t("m", "n"), t("m", "k"), t("n", "k")
    a, b = t.low("r", "k"), t.low("n", "r")
    return decode.plan_decode(y, x, w, a, b, None, None, 1.0, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for rows in (1, 3):
        x, s = o.x[:rows], o.s[:rows]
        yield f"decode M={rows}", [decode.decode(x, o.w, o.a, o.b, 2.0)]
        yield f"decode M={rows}, S given", [decode.decode(x, o.w, None, o.b, s=s)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: decode.decode(o.x[:1], o.w, o.a, o.b)
    yield lambda: decode.decode(o.x[:16], o.w, o.a, o.b)


ENTRY = KernelEntry(
    traffic={"_gemv_kernel": _traffic, "_rows_kernel": _traffic},
    cases=_cases,
    ops={"decode": Raced("few", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
