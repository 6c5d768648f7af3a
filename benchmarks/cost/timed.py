"""``python -m benchmarks.cost --time``: the modelled time of peftkern, HF PEFT and the floor.

For each case a table of providers with their modelled microseconds on each GPU, what a GPU has
measured beside it where a file of ``benchmarks/results`` holds that, and a table of peftkern's
launches with their terms. No figure of the model is measured; :func:`.model.time_of` has its
formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ..kernels.traffic import Traffic
from .count import Launched
from .gpus import GPUS, Gpu
from .measured import microseconds, rows_of
from .model import GAP, HOST, Modelled, eager, in_a_graph, time_of, vendor
from .timed_cases import CASES, FP8, FP8_GPUS, Case

SHOWN = ("H200", "H100", "B200", "RTX4090")
JUDGED = "H200"  # the GPU of the limits below
TERMS = ("memory", "L2", "math", "in flight", "waves", "launch")


class Line(NamedTuple):
    """One provider of a case on one GPU; ``measured`` is a file's median in us, or None."""

    provider: str
    phases: dict[str, list[Modelled]]
    measured: float | None

    @property
    def launches(self) -> list[Modelled]:
        return [m for phase in self.phases.values() for m in phase]

    @property
    def us(self) -> float:
        """Modelled without the host, as in a CUDA graph."""
        return in_a_graph(self.launches)

    @property
    def eager(self) -> float:
        return eager(self.launches)


class Timed(NamedTuple):
    """A case on one GPU."""

    name: str
    case: Case
    gpu: str
    lines: list[Line]

    def us(self, provider: str) -> float:
        return next(line.us for line in self.lines if line.provider == provider)


class Verdict(NamedTuple):
    """A limit on a modelled value; without a value nothing models it."""

    text: str
    value: float | None
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.limit

    @property
    def line(self) -> str:
        sought = f"at most {self.limit:g} {self.unit}"
        if self.value is None:
            return f"not modelled  {self.text}: {sought}"
        said = "met" if self.met else "NOT met"
        return f"{said:12}  {self.text}: modelled {self.value:.3g} {self.unit}, {sought}"


class Limit(NamedTuple):
    """A figure of the model that is judged: a provider's time in a case, over its base or in us."""

    text: str
    case: str
    provider: str
    limit: float
    unit: str = "x"
    gpu: str = JUDGED


LIMITS = (
    *(
        Limit(f"joined over plain, fp32 adapters, {tail}", case, "triton joined fp32", 1.14)
        for case, tail in (("linear", "dropout 0"), ("linear p=0.1", "dropout 0.1"))
    ),
    Limit("MLP block over plain torch's MLP", "mlp", "triton joined fp32", 1.0),
    *(
        Limit(f"layer on an fp8 base over the bf16 frozen one, {tail}", case, FP8, 0.75, gpu=gpu)
        for gpu, case, tail in (
            ("H200", "layer fp8", "dropout 0"),
            ("H200", "layer fp8 p=0.1", "dropout 0.1"),
            ("H100", "layer fp8", "dropout 0, H100"),
            ("H100", "layer fp8 p=0.1", "dropout 0.1, H100"),
        )
    ),
    Limit("decode M=1 over the bare product, fp32 adapters", "decode", "peftkern fp32", 1.2),
    Limit("mixed M=16 x 8 adapters over the bare product, fp32", "mixed", "peftkern fp32", 1.5),
    Limit("prefix decode B=8 P=128 S=512", "prefix decode", "peftkern", 7.0, "us"),
)


def modelled(t: Traffic, gpu: Gpu) -> Modelled:
    """One of a count's launches, ours or a vendor's."""
    return time_of(t.launch, gpu) if isinstance(t, Launched) else vendor(t, gpu)


def timed(name: str, gpu: str, make: Callable[[Gpu], Case] | None = None) -> Timed:
    """The case of this name on the GPU of this name."""
    case, rows = (make or CASES[name])(GPUS[gpu]), rows_of(gpu)
    lines = [
        Line(
            who,
            {phase: [modelled(t, GPUS[gpu]) for t in some] for phase, some in phases.items()},
            microseconds(rows, case.row, case.measured.get(who, "")),
        )
        for who, phases in case.providers.items()
    ]
    return Timed(name, case, gpu, lines)


def verdicts(found: Sequence[Timed]) -> list[Verdict]:
    """The limits of the cases that are there on their GPUs, and of those that nobody made."""
    by_name = {(t.name, t.gpu): t for t in found}
    out = []
    for limit in LIMITS:
        value = None
        if (limit.case, limit.gpu) in by_name:
            of = by_name[limit.case, limit.gpu]
            value = of.us(limit.provider) / (of.us(of.case.base) if limit.unit == "x" else 1.0)
        elif limit.case in CASES:
            continue
        out.append(Verdict(limit.text, value, limit.limit, limit.unit))
    return out


