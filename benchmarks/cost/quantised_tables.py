"""``python -m benchmarks.cost --base``: the counts of :mod:`.quantised` as tables, and modelled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from peftkern.kernels.common import Arch

from ..kernels.traffic import Traffic
from . import timed
from .gpus import GPUS, Gpu, microseconds
from .quantised import (
    LIMIT,
    PLAIN,
    PROVIDERS,
    RANK,
    ROWS,
    TOKENS,
    Base,
    decoded,
    measure,
    moved,
    trained,
    verdicts,
)
from .timed_cases import Case

DEFAULT = ("H100", "H200")


def _phases(base: Base) -> dict[str, dict[str, list[Traffic]]]:
    """{what: {provider: launches}} of a base."""
    found = {f"M={m}" if m > 1 else "one row": by_name for m, by_name in base.decoding.items()}
    for what in ("forward", "backward"):
        found[f"{what}, M={TOKENS}"] = {n: getattr(c, what) for n, c in base.training.items()}
    return found


def as_json(found: Sequence[Base], gpus: Sequence[str]) -> dict[str, Any]:
    """The counts as plain data; "us" are rooflines."""
    return {
        "counted": "not measured",
        "tokens": TOKENS, "rank": RANK, "rows": list(ROWS),
        "bases": [
            {
                "base": b.name, "packed": b.packed,
                "kept": {name: count.kept for name, count in b.training.items()},
                "phases": {
                    what: {
                        name: {
                            "launches": sum(t.launches for t in launches),
                            "bytes": moved(launches),
                            "us": {g: round(microseconds(launches, GPUS[g]), 2) for g in gpus},
                        }
                        for name, launches in by_name.items()
                    }
                    for what, by_name in _phases(b).items()
                },
            }
            for b in found
        ],
        "targets": [v._asdict() | {"met": v.met} for b in found for v in verdicts(b)],
    }  # fmt: skip


def _block(b: Base, gpus: Sequence[str]) -> Table:
    title = f"{b.name}: {b.packed / 1e6:,.1f} MB of packed weights"
    block = Table(title=title, title_justify="left", header_style="bold")
    block.add_column("")
    for head in ("launches", "MB", "/ packed", *(f"us {g}" for g in gpus)):
        block.add_column(head, justify="right")
    for what, by_name in _phases(b).items():
        for name, launches in by_name.items():
            size, count = moved(launches), sum(t.launches for t in launches)
            times = [f"{microseconds(launches, GPUS[g]):,.0f}" for g in gpus]
            over = "" if "ward" in what else f"{size / b.packed:.3f}"
            cells = [str(count), f"{size / 1e6:,.1f}", over, *times]
            block.add_row(f"{what}: {name}", *cells)
    return block


def show(found: Sequence[Base], gpus: Sequence[str]) -> None:
    """Print each base's table, and the figures that are judged."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(
        f"A Llama-8B layer's seven linears, r={RANK}, fp32 adapters, bf16 activations. Counted, not"
        " measured. us: rooflines."
    )
    for b in found:
        console.print(_block(b, gpus))
        for v in verdicts(b):
            told = "" if v.met is None else f", at most {LIMIT:g}: {'met' if v.met else 'NOT met'}"
            console.print(f"{v.target} {v.value:.3f}{told}", highlight=False)


def _cases(base: str) -> dict[str, Callable[[Gpu], Case]]:
    """{name: what makes the case of the model of time}."""

    def decoding(rows: int) -> Callable[[Gpu], Case]:
        def make(gpu: Gpu) -> Case:
            arch = Arch(*gpu.arch)
            found = {w.name: {"fwd": decoded(w, base, rows, arch)} for w in PROVIDERS}
            title = f"{base}: {rows} row{'s' * (rows > 1)}, a Llama-8B layer's linears, r={RANK}"
            return Case(title, found, PLAIN, "", {}, graph=True)

        return make

    def training(gpu: Gpu) -> Case:
        found = {}
        for w in PROVIDERS:
            count = trained(w, base, Arch(*gpu.arch))
            found[w.name] = {"fwd": count.forward, "bwd": count.backward}
        title = f"{base}: forward and backward, M={TOKENS}, a Llama-8B layer's linears, r={RANK}"
        return Case(title, found, PLAIN, "", {})

    return {f"{base} M={m}": decoding(m) for m in ROWS} | {f"{base} training": training}


def counted(bases: Sequence[str], gpus: Sequence[str]) -> list[Base]:
    """Each base, as the first of the GPUs would launch it."""
    return [measure(base, Arch(*GPUS[gpus[0]].arch)) for base in bases]


def modelled(bases: Sequence[str], gpus: Sequence[str]) -> list[timed.Timed]:
    """The model of time of each base's decoding and training on every GPU."""
    return [
        timed.timed(name, gpu, make)
        for base in bases
        for name, make in _cases(base).items()
        for gpu in gpus
    ]
