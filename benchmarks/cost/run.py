"""Launches, bytes and FLOPs of LoRA, counted without a GPU: HF PEFT, peftkern, and the floor.

    python -m benchmarks.cost [--gpu H100] [--M 8192 --K 4096 --N 4096 --r 16] [--json]
    python -m benchmarks.cost --time [--gpu H200 ...] [--case linear decode ...] [--json]
    python -m benchmarks.cost --base nf4 [fp8 ...] [--time] [--gpu H100 H200] [--json]
    python -m benchmarks.cost --fsdp [--gpu H100] [--M 8192] [--r 16] [--json]

There are three cases, forward and backward, with dropout 0 and 0.1 and bf16 activations: one LoRA
linear, three projections of one X, and one Llama-8B layer with an adapter on every linear (in its
own widths, for M tokens). ``--case experts`` are the experts of two mixtures, in their own sizes
and without dropout (:mod:`.experts`), and ``--case prefix`` is a prefix inside attention
(:mod:`.prefix`). ``--base`` counts the linears of a Llama-8B layer on a quantised base
(:mod:`.quantised`), ``--fsdp`` what 8 ranks gather of a Llama-70B layer (:mod:`.sharded`).

HF PEFT's and peftkern's real modules run on tensors without data (:mod:`.count`); Triton launches
report their traffic from their grids (:mod:`benchmarks.kernels`). Times are rooflines: lower bounds
for the launches on the named GPU, without launch overhead and as if every product reached the
matrix rate, so that ``fused`` pays nothing for a product slower than the vendor's. ``--time`` shows
a model of time instead (:mod:`.timed`), with L2, waves, bytes in flight and launches. No speed was
measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from peftkern.kernels.checks import MAX_RANK
from peftkern.kernels.common import Arch

from ..gpu.packed import BASES
from ..kernels.traffic import Traffic
from . import experts as cost_experts
from . import prefix as cost_prefix
from . import quantised_tables, sharded, timed, timed_cases
from .cases import CASES, FP32, PROVIDERS, Provider, Shape, measure
from .count import Count
from .gpus import GPUS, Gpu, microseconds

DROPOUTS = (0.0, 0.1)
RULER = "HF PEFT bf16"  # the denominator of all ratios: the stricter of PEFT's two forms
TITLES = {
    "linear": "LoRA linear",
    "group": "q, k, v of one X",
    "layer": "Llama-8B layer, 7 adapters",
    **cost_experts.TITLES,
}
JUDGED = ("torch", "hybrid", "joined", "fused")
KEPT_AT = (8192, 4096)  # the M, K at which the limit on kept bytes holds


class Row(NamedTuple):
    case: str
    p: float
    who: Provider
    count: Count


class Verdict(NamedTuple):
    """The value of one target for one provider, per projection."""

    case: str
    provider: str
    target: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit


def launches(list_: Iterable[Traffic]) -> int:
    return sum(t.launches for t in list_)


def moved(list_: Iterable[Traffic]) -> int:
    """The sum of bytes read and written."""
    return sum(t.bytes for t in list_)


def table(
    shape: Shape,
    gpu: Gpu,
    cases: Sequence[str] = CASES,
    providers: Sequence[Provider] = PROVIDERS,
) -> list[Row]:
    """A row for every case, dropout and provider; cases of experts have providers of their own."""
    arch = Arch(*gpu.arch)
    rows = [
        Row(case, p, who, measure(who, case, shape, p, arch))
        for case in cases
        if case in CASES
        for p in DROPOUTS
        for who in providers
    ]
    if "experts" in cases:
        rows += [
            Row(case, 0.0, who, cost_experts.measure(who, case, arch))
            for case in cost_experts.CASES
            for who in cost_experts.PROVIDERS
        ]
    return rows


def expert_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The bytes of peftkern's way on a GPU over the floor's: forward, backward, and both."""
    found = {(r.case, r.who.name): r.count for r in rows if r.case in cost_experts.CASES}
    out = []
    for case, name in found:
        if name not in cost_experts.JUDGED:
            continue
        floor, own = found[case, cost_experts.JUDGED[name]], found[case, name]
        parts = [(moved(own.forward), moved(floor.forward))]
        parts.append((moved(own.backward), moved(floor.backward)))
        parts.append((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]))
        for what, (ours, least) in zip(("fwd", "bwd", "step"), parts, strict=True):
            target = f"{what} bytes / floor"
            out.append(Verdict(case, name, target, ours / least, cost_experts.LIMIT))
    return out