def as_json(found: Sequence[Timed]) -> dict[str, Any]:
    """The tables as plain data; every time but ``measured_us`` is modelled."""
    return {
        "modelled": "not measured",
        "rates": {t.gpu: GPUS[t.gpu]._asdict() for t in found},
        "gap_us": GAP,
        "host_us": HOST,
        "cases": [
            {
                "case": t.name, "title": t.case.title, "gpu": t.gpu, "base": t.case.base,
                "row": t.case.row,
                "providers": [
                    {
                        "provider": line.provider, "modelled_us": line.us,
                        "modelled_eager_us": line.eager, "measured_us": line.measured,
                        "launches": {
                            phase: [m._asdict() for m in some]
                            for phase, some in line.phases.items()
                        },
                    }
                    for line in t.lines
                ],
            }
            for t in found
        ],
        "judged": [v._asdict() | {"met": v.met, "gpu": JUDGED} for v in verdicts(found)],
    }  # fmt: skip


def _table(heads: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _providers(found: Sequence[Timed]) -> Table:
    """One case: the providers, with columns for each GPU."""
    heads = []
    measured = [any(line.measured for line in t.lines) for t in found]
    for t, known in zip(found, measured, strict=True):
        heads += [f"{t.gpu}\nmodelled us", "x base", "in eager\ncalls"]
        heads += ["measured us", "measured /\nmodelled"] if known else []
    case = found[0].case
    table = _table(heads)
    for i, line in enumerate(found[0].lines):
        cells = []
        for t, known in zip(found, measured, strict=True):
            line = t.lines[i]
            cells += [f"{line.us:,.1f}", f"{line.us / t.us(case.base):.3f}", f"{line.eager:,.1f}"]
            if known and line.measured is None:
                cells += ["-", "-"]
            elif known:
                model = line.us if case.graph else line.eager
                cells += [f"{line.measured:,.1f}", f"{line.measured / model:.2f}"]
        table.add_row(line.provider, *cells)
    return table


def _launches(t: Timed) -> Table:
    """The launches of peftkern's providers; equal ones of a provider are one line."""
    heads = ("calls", "modelled\nus", *TERMS, "binds", "programs\nof all", "held at\na time",
             "KB in flight\na program")  # fmt: skip
    table = _table(heads)
    for line in t.lines:
        for phase, some in line.phases.items():
            if not any(m.programs for m in some):
                continue
            alike: dict[Any, list[Modelled]] = {}
            for m in some:
                alike.setdefault((m.name, round(m.us, 3), m.programs), []).append(m)
            for (name, _, _), same in alike.items():
                m = same[0]
                terms = [f"{m.terms[term]:.1f}" for term in TERMS]
                tail = [f"{m.programs:,}", f"{m.slots:,}", f"{m.in_flight / 1e3:.1f}"]
                cells = [str(len(same)), f"{m.us:.1f}", *terms, m.binds]
                cells += tail if m.programs else ["-"] * 3
                table.add_row(f"{line.provider}, {phase}: {name}", *cells)
    return table


def _rates(gpus: Sequence[str]) -> list[str]:
    out = ["Modelled, not measured. Rates of the model, none measured here:"]
    for name in gpus:
        g = GPUS[name]
        fp8 = f", x {g.fp8:g} in fp8 with block scales" if name in FP8_GPUS else ""
        out.append(
            f"  {name}: memory {g.bandwidth:.3g} TB/s, L2 {g.l2:g} TB/s, {g.matrix:.0f} TFLOP/s"
            f" bf16 (x {g.mma:g} by mma.sync{fp8}), {g.fp32:.0f} fp32,"
            f" {g.integer:.1f} integer Top/s, latency {g.latency:g} us (L2 {g.near:g}),"
            f" {g.arch[0]} multiprocessors, {g.compiled}"
        )
    host = ", ".join(f"{us:g} us {who}" for who, us in HOST.items())
    out.append(
        f"  A launch: {GAP:g} us and a latency; of the host in eager calls {host}."
        " The L2 term is an upper bound where programs side by side load one tile (gemm)."
    )
    return out


def show(found: Sequence[Timed], console: Console) -> None:
    """Print the rates, each case's tables, and the judged figures."""
    gpus = list(dict.fromkeys(t.gpu for t in found))
    console.print("\n".join(_rates(gpus)), highlight=False)
    for name in dict.fromkeys(t.name for t in found):
        some = [t for t in found if t.name == name]
        title, base = some[0].case.title, some[0].case.base
        console.print(f"[bold]{title}[/bold]", highlight=False, soft_wrap=True)
        console.print(f"Modelled us, base: {base}.", highlight=False)
        console.print(_providers(some))
        console.print(f"Its launches on {some[0].gpu}, modelled us.", highlight=False)
        console.print(_launches(some[0]))
    judged = verdicts(found)
    if judged:
        console.print(f"Modelled figures against their limits, on {JUDGED} where none is said:")
        for v in judged:
            console.print(v.line, highlight=False, soft_wrap=True)


def tables(gpus: Sequence[str], cases: Sequence[str]) -> list[Timed]:
    """Every case whose kind is in ``cases`` (see :func:`.timed_cases.kinds`) on every GPU."""
    return [
        timed(name, gpu)
        for name in CASES
        if name.split(" p=")[0] in cases
        for gpu in gpus
        if gpu in FP8_GPUS or not name.startswith("layer fp8")
    ]
