"""The entry of the kernel for a batch in which each sample names its adapter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.kernels import mixed
from peftkern.kernels.common import Arch, Launch

from .entry import (
    BF16,
    FP16,
    FP32,
    INT32,
    Case,
    K,
    KernelEntry,
    M,
    N,
    Operands,
    meta,
    named,
    tag,
)  # fmt: skip
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    """Traffic of a launch in the worst case, as the index that it depends on is data.

    In the worst case every tile meets as many of the largest adapters as it has samples.
    """
    x, w, index, ranks = f["x"], f["w"], f["index"], [r // 16 for r in f["ranks"]]
    M, N, K, T = f["M"], f["N"], f["K"], f["T"]
    tiles_m, tiles_n = cdiv(M, f["BLOCK_M"]), cdiv(N, f["BLOCK_N"])

    def lanes(rows: int) -> int:
        return sum(sorted(ranks)[-(cdiv(rows - 1, T) + 1) :])

    here, all_of = lanes(min(M, f["BLOCK_M"])), lanes(M)
    a, b = K * f["As"][0].element_size(), N * f["Bs"][0].element_size()
    walks = max(1, cdiv(here, f["BLOCK_R"]))  # X is walked once for each chunk of lanes
    once = nbytes(w) + nbytes(f["bias"])
    return Traffic(
        "mixed", 1,
        read=nbytes(x) + once + nbytes(index) + all_of * (a + b),
        written=nbytes(f["y"]),
        flops=2 * M * N * K + 2 * M * here * (K * tiles_n + N),
        unit=unit_of(x.dtype),
        requested=tiles_n * (walks * nbytes(x) + nbytes(index) + tiles_m * here * a)
        + tiles_m * (once + here * b),
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    """Cases of decoding 1 and 16 samples and of the prefill of 8."""
    for m, samples, ranks, dtype, adapter in (
        (1, 1, (16,), BF16, FP32),
        (1, 1, (16,) * 4, BF16, FP32),
        (16, 16, (16,), BF16, FP32),
        (16, 16, (8, 16, 32, 64), BF16, FP32),
        (16, 16, (16,) * 8, BF16, BF16),
        (16, 16, (256,) * 8, BF16, FP32),
        (16, 16, (64,) * 64, BF16, FP32),
        (16, 16, (8, 16, 32, 64), FP32, FP32),
        (48, 48, (16,) * 8, BF16, FP32),
        (M, 8, (16,), BF16, FP32),
        (M, 8, (8, 16, 32, 64), BF16, FP32),
        (M, 8, (16,) * 8, FP16, FP16),
        (M, 8, (128,) * 8, BF16, FP32),
        (M, M // 16, (16,) * 8, BF16, FP32),  # many short samples: a tile meets many adapters
        (M, 8, (8, 16, 32, 64), FP32, FP32),
    ):
        As = [meta(r, K, dtype=adapter) for r in ranks]
        Bs = [meta(N, r, dtype=adapter) for r in ranks]
        several = "x".join(map(str, sorted(set(ranks))))
        dtypes = tag(0, 1, False, dtype, adapter).removeprefix("r0 ")
        name = f"mixed M{m} T{m // samples} L{len(ranks)} r{several} {dtypes}"
        x, w = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype)
        launches = _launches(arch, x, w, As, Bs, samples, None)
        yield from named(name, launches, m == M and dtype != FP32)
    # slices of longer rows, none aligned to 16 bytes, so that no load can be 16 bytes wide
    for m, samples in ((16, 16), (M, 8)):
        x, w = meta(m, K + 1)[:, :K], meta(K, N + 1)[:, :N].T
        As = [meta(r, K + 1, dtype=FP32)[:, :K] for r in (8, 24)]
        Bs = [meta(N, 32, dtype=FP32)[:, :r] for r in (8, 24)]
        launches = _launches(arch, x, w, As, Bs, samples, meta(N))
        yield from named(f"mixed M{m} T{m // samples} L2 slices [K,N] bias", launches)


def _launches(
    arch: Arch,
    x: Tensor,
    w: Tensor,
    As: list[Tensor],
    Bs: list[Tensor],
    samples: int,
    bias: Tensor | None,
) -> list[Launch]:
    m = x.shape[0]
    config = mixed.default_config(
        m, N, m // samples, [a.shape[0] for a in As], arch,
        itemsize=x.element_size(), adapter_itemsize=As[0].element_size(),
        aligned=mixed.rows_aligned(x, *As),
    )  # fmt: skip
    y, index = meta(m, N, dtype=x.dtype), meta(samples, dtype=INT32)
    return mixed.plan_mixed(y, x, w, As, Bs, [1.0] * len(As), index, bias, config)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    As = [o.a, o(20, o.K, dtype=FP32), None]
    Bs = [o.b, o(o.N, 20, dtype=FP32), None]
    for samples, choice in ((1, [1]), (4, [1, -1, 0, 7]), (36, [1, -1, 0, 2] * 9)):
        index = torch.tensor(choice, dtype=torch.int32, device=o.device)  # 7: no such adapter
        for rows in dict.fromkeys((samples, 36)):
            config = mixed.MixedConfig(16, 32, 32, 16, group_m=2)
            y = mixed.mixed(o.x[:rows], o.w, As, Bs, [2.0] * 3, index, config=config)
            yield f"mixed M={rows} of {samples} samples", [y]


ENTRY = KernelEntry(traffic={"_mixed_kernel": _traffic}, cases=_cases, sanitize=_sanitize)