def verdicts(rows: Sequence[Row], shape: Shape) -> list[Verdict]:
    """The targets of a LoRA linear, judged for the linear and per projection for the group."""
    found: dict[tuple[str, float, str], Count] = {(r.case, r.p, r.who.name): r.count for r in rows}
    out = []
    for case, projections in (("linear", 1), ("group", 3)):
        for who in PROVIDERS:
            plain, dropped = (found.get((case, p, who.name)) for p in DROPOUTS)
            ruler = found.get((case, DROPOUTS[1], RULER))
            if who.kind not in JUDGED or plain is None or dropped is None or ruler is None:
                continue
            back = max(launches(plain.backward), launches(dropped.backward))
            checks = [
                ("launches fwd", launches(plain.forward) / projections, 2),
                ("launches fwd p=0.1", launches(dropped.forward) / projections, 2),
                ("launches bwd", back / projections, 4),
                ("fwd bytes / PEFT", moved(dropped.forward) / moved(ruler.forward), 0.45),
                ("bwd bytes / PEFT", moved(dropped.backward) / moved(ruler.backward), 0.5),
            ]
            if (shape.M, shape.K) == KEPT_AT:
                checks.append(("kept beyond X, MB", dropped.kept / projections / 1e6, 4.5))
            out += [Verdict(case, who.name, name, v, limit) for name, v, limit in checks]
    return out


def _phase(list_: list[Traffic], ruler: list[Traffic] | None, gpu: Gpu) -> dict[str, Any]:
    return {
        "launches": launches(list_),
        "read": sum(t.read for t in list_),
        "written": sum(t.written for t in list_),
        "flops": sum(t.flops for t in list_),
        "us": round(microseconds(list_, gpu), 2),
        "bytes_to_peft": None if ruler is None else round(moved(list_) / moved(ruler), 4),
    }


def as_json(rows: Sequence[Row], shape: Shape, name: str, every: bool) -> dict[str, Any]:
    """The table as plain data; with ``every`` also each single launch."""
    gpu = GPUS[name]
    rulers = {(r.case, r.p): r.count for r in rows if r.who.name == RULER}
    out = []
    for r in rows:
        ruler = rulers.get((r.case, r.p))
        row: dict[str, Any] = {
            "case": r.case,
            "dropout": r.p,
            "provider": r.who.name,
            "adapters": "fp32" if r.who.adapter == FP32 else "bf16",
            "forward": _phase(r.count.forward, ruler and ruler.forward, gpu),
            "backward": _phase(r.count.backward, ruler and ruler.backward, gpu),
            "kept": r.count.kept,
        }
        if every:
            row["forward"]["list"] = [t._asdict() for t in r.count.forward]
            row["backward"]["list"] = [t._asdict() for t in r.count.backward]
        out.append(row)
    return {
        "counted": "not measured",
        "gpu": {"name": name} | gpu._asdict(),
        "shape": shape._asdict(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "triton", "peft")},
        "rows": out,
        "targets": [
            v._asdict() | {"met": v.met} for v in (*verdicts(rows, shape), *expert_verdicts(rows))
        ],
    }


def _block(title: str, rows: Sequence[Row], gpu: Gpu) -> Table:
    block = Table(title=title, title_justify="left", header_style="bold")
    block.add_column("")
    for phase in ("fwd", "bwd"):
        for head in (f"{phase} launches", "MB", "x PEFT", "us"):
            block.add_column(head, justify="right")
    block.add_column("kept MB", justify="right")
    block.add_column("both us", justify="right")
    ruler = next((r.count for r in rows if r.who.name == RULER), None)
    for r in rows:
        cells = []
        times = []
        for which in ("forward", "backward"):
            list_ = getattr(r.count, which)
            times.append(microseconds(list_, gpu))
            to = f"{moved(list_) / moved(getattr(ruler, which)):.2f}" if ruler else "-"
            cells += [str(launches(list_)), f"{moved(list_) / 1e6:,.0f}", to, f"{times[-1]:,.0f}"]
        kept = f"{r.count.kept / 1e6:,.2f}"
        block.add_row(r.who.name, *cells, kept, f"{sum(times):,.0f}")
    return block


def _targets(title: str, found: Sequence[Verdict]) -> Table:
    heads = list(dict.fromkeys((v.target, v.limit) for v in found))
    block = Table(title=title, title_justify="left", header_style="bold")
    block.add_column("")
    for name, limit in heads:
        block.add_column(f"{name}\n<= {limit:g}", justify="right")
    for key in dict.fromkeys((v.case, v.provider) for v in found):
        own = [v for v in found if (v.case, v.provider) == key]
        cells = [f"{v.value:.3g} {'[green]met' if v.met else '[red]NOT met'}[/]" for v in own]
        block.add_row(" ".join(key), *cells)
    return block


def _show(rows: Sequence[Row], shape: Shape, name: str) -> None:
    gpu = GPUS[name]
    console = Console(width=None if sys.stdout.isatty() else 150)
    how = "shares of the data sheet, not measured here"
    console.print(
        f"M={shape.M} K={shape.K} N={shape.N} r={shape.r}, bf16. Counted, not measured."
        f" us: roofline on {name} at {gpu.bandwidth:.3g} TB/s, {gpu.matrix:.0f} TFLOP/s ({how})."
        " kept: for backward, beyond X and weights."
    )
    for case, p in dict.fromkeys((r.case, r.p) for r in rows):
        some = [r for r in rows if (r.case, r.p) == (case, p)]
        console.print(_block(f"{TITLES[case]}, dropout {p:g}", some, gpu))
    for title, found in (
        ("Targets, per projection", verdicts(rows, shape)),
        ("Targets of a mixture", expert_verdicts(rows)),
    ):
        if found:
            console.print(_targets(title, found))
            missed = sum(not v.met for v in found)
            console.print(f"{len(found) - missed} of {len(found)} met, {missed} NOT met.")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: an integer, 1 or more")
    return value


