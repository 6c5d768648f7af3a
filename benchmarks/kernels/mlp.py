"""The entry of the kernel for an MLP's H and the S of the adapter that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from peftkern.kernels import fp8_rows, mlp, mlp_reference
from peftkern.kernels.common import Arch, Launch

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    BF16,
    DRAW,
    FP8_PRODUCTS,
    FP32,
    INT32,
    Bucket,
    Case,
    Drawn,
    Exact,
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
    tag,
)  # fmt: skip
from .traffic import (
    Facts,
    Traffic,
    copied,
    copy_operations,
    mask_operations,
    nbytes,
    total,
    unit_of,
)

WIDE = 14336  # inner width of Llama-8B's MLP


def _traffic(f: Facts) -> Traffic:
    gate, a, words, (blocks, _) = f["gate"], f["a"], f["words"], f["grid"]
    parts = f["grid"][1]
    drawn, seed = nbytes(words) if f["DIGITS"] else 0, nbytes(f["seed_ptr"])
    read = nbytes(gate) + nbytes(f["up"]) + nbytes(words) - drawn
    left, right = total(f["Ls"]), total(f["Rs"]) + nbytes(a)
    ranks = sum(f["l_ranks"]) + (0 if a is None else f["R"])
    return Traffic(
        "mlp", 1,
        read=read + left + right + seed,
        written=nbytes(f["h"]) + nbytes(f["s"]) + drawn + copied(f),
        flops=2 * f["M"] * f["K"] * ranks,
        unit=unit_of(gate.dtype),
        requested=read + left * parts + right * blocks + seed * parts * blocks,
    )  # fmt: skip


def _operations(f: Facts) -> int:
    return copy_operations(f) + mask_operations({**f, "words": (f["words"],)})


def launches(
    m: int, k: int, r: int, act: str, masked: bool, config: mlp.MlpConfig, *,
    up: bool = True, dtype: Any = BF16, adapter: Any = FP32, fp8: bool = False, added: bool = False,
    drawn: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; r is 0 without an adapter; H is fp8, or as G.

    ``added``: the low-rank parts of G and U are added too; ``drawn``: the mask is drawn.
    """
    a = meta(r, k, dtype=adapter) if r else None
    words = meta(m, -(-k // 32), dtype=INT32) if masked else None
    gate, h, s = (meta(m, c, dtype=dtype) for c in (k, k, r))
    other = meta(m, k, dtype=dtype) if up else None
    copy, h = (room(m, k), None) if fp8 else (None, h)
    pair = (meta(m, r, dtype=dtype), meta(k, r, dtype=adapter)) if added else None
    return mlp.plan_mlp(
        gate, other, act, h, a, words, 1.0, s if r else None, config, copy, (pair, pair),
        DRAW if drawn else None,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for m, r, masked, act, up, dtype in (
        (M, 16, True, "silu", True, BF16), (M, 16, False, "silu", True, BF16),
        (128, 16, True, "silu", True, BF16), (M, 0, False, "silu", True, BF16),
        (M, 64, True, "silu", True, BF16), (M, 128, True, "silu", True, BF16),
        (M, 16, True, "gelu_tanh", True, BF16), (M, 16, True, "gelu_tanh", False, BF16),
        (M, 16, True, "gelu", False, BF16), (M, 16, False, "relu", False, BF16),
        (M, 16, True, "silu", True, FP32),
    ):  # fmt: skip
        config = mlp.default_config(m, WIDE, r, arch, dtype.itemsize)
        what = f"{act}{'' if up else ' alone'} {tag(r, masked=masked, dtype=dtype)}"
        plan = launches(m, WIDE, r, act, masked, config, up=up, dtype=dtype)
        yield from named(f"mlp M{m} {what}", plan)
    for r, masked, added in (
        ((16, True, True), (16, False, True), (16, True, False), (0, False, False))
        if arch.capability == FP8_PRODUCTS
        else ()
    ):
        config = mlp.default_config(M, WIDE, r, arch, copied=True, crowded=masked and added)
        plan = launches(
            M, WIDE, r, "silu", masked, config, fp8=True, added=added, drawn=masked and added
        )
        what = " and low-rank parts" if added else ""
        yield from named(f"mlp with fp8{what} M{M} silu {tag(r, masked=masked)}", plan)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("mlp", b.M, 0, b.K, b.r, b.mask)


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (64, 64, 1, 4, 3), (64, 64, 4, 4, 2), (64, 64, 4, 4, 4), (32, 128, 2, 4, 3),
        (32, 64, 4, 4, 3), (32, 128, 4, 8, 3), (64, 128, 4, 8, 3), (64, 64, 8, 8, 3),
        (16, 128, 8, 4, 3), (16, 256, 16, 4, 3), (128, 64, 4, 8, 3),
    ]  # fmt: skip
    return configs(
        mlp.MlpConfig, "block_m block_k split_k num_warps num_stages",
        [r for r in rows if r[0] <= max(16, 2 * case.m)],
    )  # fmt: skip


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    gate, up = t.some(case.m, case.k), t.some(case.m, case.k)
    a, words = t.adapters(case.r, case.k), None if t.words is None else t.words[0]

    def run(c: Any, i: int) -> list[Tensor]:
        return list(mlp.mlp(gate[i], up[i], "silu", a[i], SCALE, words, config=c))  # type: ignore[arg-type]

    def exact() -> list[Tensor]:
        return list(mlp_reference.mlp(gate[0], up[0], "silu", a[0], SCALE, t.keeps[0]))  # type: ignore[arg-type]

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    k = t.key
    return launches(k.m, k.k, k.r, "silu", k.mask, config, dtype=t.dtype, adapter=t.adapter)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    up, wide = o(o.M, o.K), o(150, o.K, dtype=FP32)
    for split in (1, 2):
        config = mlp.MlpConfig(16, 32, split, 4, 2)
        found = mlp.mlp(o.x, up, "silu", o.a, 2.0, o.words, config=config)
        yield f"mlp split {split}", [t for t in found if t is not None]
    both = mlp.mlp(o.x, None, "gelu_tanh", wide, 2.0, o.words)
    yield "mlp, S of its own", [t for t in both if t is not None]
    gate, copy = o(o.M, 256), fp8_rows.empty(o.M, 256, o.x.device)
    mlp.mlp(gate, gate, "silu", copy=copy)
    yield "mlp with fp8", [copy.q.float(), copy.scales]
    pair = o(o.M, 5), o(256, 5, dtype=FP32)
    mlp.mlp(gate, gate, "silu", copy=copy, inner=(pair, pair))
    mlp.mlp(gate, gate, "silu", o(3, 256), 2.0, o.words.new_empty(o.M, 8), draw=DRAW, copy=copy)  # type: ignore[union-attr]
    yield "mlp with fp8 and a drawn mask", [copy.q.float(), copy.scales]
    yield "mlp with fp8 and low-rank parts", [copy.q.float(), copy.scales]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    up = o(o.M, o.K)
    yield lambda: mlp.mlp(o.x, up, "silu", o.a, 2.0, o.words)


ENTRY = KernelEntry(
    traffic={"_mlp_kernel": _traffic},
    timing={"_mlp_kernel": Timing(integers=_operations)},
    cases=_cases,
    ops={"mlp": Raced("mlp", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
