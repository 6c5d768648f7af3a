"""The entry of the kernels for a batch in which each sample names its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import mixed, reference
from peftkern.kernels.common import Arch, Launch, next_pow2, padded, parts_dtype
from peftkern.kernels.mixed_config import MixedConfig, default_config, most_tiles

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    BF16,
    FP16,
    FP32,
    INT32,
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
    tag,
)  # fmt: skip
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


def _low(f: Facts, programs: int) -> Traffic:
    """What the programs for S do: at most, as the index that it depends on is data.

    In the worst case every sample names another adapter, the largest ones, or the largest adapter
    alone where it fills more tiles: each tile of a segment reads its A, each chunk of ranks its
    rows of X. The index is read twice by every program. The selects are no traffic.
    """
    x, index, ranks = f["x"], f["index"], sorted((r // 16 for r in f["ranks"]), reverse=True)
    K, item = f["K"], f["As"][0].element_size()
    M, L, samples = f["M"], min(f["L"], f["samples"]), f["samples"]
    lanes = sum(ranks[:L])
    again = (most_tiles(M, L, samples, f["BLOCK_S"]) - L) * max(ranks)
    s = 4 * M * f["width"] * f["LOW_SPLITS"]
    return Traffic(
        "segments", 1,
        read=nbytes(x) + nbytes(index) + lanes * K * item,
        written=s + 24 * L,
        flops=2 * f["BLOCK_S"] * K * (lanes + again),
        unit=unit_of(x.dtype),
        requested=nbytes(x) * f["CHUNKS"] + (lanes + again) * K * item
        + 2 * nbytes(index) * programs,
    )  # fmt: skip


def _segments(f: Facts) -> Traffic:
    return _low(f, f["grid"][0])


def _parts(f: Facts) -> Traffic:
    x, w, (M, N, K) = f["x"], f["w"], (f["M"], f["N"], f["K"])
    tiles_m, tiles_n = cdiv(M, f["BLOCK_M"]), cdiv(N, f["BLOCK_N"])
    base = Traffic(
        "parts", 1,
        read=nbytes(x) + nbytes(w),
        written=nbytes(f["parts"]) + nbytes(f["factors"]),
        flops=2 * M * N * K,
        unit=unit_of(x.dtype),
        requested=tiles_n * nbytes(x) + tiles_m * nbytes(w),
    )  # fmt: skip
    if not f["LOW_PROGRAMS"]:
        return base
    low = _low(f, f["LOW_PROGRAMS"])
    return base._replace(
        read=base.read + low.read - nbytes(x),
        written=base.written + low.written,
        flops=base.flops + low.flops,
        requested=base.requested + low.requested,
    )


def _updates(f: Facts, tiles_m: int, tiles_n: int) -> Traffic:
    """What the tiles of Y add: S, and B of the adapters that a tile's rows name, at most.

    The ranks are not the launch's to see, so each is taken to be the largest.
    """
    M, N, T, rank = f["M"], f["N"], f["T"], f["width"]
    s, b = 4 * M * rank * f["LOW_SPLITS"], rank * N * f["b"].element_size()

    def named(rows: int) -> int:
        return min(f["L"], cdiv(rows - 1, T) + 1) if rank else 0

    here = named(min(M, f["BLOCK_M"]))
    return Traffic(
        "updates", 1,
        read=s + named(M) * b + nbytes(f["bias"]) + nbytes(f["index"]) + 24 * named(M),
        written=nbytes(f["y"]),
        flops=2 * M * N * rank * here,
        requested=tiles_n * (s + tiles_m * here * 24 + 4 * M)
        + tiles_m * (here * b + nbytes(f["bias"])),
    )  # fmt: skip


def _finish(f: Facts) -> Traffic:
    tiles_n = cdiv(f["N"], f["BLOCK_N"])
    parts, factors = nbytes(f["parts"]), nbytes(f["factors"])
    found = _updates(f, cdiv(f["M"], f["BLOCK_M"]), tiles_n)
    # a tile reads the factors of its rows, which some tiles side by side share
    again = tiles_n * f["SPLITS"] * f["M"] * 4 if factors else 0
    return found._replace(
        name="finish", read=found.read + parts + factors, unit=unit_of(f["y"].dtype),
        requested=found.requested + parts + again,
    )  # fmt: skip


def _product(f: Facts) -> Traffic:
    x, w = nbytes(f["x"]), nbytes(f["w"])
    tiles_m, tiles_n = cdiv(f["M"], f["BLOCK_M"]), cdiv(f["N"], f["BLOCK_N"])
    found = _updates(f, tiles_m, tiles_n)
    return found._replace(
        name="product", read=found.read + x + w, unit=unit_of(f["y"].dtype),
        flops=found.flops + 2 * f["M"] * f["N"] * f["K"],
        requested=found.requested + tiles_n * x + tiles_m * w,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    """Cases of decoding 1 and 16 samples and of the prefill of 8."""
    for m, samples, ranks, dtype, adapter in (
        (1, 1, (16,), BF16, FP32),
        (1, 1, (16,) * 4, BF16, FP32),
        (16, 16, (16,), BF16, FP32),
        (16, 16, (8, 16, 32, 64), BF16, FP32),
        (16, 16, (16,) * 8, BF16, BF16),
        (16, 16, (16,) * 8, BF16, FP32),
        (16, 16, (16,) * 2, BF16, FP32),
        (16, 16, (5, 12), BF16, FP32),  # rows of B are no multiple of 16 bytes
        (16, 16, (3, 5, 20, 33), BF16, BF16),
        (16, 16, (256,) * 8, BF16, FP32),
        (16, 16, (64,) * 64, BF16, FP32),
        (16, 16, (8, 16, 32, 64), FP32, FP32),
        (48, 48, (16,) * 8, BF16, FP32),
        (256, 256, (16,) * 8, BF16, FP32),
        (256, 256, (5,) * 8, BF16, FP32),
        (256, 16, (8, 256) * 32, BF16, BF16),
        (M, 8, (16,), BF16, FP32),
        (M, 8, (8, 16, 32, 64), BF16, FP32),
        (M, 8, (16,) * 8, FP16, FP16),
        (M, 8, (3, 5, 20, 33), BF16, FP32),
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
    config = default_config(
        m, N, K, m // samples, [a.shape[0] for a in As], arch,
        itemsize=x.element_size(), adapter_itemsize=As[0].element_size(),
        part_itemsize=parts_dtype(x.dtype).itemsize,
        aligned=mixed.rows_aligned(x, *As),
    )  # fmt: skip
    y, index = meta(m, N, dtype=x.dtype), meta(samples, dtype=INT32)
    return mixed.plan_mixed(y, x, w, As, Bs, [1.0] * len(As), index, bias, config, arch)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    if b.M >= 8 and len(b.Ns) == 1:  # a row and more of each of eight adapters
        yield RaceCase("mixed_rows", b.M, *b.Ns, b.K, b.r, group=8)


def _candidates(case: RaceCase) -> list[Any]:
    names = "block_n block_k split_k low_split finish_n num_warps num_stages"
    rows = [(512, 64, 8, 2, 64, 8, 3), (256, 64, 8, 2, 64, 4, 3),
            (256, 64, 8, 2, 64, 8, 3), (256, 64, 16, 2, 64, 4, 3),
            (128, 128, 4, 2, 64, 4, 3), (128, 64, 8, 4, 32, 4, 4), (128, 128, 8, 1, 128, 4, 2),
            (64, 128, 4, 2, 64, 4, 4), (64, 128, 2, 4, 32, 4, 4), (32, 128, 2, 4, 32, 4, 4),
            (32, 256, 1, 4, 64, 4, 4), (16, 256, 1, 4, 64, 4, 4)]  # fmt: skip
    held = dict(block_r=min(64, padded(case.r)), block_l=min(128, next_pow2(8 * padded(case.r))))
    return [replace(c, **held) for c in configs(MixedConfig, names, rows)]


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    w = t.some(case.n, case.k, scale=case.k**-0.5)
    x, L = t.some(case.m, case.k), case.group
    a = [t.adapters(case.r, case.k) for _ in range(L)]
    b = [t.adapters(case.n, case.r) for _ in range(L)]
    choice, scales = [m % L for m in range(case.m)], [SCALE] * L
    index = torch.tensor(choice, dtype=INT32, device=x[0].device)
    one = ([t[0] for t in a], [t[0] for t in b])

    def run(config: Any, i: int) -> list[Tensor]:
        As, Bs = [t[i] for t in a], [t[i] for t in b]
        return [mixed.mixed(x[i], w[i], As, Bs, scales, index, config=config)]

    return run, lambda: [reference.mixed(x[0], w[0], *one, scales, choice)]


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    As, Bs = [t.low("r", "k")] * t.key.group, [t.low("n", "r")] * t.key.group
    y, index = t("m", "n"), meta(t.key.m, dtype=INT32)
    scales = [1.0] * t.key.group
    return mixed.plan_mixed(y, t("m", "k"), t("n", "k"), As, Bs, scales, index, None, config, arch)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    As = [o.a, o(20, o.K, dtype=FP32), None]
    Bs = [o.b, o(o.N, 20, dtype=FP32), None]
    for samples, choice in ((1, [1]), (4, [1, -1, 0, 7]), (36, [1, -1, 0, 2] * 9)):
        index = torch.tensor(choice, dtype=torch.int32, device=o.device)  # 7: no such adapter
        for rows, split in ((samples, 1), (36, 1), (36, 3)):
            config = MixedConfig(16, 32, 32, split_k=split, low_k=32, low_split=2)
            y = mixed.mixed(o.x[:rows], o.w, As, Bs, [2.0] * 3, index, config=config)
            yield f"mixed M={rows} of {samples} samples, K in {split}", [y]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    index = torch.arange(16, dtype=INT32, device=o.device) % 8
    As, Bs = [o(o.r, o.K) for _ in range(8)], [o(o.N, o.r) for _ in range(8)]
    yield lambda: mixed.mixed(o.x[:16], o.w, As, Bs, [1.0] * 8, index)


ENTRY = KernelEntry(
    traffic={
        "_segment_kernel": _segments,
        "_parts_kernel": _parts,
        "_finish_kernel": _finish,
        "_product_kernel": _product,
    },
    timing={"_finish_kernel": Timing(near=True)},
    cases=_cases,
    ops={"mixed_rows": Raced("few", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
