"""The entry of the kernel for the gradients through an MLP's H."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import fp8_rows, mlp_grad, mlp_reference
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.mlp_arguments import MlpGrads, MlpMember

from ..gpu.contest import SCALE, RaceCase
from .entry import (
    BF16,
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
from .mlp import WIDE
from .traffic import Facts, Traffic, copied, copy_operations, nbytes, total, unit_of

ALL = (True, True, True)  # adapters of gate, up and down


def _traffic(f: Facts) -> Traffic:
    dh, words, (strips, split) = f["dh"], f["words"], f["grid"]
    streamed = nbytes(dh) + nbytes(f["gate"]) + nbytes(f["up"]) + nbytes(words)
    # each strip reads S and dS of all rows, each part of the rows B of its strip
    rows, columns = total(f["Ss"]) + nbytes(f["ds"]), 0
    ranks = f["R"] if f["da_out"] is not None else 0
    for b, ds, db, r in zip(f["Bs"], f["ds_outs"], f["db_outs"], f["ranks"], strict=True):
        columns += nbytes(b) if ds is not None else 0
        ranks += r * ((ds is not None) + (db is not None) + f["ADD"])
    if f["a"] is not None:  # dS is counted above
        columns += nbytes(f["a"])
        ranks += f["R"]
    outs = (f["dgate"], f["dup"], f["h"], *f["ds_outs"], *f["db_outs"], f["da_out"])
    return Traffic(
        "mlp_grad", 1,
        read=streamed + rows + columns,
        written=total(outs) + copied(f),
        flops=2 * f["M"] * f["K"] * ranks,
        unit=unit_of(dh.dtype),
        requested=streamed + rows * strips + columns * split,
    )  # fmt: skip


def launches(
    m: int, k: int, r: int, act: str, masked: bool, config: mlp_grad.MlpGradConfig, arch: Arch, *,
    adapters: tuple[bool, bool, bool] = ALL, up: bool = True,
    dtype: torch.dtype = BF16, adapter: torch.dtype = FP32, fp8: bool = False, added: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; ``adapters`` says which of the three have one.

    ``added``: the low-rank parts of dH, G and U are added too.
    """
    dh, gate, dgate = (meta(m, k, dtype=dtype) for _ in range(3))
    other, dup = (meta(m, k, dtype=dtype) if up else None for _ in range(2))
    members = [
        MlpMember(meta(k, r, dtype=adapter), meta(m, r, dtype=dtype), 1.0) if there else None
        for there in adapters[:2]
    ]
    ds = meta(m, r, dtype=dtype) if adapters[2] else None
    words = meta(m, -(-k // 32), dtype=INT32) if masked and adapters[2] else None
    copies: tuple[Any, Any] = (None, None)
    if fp8:
        whole = room(m, 2 * k)
        copies = whole.columns(0, k), whole.columns(k, 2 * k)
    if fp8 and all(mlp_grad.ways(r, dtype.itemsize, arch)):
        dgate = dup = None  # type: ignore[assignment]
    out = MlpGrads(
        dgate, dup,
        [meta(m, r, dtype=dtype) if there else None for there in adapters[:2]],
        [meta(k, r, dtype=adapter) if there else None for there in adapters[:2]],
        meta(r, k, dtype=adapter) if adapters[2] else None,
    )  # fmt: skip
    return mlp_grad.plan_mlp_grad(
        dh, gate, other, act, members, ds, words, out, config, arch, copies,
        meta(r, k, dtype=adapter) if added else None, added,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    gate, down, none = (True, False, True), (False, False, True), (False, False, False)
    for m, r, masked, act, up, adapters, dtype in (
        (M, 16, True, "silu", True, ALL, BF16), (M, 16, False, "silu", True, ALL, BF16),
        (128, 16, True, "silu", True, ALL, BF16), (M, 32, True, "silu", True, ALL, BF16),
        (M, 64, True, "silu", True, ALL, BF16), (M, 128, True, "silu", True, ALL, BF16),
        (M, 16, True, "gelu_tanh", True, ALL, BF16), (M, 16, True, "gelu_tanh", False, gate, BF16),
        (M, 16, True, "gelu", False, gate, BF16), (M, 16, False, "relu", False, gate, BF16),
        (M, 16, True, "silu", True, down, BF16), (M, 16, False, "silu", True, none, BF16),
        (M, 16, True, "silu", True, ALL, FP32),
    ):  # fmt: skip
        ranks = r if any(adapters) else 0
        config = mlp_grad.default_config(m, WIDE, ranks, arch, dtype.itemsize, masked)
        who = "".join(c for c, there in zip("gud", adapters, strict=True) if there) or "frozen"
        plan = launches(
            m, WIDE, r, act, masked, config, arch, adapters=adapters, up=up, dtype=dtype
        )
        name = f"mlp_grad M{m} {act}{'' if up else ' alone'} {who}"
        yield from named(f"{name} {tag(r, masked=masked, dtype=dtype)}", plan)
    for r, masked, added in (
        ((16, True, True), (16, False, True), (16, True, False), (64, True, False))
        if arch.capability == FP8_PRODUCTS
        else ()
    ):
        config = mlp_grad.default_config(M, WIDE, r, arch, 2, masked, copied=True)
        plan = launches(M, WIDE, r, "silu", masked, config, arch, fp8=True, added=added)
        what = " and low-rank parts" if added else ""
        yield from named(f"mlp_grad with fp8{what} M{M} silu {tag(r, masked=masked)}", plan)


def _race_cases(b: Bucket) -> Iterator[RaceCase]:
    yield RaceCase("mlp_grad", b.M, 0, b.K, b.r, b.mask)


def _candidates(case: RaceCase) -> list[Any]:
    rows = [
        (32, 128, 1, 16, 3), (32, 128, 7, 16, 3), (32, 128, 7, 16, 2), (64, 128, 7, 16, 3),
        (32, 128, 7, 8, 3), (32, 128, 7, 8, 4), (64, 64, 4, 8, 3), (32, 64, 4, 8, 3),
        (16, 256, 4, 8, 3), (16, 128, 7, 8, 4),
    ]  # fmt: skip
    return configs(
        mlp_grad.MlpGradConfig, "block_m block_k split_m num_warps num_stages",
        [r for r in rows if r[0] <= max(16, 2 * case.m)],
    )  # fmt: skip


def _flat(found: Any) -> list[Tensor]:
    """The gradients as one list, without those that are not wanted."""
    dgate, dup, ds, db, da = found
    return [t for t in (dgate, dup, *ds, *db, da) if t is not None]


def _contest(case: RaceCase, t: Drawn) -> tuple[Run, Exact]:
    dh, gate, up = (t.some(case.m, case.k) for _ in range(3))
    bs = [t.adapters(case.k, case.r) for _ in range(2)]
    ss = [t.some(case.m, case.r) for _ in range(3)]
    words = None if t.words is None else t.words[0]

    def members(i: int) -> list[MlpMember | None]:
        return [MlpMember(b[i], s[i], SCALE) for b, s in zip(bs, ss, strict=False)]

    def run(c: Any, i: int) -> list[Tensor]:
        return _flat(
            mlp_grad.mlp_grad(dh[i], gate[i], up[i], "silu", members(i), ss[2][i], words, config=c)
        )

    def exact() -> list[Tensor]:
        (dgate, dup), *rest = mlp_reference.mlp_grad(
            dh[0], gate[0], up[0], "silu", members(0), ss[2][0], t.keeps[0]
        )
        return _flat((dgate, dup, *rest))

    return run, exact


def _plan(t: TableTensors, config: Any, arch: Arch) -> list[Launch]:
    k = t.key
    return launches(k.m, k.k, k.r, "silu", k.mask, config, arch, dtype=t.dtype, adapter=t.adapter)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    dh, up = o(o.M, o.K), o(o.M, o.K)
    for split, r in ((1, 5), (2, 5), (1, 150)):
        pairs = [(o(o.K, r, dtype=FP32), o(o.M, r)) for _ in range(2)]
        members = [MlpMember(b, s, 2.0) for b, s in pairs]
        config = mlp_grad.MlpGradConfig(16, 32, split, 4, 2)
        found = mlp_grad.mlp_grad(dh, o.x, up, "silu", members, o(o.M, r), o.words, config=config)
        yield f"mlp_grad r{r} split {split}", _flat(found)
    wide, whole = o(o.M, 256), fp8_rows.empty(o.M, 512, o.x.device)
    copies = whole.columns(0, 256), whole.columns(256, 512)
    mlp_grad.mlp_grad(wide, wide, wide, "silu", copies=copies)
    yield "mlp_grad with fp8", [whole.q.float(), whole.scales]
    pairs = [(o(256, 5, dtype=FP32), o(o.M, 5)) for _ in range(2)]
    low, a = o(o.M, 5), o(5, 256, dtype=FP32)
    mlp_grad.mlp_grad(
        wide, wide, wide, "silu", [MlpMember(b, s, 2.0) for b, s in pairs], low,
        copies=copies, a=a, add=True,
    )  # fmt: skip
    yield "mlp_grad with fp8 and low-rank parts", [whole.q.float(), whole.scales]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    dh, up, b = o(o.M, o.K), o(o.M, o.K), o(o.K, o.r, dtype=FP32)
    members = [MlpMember(b, o.s, 2.0)] * 2
    yield lambda: mlp_grad.mlp_grad(dh, o.x, up, "silu", members, o.s, o.words)


ENTRY = KernelEntry(
    traffic={"_mlp_grad_kernel": _traffic},
    timing={"_mlp_grad_kernel": Timing(integers=copy_operations)},
    cases=_cases,
    ops={"mlp_grad": Raced("mlp", _race_cases, _candidates, _contest, _plan)},
    sanitize=_sanitize,
    counted=_counted,
)
