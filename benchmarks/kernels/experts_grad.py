"""The entry of the kernels for the gradients of a mixture's factors, from its sorted rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_grad
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.experts_grad import ExpertsGradConfig
from peftkern.kernels.experts_route import route
from peftkern.kernels.reference import pack_bits

from .entry import BF16, FP32, INT32, Case, KernelEntry, Operands, Timing, meta, named
from .experts import LAYERS, Layer, meta_route
from .experts_races import GRAD
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


def _pairs(f: Facts) -> tuple[int, int]:
    """(bytes of the pairs and their weights, those that one program loads for a row)."""
    weight = 0 if f["weights"] is None else f["weights"].element_size()
    named = f["GATHER"] or weight
    looks = 4 * f["GATHER"] + (4 if weight else 0)
    return f["pairs"].shape[0] * (4 * bool(named) + weight), looks + weight


def _rows(f: Facts) -> int:
    """Rows that are loaded, at most: an expert's last row is repeated to the end of a block."""
    P, experts = f["pairs"].shape[0], f["grid"][1]
    return P + min(P, experts) * (f["BLOCK_M"] - 1)


def _grad_sb(f: Facts) -> Traffic:
    dy, b, s, (blocks, experts) = f["dy"], f["b"], f["s"], f["grid"]
    P, N, R, (pairs, looks) = f["P"], f["N"], f["R"], _pairs(f)
    return Traffic(
        "experts_grad_sb", 1,
        read=nbytes(dy) + nbytes(b) + nbytes(s) + pairs + nbytes(f["offsets"]),
        written=nbytes(f["ds_out"]) + nbytes(f["db_out"]),
        flops=4 * P * N * R,
        unit=unit_of(dy.dtype),
        requested=_rows(f) * (N * dy.element_size() + blocks * looks) + nbytes(b)
        + blocks * (nbytes(s) + 8 * experts),
    )  # fmt: skip


def _grad_a(f: Facts) -> Traffic:
    x, ds, words, (blocks, experts, chunks) = f["x"], f["ds"], f["words"], f["grid"]
    P, K, R, (pairs, looks) = f["pairs"].shape[0], f["K"], f["R"], _pairs(f)
    return Traffic(
        "experts_grad_a", 1,
        read=nbytes(x) + nbytes(ds) + nbytes(words) + pairs + nbytes(f["offsets"]),
        written=nbytes(f["out"]),
        flops=2 * P * K * R,
        unit=unit_of(x.dtype),
        requested=chunks * (_rows(f) * (K * x.element_size() + blocks * looks) + nbytes(words))
        + blocks * (nbytes(ds) + chunks * 8 * experts),
    )  # fmt: skip


def _integers(f: Facts) -> int:
    """A word's 32 bits take two operations each to become columns."""
    return 0 if f["words"] is None else 16 * nbytes(f["words"]) * f["grid"][2]


