"""The entry of the kernels for the order of a mixture's pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_route
from peftkern.kernels.common import Arch, Launch

from .entry import Case, KernelEntry, Operands, Timing, meta, named
from .experts import LAYERS, Layer, meta_route
from .traffic import Facts, Traffic, nbytes


def _asked(f: Facts) -> tuple[int, int]:
    """Bytes of the pairs' experts and adapters: (of memory, that programs load)."""
    index, choice = f["index"], f["choice"]
    each = 0 if choice is None else f["P"] * choice.element_size()
    return nbytes(index) + nbytes(choice), nbytes(index) + each


def _count(f: Facts) -> Traffic:
    read, requested = _asked(f)
    return Traffic("experts_route_count", 1, read, nbytes(f["counts"]), requested=requested)


def _place(f: Facts) -> Traffic:
    read, requested = _asked(f)
    counts = nbytes(f["counts"])
    return Traffic(
        "experts_route_place", 1,
        read=read + counts,
        written=sum(nbytes(f[n]) for n in ("pairs", "offsets", "tile_group", "tile_start")),
        requested=requested + counts * f["grid"][0],
    )  # fmt: skip


def launches(layer: Layer, adapters: int = 1) -> list[Launch]:
    """The launches of one call on meta tensors."""
    index = meta(layer.T, layer.k, dtype=torch.int64)
    choice = meta(layer.T, dtype=torch.int64) if adapters > 1 else None
    return experts_route.plan_route(index, choice, meta_route(layer, adapters))


def _cases(arch: Arch) -> Iterator[Case]:
    for name, layer in LAYERS.items():
        yield from named(f"experts_route {name}", launches(layer))
    yield from named("experts_route qwen3 L4", launches(LAYERS["qwen3"], 4))
    yield from named("experts_route 512", launches(LAYERS["qwen3"]._replace(experts=512)))


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) ** 2 % 5  # some are elsewhere
    choice = torch.arange(o.M, device=o.device) % 3
    for what, chosen, adapters in (("", None, 1), (", three adapters", choice, 3)):
        found = experts_route.route(index, 4, 16, chosen, adapters)
        yield f"experts_route{what}", [t.float() for t in found[:4]]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) % 8
    yield lambda: experts_route.route(index, 8, 64)


ENTRY = KernelEntry(
    traffic={"_route_count_kernel": _count, "_route_place_kernel": _place},
    timing={"_route_place_kernel": Timing(near=True)},
    cases=_cases,
    sanitize=_sanitize,
    counted=_counted,
)
