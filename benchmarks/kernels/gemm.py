"""The entry of the kernel for the product with W and the low-rank part, in Y and in dX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import gemm, reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import RaceCase
from .entry import (
    BF16,
    FP16,
    FP32,
    Adapters,
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
from .traffic import Facts, Traffic, cdiv, low_rank, nbytes, once, total, unit_of


def _described(f: Facts, name: str) -> tuple[Tensor, ...]:
    """The operands that are arguments of their own, as descriptors."""
    found = (f[f"{name}{i}"] for i in range(gemm.MAX_DESCRIBED))
    return tuple(d.base for d in found if d is not None)


def _traffic(f: Facts) -> Traffic:
    read, requested, flops = low_rank(f)
    all_x, all_w = f["xs"] or _described(f, "x"), f["ws"] or _described(f, "w")
    xs, ws = total(all_x), total(all_w)
    tiles_m, tiles_n = cdiv(f["M"], f["BLOCK_M"]), cdiv(f["N"], f["BLOCK_N"])
    return Traffic(
        "gemm", 1,
        read=read + once(all_x) + once(all_w) + nbytes(f["gain"]),
        written=nbytes(f["y"]) + nbytes(f["v"]),
        flops=flops + 2 * f["M"] * f["N"] * sum(f["Ks"]),
        unit=unit_of(all_x[0].dtype),
        requested=requested + xs * tiles_n + ws * tiles_m + nbytes(f["gain"]) * tiles_m,
    )  # fmt: skip


def _tiles(f: Facts) -> int:
    return cdiv(f["M"], f["BLOCK_M"]) * cdiv(f["N"], f["BLOCK_N"])


def _cases(arch: Arch) -> Iterator[Case]:
    """Cases forward (W [N, K] and [K, N]), backward, of groups, with pointers, and with a gain."""
    for g in (
        Adapters(16),
        Adapters(64, 1, True),
        Adapters(16, 3),
        Adapters(16, 3, True),
        Adapters(16, 1, True, FP16),
        Adapters(16, 1, True, FP32),
    ):
        r, dtype = g.r, g.dtype
        x, y, s = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype), meta(M, r, dtype=dtype)
        w, a, (b, *_) = meta(N, K, dtype=dtype), g.low(r, K), g.low(N, r)
        fast = dtype != FP32  # by default fp32 products are exact, without the matrix units
        config = gemm.default_config(
            M, N, arch, group=g.group, masked=g.masked, itemsize=dtype.itemsize
        )
        ys, ws, ds = [y] * g.group, [w.T] * g.group, [s] * g.group
        launches = gemm.plan_gemm(x, ys, ws, ds, a, g.words(), None, arch, config)
        yield from named(f"gemm dX {g.tag}", launches, fast)
        if g.group > 1:
            continue
        tag = g._replace(masked=False).tag
        config = gemm.default_config(M, N, arch, itemsize=dtype.itemsize)
        launches = gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)
        yield from named(f"gemm Y {tag}", launches, fast)
        if dtype == BF16:
            conv1d = meta(K, N, dtype=dtype).T
            launches = gemm.plan_gemm(y, [x], [conv1d], [s], [b.T], [None], meta(N), arch, config)
            yield from named(f"gemm Y [K,N] bias {tag}", launches, fast)
            few, one = meta(64, K), gemm.default_config(64, N, arch)
            launches = gemm.plan_gemm(
                meta(64, N), [few], [w], [meta(64, r)], [b.T], [None], None, arch, one
            )
            yield from named(f"gemm Y M64 {tag}", launches, fast)
    pointers = gemm.GemmConfig(128, 128, 32 if arch.shared < 160_000 else 64)
    odd = meta(M, K + 1)[:, :K]  # rows not aligned to 16 bytes, as no descriptor allows
    launches = gemm.plan_gemm(
        meta(M, N), [odd], [meta(N, K)], [meta(M, 16)], [meta(16, N)], [None], None, arch, pointers
    )
    yield from named("gemm Y pointers r16 bf16/bf16", launches)
    x, w, s, b = meta(M, K), meta(N, K), meta(M, 16), meta(N, 16, dtype=FP32)
    config, gain = gemm.default_config(M, N, arch, gain=True), meta(N, dtype=FP32)
    launches = gemm.plan_gemm(
        meta(M, N), [x], [w], [s], [b.T], [None], meta(N), arch, config, gain, meta(M, N)
    )
    yield from named("dora gemm Y V bias r16 bf16/fp32", launches, True)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("gemm", b.M, *b.Ns, b.K, b.r)


def _race_cases_dx(b: Bucket) -> Iterator[RaceCase]:
    for mask in (True, False):
        yield RaceCase("gemm_grad_input", b.M, *b.Ns, b.K, b.r, mask)


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (128, 256, 64, 16, 8, True, True, 8, 3), (128, 256, 64, 16, 8, True, False, 8, 3),
        (128, 256, 64, 16, 8, True, False, 8, 4), (128, 128, 64, 16, 8, True, True, 8, 4),
        (128, 128, 64, 16, 8, True, False, 4, 4), (128, 128, 128, 16, 8, True, False, 8, 3),
        (256, 128, 64, 16, 8, True, True, 8, 3), (128, 256, 64, 16, 16, True, True, 8, 3),
        (64, 256, 64, 16, 8, True, False, 4, 4), (64, 128, 64, 16, 8, True, False, 4, 4),
        (128, 128, 64, 16, 8, False, False, 8, 3), (64, 128, 64, 16, 8, False, False, 4, 4),
    ]  # fmt: skip
    names = "block_m block_n block_k block_r group_m tma flatten num_warps num_stages"
    keep = [r for r in rows if (r[0] <= case.m or r[0] <= 64) and (case.r <= 16 or not r[6])]
    return configs(gemm.GemmConfig, names, keep)


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    w = t.some(case.n, case.k, scale=case.k**-0.5)
    x, s, b = t.some(case.m, case.k), t.some(case.m, case.r), t.adapters(case.n, case.r)
    return (
        lambda c, i: [gemm.fused_linear(x[i], w[i], s[i], b[i], config=c)],
        lambda: [reference.linear(x[0], w[0], s[0], b[0])],
    )


def _contest_dx(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    w = t.some(case.n, case.k, scale=case.k**-0.5)
    dy, ds, a = t.some(case.m, case.n), t.some(case.m, case.r), t.adapters(case.r, case.k)

    def run(c: Any, i: int) -> list[Tensor]:
        return [gemm.fused_grad_input([dy[i]], [w[i]], [ds[i]], [a[i]], t.words, config=c)]

    return run, lambda: [reference.grad_input([dy[0]], [w[0]], [ds[0]], [a[0]], t.keeps)]


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    y, x, w, s, b = t("m", "n"), t("m", "k"), t("n", "k"), t("m", "r"), t.low("n", "r")
    return gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)


def _plan_dx(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    g = t.key.group
    dys, ws = [t("m", "n")] * g, [t("n", "k").T] * g
    ds, As = [t("m", "r")] * g, [t.low("r", "k")] * g
    return gemm.plan_gemm(t("m", "k"), dys, ws, ds, As, t.words(), None, arch, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    for tma in (False, True):
        config = gemm.GemmConfig(64, 64, 32, tma=tma, group_m=2, num_warps=4, num_stages=2)
        yield f"gemm tma={tma}", [gemm.fused_linear(o.x, o.w, o.s, o.b, config=config)]
        pairs = [[t, t] for t in (o.dy, o.w, o.s, o.a)]
        yield f"gemm dX tma={tma}", [gemm.fused_grad_input(*pairs, o.words, config=config)]
        conv1d = o(o.K, o.N).t()
        yield f"gemm [K, N] tma={tma}", [gemm.fused_linear(o.x, conv1d, o.s, o.b, config=config)]
        v, gain = torch.empty_like(o.dy), torch.rand(o.N, device=o.device)
        y = gemm.fused_linear(o.x, o.w, o.s, o.b, o(o.N), gain=gain, v=v, config=config)
        yield f"gemm with DoRA's gain tma={tma}", [y, v]
    flat = gemm.GemmConfig(64, 64, 32, tma=True, flatten=True, num_warps=4, num_stages=2)
    yield "gemm flattened", [gemm.fused_linear(o.x, o.w, o.s, o.b, config=flat)]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: gemm.fused_linear(o.x, o.w, o.s, o.b)
    yield lambda: gemm.fused_grad_input([o.dy], [o.w], [o.s], [o.a], o.words)


ENTRY = KernelEntry(
    traffic={"_gemm_kernel": _traffic},
    timing={"_gemm_kernel": Timing(pieces=_tiles)},
    cases=_cases,
    ops={
        "gemm": Raced("product", _race_cases, _candidates, _contest, _plan, matrix_bound=True),
        "gemm_grad_input": Raced(
            "product", _race_cases_dx, _candidates, _contest_dx, _plan_dx, matrix_bound=True
        ),
    },
    sanitize=_sanitize,
    counted=_counted,
)