def grad_sb_launches(
    layer: Layer, N: int, r: int, arch: Arch, *,
    gather: bool = True, dtype: torch.dtype = BF16, adapter: torch.dtype = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors: B and dB as PEFT has them, with weights if dY is
    gathered."""
    where = meta_route(layer)
    P, E = where.P, layer.experts
    dy, s, ds = (
        meta(layer.T if gather else P, N, dtype=dtype),
        *(meta(P, r, dtype=dtype) for _ in range(2)),
    )
    b, db = (meta(N, r, E, dtype=d).permute(2, 0, 1) for d in (adapter, FP32))
    weights = meta(P, dtype=dtype) if gather else None
    given = dy, where, b, s, 1.0, gather, weights, ds, db
    if r > experts_grad.ONE_PASS_RANK:
        return experts_grad.plan_two_pass(*given, arch)
    config = experts_grad.default_config(
        P, N, r, E, arch, dtype.itemsize, one_pass=True, indirect=gather
    )
    return experts_grad.plan_grad_sb(*given, config)


def grad_a_launches(
    layer: Layer, K: int, r: int, arch: Arch, *,
    gather: bool = True, masked: bool = False, dtype: torch.dtype = BF16,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors, with weights if X is of sorted rows."""
    where = meta_route(layer)
    P, E = where.P, layer.experts
    x, ds = meta(layer.T if gather else P, K, dtype=dtype), meta(P, r, dtype=dtype)
    words = meta(P, cdiv(K, 32), dtype=INT32) if masked else None
    weights = None if gather else meta(P, dtype=dtype)
    config = experts_grad.default_config(
        P, K, r, E, arch, dtype.itemsize, masked=masked, indirect=True
    )
    out = meta(E, r, K, dtype=FP32)
    return experts_grad.plan_grad_a(ds, x, where, gather, weights, words, out, config)


def _cases(arch: Arch) -> Iterator[Case]:
    qwen = LAYERS["qwen3"]
    for name, r, options in (
        ("gather r16", 16, {}), ("rows r16", 16, dict(gather=False)), ("gather r64", 64, {}),
        ("gather r128", 128, {}), ("gather r16 bf16/bf16", 16, dict(adapter=BF16)),
        ("gather r16 fp32/fp32", 16, dict(dtype=FP32)),
    ):  # fmt: skip
        plan = grad_sb_launches(qwen, 2048, r, arch, **options)
        yield from named(f"experts_grad_sb qwen3 {name}", plan)
    for layer in ("gpt-oss", "mixtral"):
        found = LAYERS[layer]
        plan = grad_sb_launches(found, 2 * found.inner, 16, arch, gather=False)
        yield from named(f"experts_grad_sb {layer} rows r16", plan)
    few = LAYERS["few"]
    yield from named("experts_grad_sb few gather r16", grad_sb_launches(few, 2048, 16, arch))
    few_rows = grad_a_launches(few, 768, 16, arch, gather=False, masked=True)
    yield from named("experts_grad_a few rows r16 mask", few_rows)
    for name, K, r, options in (
        ("gather r16", 2048, 16, {}), ("gather r16 mask", 2048, 16, dict(masked=True)),
        ("rows r16 mask", 768, 16, dict(gather=False, masked=True)),
        ("gather r64 mask", 2048, 64, dict(masked=True)), ("gather r128", 2048, 128, {}),
        ("gather r16 fp32/fp32", 2048, 16, dict(dtype=FP32)),
    ):  # fmt: skip
        plan = grad_a_launches(qwen, K, r, arch, **options)
        yield from named(f"experts_grad_a qwen3 {name}", plan)
    for layer in ("gpt-oss", "mixtral"):
        found = LAYERS[layer]
        plan = grad_a_launches(found, found.width, 16, arch, masked=True)
        yield from named(f"experts_grad_a {layer} gather r16 mask", plan)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) ** 2 % 5  # some are elsewhere
    where = route(index, 4, 16)
    used = int(where.offsets[-1])
    s, w = o(2 * o.M, o.r), o(2 * o.M)
    config = ExpertsGradConfig(16, 32, 4, 2)
    for r, what in ((o.r, "one pass"), (100, "two passes")):
        b, own = o(4, o.N, r, dtype=FP32), o(2 * o.M, r)
        ds, db = experts_grad.grad_sb(
            o.dy, where, b, own, 2.0, gather=True, row_weight=w, config=config
        )
        yield f"experts_grad_sb, {what}", [ds[:used], db]
    bits = pack_bits(o(2 * o.M, o.K) > 0)
    da = experts_grad.grad_a(s, o.x, where, gather=True, bits=bits, config=config)
    yield "experts_grad_a", [da]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    where = route(torch.arange(2 * o.M, device=o.device).view(-1, 2) % 8, 8, 64)
    b, s, w = o(8, o.N, o.r, dtype=FP32), o(2 * o.M, o.r), o(2 * o.M)
    yield lambda: experts_grad.grad_sb(o.dy, where, b, s, 2.0, gather=True, row_weight=w)
    yield lambda: experts_grad.grad_a(s, o.x, where, gather=True)


ENTRY = KernelEntry(
    traffic={"_experts_grad_sb_kernel": _grad_sb, "_experts_grad_a_kernel": _grad_a},
    timing={
        "_experts_grad_sb_kernel": Timing(streams=True),
        "_experts_grad_a_kernel": Timing(integers=_integers),
    },
    cases=_cases,
    ops=GRAD,
    sanitize=_sanitize,
    counted=_counted,
)