def _time(
    parser: argparse.ArgumentParser, options: argparse.Namespace, shape: Shape, cases: list[str]
) -> int:
    """The command with ``--time``."""
    if shape != Shape():
        parser.error("argument --time: its shapes are fixed; allowed: none of --M --K --N --r")
    gpus, names = options.gpu or timed.SHOWN, [c.replace("-", " ") for c in cases]
    return _modelled(parser, options, lambda: timed.tables(gpus, names))


def _bases(
    parser: argparse.ArgumentParser, options: argparse.Namespace, shape: Shape, bases: list[str]
) -> int:
    """The command with ``--base``."""
    if shape != Shape():
        parser.error("argument --base: its shapes are fixed; allowed: none of --M --K --N --r")
    if options.case or options.launches:
        parser.error("argument --base: it has cases of its own; allowed: --time --gpu --json")
    gpus = options.gpu or list(quantised_tables.DEFAULT)
    if not options.time:
        found = quantised_tables.counted(bases, gpus)
        if options.json:
            print(json.dumps(quantised_tables.as_json(found, gpus)))
        else:
            quantised_tables.show(found, gpus)
        return 0
    return _modelled(parser, options, lambda: quantised_tables.modelled(bases, gpus))


def _fsdp(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """The command with ``--fsdp``."""
    if options.case or options.base or options.time or options.launches:
        parser.error("argument --fsdp: it is one table; allowed: --gpu --M --r --json")
    names = options.gpu or ["H100"]
    if len(names) > 1:
        parser.error(f"argument --gpu: {' '.join(names)}; allowed with --fsdp: one")
    rows = sharded.table(options.r, options.M, names[0])
    if options.json:
        print(json.dumps({"counted": "not measured", "rows": rows}))
    else:
        print("\n".join(sharded.lines(rows, options.r, options.M, names[0])))
    return 0


def _modelled(
    parser: argparse.ArgumentParser, options: argparse.Namespace, make: Callable[[], Any]
) -> int:
    """Print the tables of modelled times that ``make`` returns."""
    try:
        found = make()
    except RuntimeError as error:  # a kernel does not compile
        parser.error(str(error))
    if options.json:
        print(json.dumps(timed.as_json(found)))
    else:
        timed.show(found, Console(width=None if sys.stdout.isatty() else 200))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--gpu", nargs="+", choices=sorted(GPUS),
        help=f"default H100; several with --time, where the default is {' '.join(timed.SHOWN)}, "
        f"and with --base ({' '.join(quantised_tables.DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--time", action="store_true", help="a model of time, at fixed shapes")
    for name, value in Shape()._asdict().items():
        parser.add_argument(f"--{name}", type=_positive, default=value, help=f"default {value}")
    every, modelled = (
        [*CASES, "experts", "prefix"],
        [name.replace(" ", "-") for name in timed_cases.kinds()],
    )
    choices = list(dict.fromkeys([*every, *modelled]))
    parser.add_argument("--case", nargs="+", choices=choices, help="default: all")
    parser.add_argument("--base", nargs="+", choices=BASES, help="quantised bases instead")
    parser.add_argument("--fsdp", action="store_true", help="bytes gathered by FSDP2 instead")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--launches", action="store_true", help="with --json: list every launch")
    options = parser.parse_args(argv)
    if options.r > MAX_RANK:
        parser.error(f"argument --r: {options.r}; allowed: 1 to {MAX_RANK}, what the kernels take")
    shape = Shape(options.M, options.K, options.N, options.r)
    if options.fsdp:
        return _fsdp(parser, options)
    if options.base:
        return _bases(parser, options, shape, options.base)
    chosen = options.case or (modelled if options.time else every)
    if wrong := [c for c in chosen if c not in (modelled if options.time else every)]:
        allowed = ", ".join(modelled if options.time else every)
        mode = "with" if options.time else "without"
        parser.error(f"argument --case: {wrong[0]}; allowed {mode} --time: {allowed}")
    if options.time:
        return _time(parser, options, shape, chosen)
    names = options.gpu or ["H100"]
    if len(names) > 1:
        parser.error(f"argument --gpu: {' '.join(names)}; allowed without --time: one")
    (name,) = names
    rows = table(shape, GPUS[name], chosen)
    wide = cost_prefix.PrefixShape()
    prefix = []
    if "prefix" in chosen:
        prefix = cost_prefix.table(wide, Arch(*GPUS[name].arch))
    if options.json:
        data = as_json(rows, shape, name, options.launches)
        if prefix:
            data["prefix"] = cost_prefix.as_json(prefix, wide)
        json.dump(data, sys.stdout)
        print()
        return 0
    if rows:
        _show(rows, shape, name)
    if prefix:
        print("\n".join(cost_prefix.lines(prefix, wide)))
    return 0
