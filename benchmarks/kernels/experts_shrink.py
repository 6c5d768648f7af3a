"""The entry of the kernel for S, or dS, of the sorted rows of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_shrink
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.experts_route import most_tiles, route
from peftkern.kernels.reference import pack_bits

from .entry import BF16, FP32, INT32, Case, KernelEntry, Operands, Timing, meta, named
from .experts import LAYERS, Layer, meta_route
from .experts_races import SHRINK
from .traffic import Facts, Traffic, cdiv, nbytes, once, total, unit_of


def _traffic(f: Facts) -> Traffic:
    """At most: which rows are in which group is data.

    X is read once from memory, and by every program that gathers a row of it. A program reads A of
    its group; in the worst routing almost every group has a tile that is not full.
    """
    x, As, words, (blocks, split, chunks) = f["x"], f["As"], f["words"], f["grid"]
    P, K, width = f["P"], f["K"], f["width"]
    tiles = most_tiles(P, f["offsets"].shape[0] - 1, f["BLOCK_M"])
    again = split * chunks  # programs of a tile
    pairs = 4 if f["GATHER"] else 0
    largest = max(nbytes(a) // a.shape[0] for a in As)  # of an expert
    return Traffic(
        "experts_shrink", 1,
        read=nbytes(x) + once(As) + nbytes(words)
        + pairs * P + total(f[n] for n in ("offsets", "tile_group", "tile_start")),
        written=split * P * width * f["out"].element_size(),
        flops=2 * P * K * width,
        unit=unit_of(x.dtype),
        requested=P * K * x.element_size() * chunks + tiles * largest
        + nbytes(words) * chunks + (pairs * tiles * f["BLOCK_M"] + 12 * blocks) * again,
    )  # fmt: skip


def _integers(f: Facts) -> int:
    """A word's 32 bits take two operations each to become columns."""
    return 64 * f["P"] * f["WORDS"] * f["grid"][2] if f["words"] is not None else 0


def launches(
    layer: Layer, K: int, r: int, arch: Arch, *,
    gather: bool = True, masked: bool = False, layout: str = "a", adapters: int = 1,
    dtype: torch.dtype = BF16, adapter: torch.dtype = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; with layout "b" A is PEFT's B, transposed."""
    where = meta_route(layer, adapters)
    x = meta(layer.T if gather else where.P, K, dtype=dtype)
    a = (
        meta(layer.experts, r, K, dtype=adapter) if layout == "a"
        else meta(K, r, layer.experts, dtype=adapter).permute(2, 1, 0)
    )  # fmt: skip
    words = meta(where.P, cdiv(K, 32), dtype=INT32) if masked else None
    config = experts_shrink.default_config(
        where.P, K, r, where.groups, where.block_m, arch, dtype.itemsize
    )
    out, several = meta(where.P, r, dtype=dtype), [a] * adapters
    return experts_shrink.plan_shrink(
        x, where, several, [1.0] * adapters, gather, words, out, config
    )


def _cases(arch: Arch) -> Iterator[Case]:
    for name, options in (
        ("gather r16", dict(r=16)), ("gather r16 mask", dict(r=16, masked=True)),
        ("rows r16 mask", dict(r=16, masked=True, gather=False)),
        ("rows r16 of B", dict(r=16, gather=False, layout="b")),
        ("gather r64 mask", dict(r=64, masked=True)), ("gather r128", dict(r=128)),
        ("gather r16 bf16/bf16", dict(r=16, adapter=BF16)),
        ("gather r16 L4", dict(r=16, adapters=4)),
        ("gather r16 fp32/fp32", dict(r=16, dtype=FP32)),
    ):  # fmt: skip
        plan = launches(LAYERS["qwen3"], 2048, arch=arch, **options)
        yield from named(f"experts_shrink qwen3 {name}", plan)
    for layer in ("few", "mixtral"):
        plan = launches(LAYERS[layer], 2048, 16, arch)
        yield from named(f"experts_shrink {layer} gather r16", plan)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) ** 2 % 5  # some are elsewhere
    a = o(4, o.r, o.K, dtype=FP32)
    where = route(index, 4, 16)
    used = int(where.offsets[-1])
    bits = pack_bits(o(2 * o.M, o.K) > 0)
    for split in (1, 2):
        config = experts_shrink.ExpertsShrinkConfig(16, 32, split, 4, 2)
        s = experts_shrink.shrink(o.x, where, [a], 2.0, gather=True, bits=bits, config=config)
        yield f"experts_shrink split {split}", [s[:used]]
    choice = torch.arange(o.M, device=o.device) % 2
    where = route(index, 4, 16, choice, 2)
    yield (
        "experts_shrink, two adapters",
        [experts_shrink.shrink(o.x, where, [a, a[:, :3]], 2.0, gather=True)[:used]],
    )


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) % 8
    where, a = route(index, 8, 64), o(8, o.r, o.K, dtype=FP32)
    yield lambda: experts_shrink.shrink(o.x, where, [a], 2.0, gather=True)


ENTRY = KernelEntry(
    traffic={"_experts_shrink_kernel": _traffic},
    timing={"_experts_shrink_kernel": Timing(integers=_integers)},
    cases=_cases,
    ops=SHRINK,
    sanitize=_sanitize,
    counted=_counted,
)
