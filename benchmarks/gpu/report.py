"""Prints results: a table of each part, the goals of docs/goals.md, and rows that peftkern loses.

    python -m benchmarks.gpu.report RESULTS.json ...

A table shows the floor, HF PEFT, the best peer and peftkern.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .providers import AUTO, OURS, PEERS, PEFT_BF16, PEFT_COMPILED, PEFT_FP32, PLAIN

NOISE = 1.02  # a ratio up to this is not counted as a loss
MIXED = "peftkern mixed"
PREFIX, JOINED = "peftkern prefix", "prefix in a static cache"
LOOP = "loop over adapters"
TRITON = "peftkern triton"  # of a mixture's experts, and of quantised bases
BNB, OWNER = "bitsandbytes", "owner in torch"  # who dequantise a base
OWN = (*OURS.values(), AUTO, MIXED, PREFIX, TRITON)
RIVALS = (PEFT_BF16, PEFT_FP32, LOOP, PEFT_COMPILED, JOINED, BNB, OWNER, *PEERS)
LEGEND = (
    "us of one call, medians; floor: roofline from the measured ceilings; peftkern: the best of",
    "its backends, named under 'by'; '/ PEFT': against PEFT's faster form. A provider whose",
    "numbers are off is not timed.",
)
DRY = "A dry run: the clock is fake, no time or ratio here means anything."
HEADINGS = (
    "case", "floor", "plain", "PEFT bf16", "PEFT fp32", "best peer", "peftkern",
    "by", "/ PEFT", "/ plain", "kept MB",
)  # fmt: skip


def us(row: dict[str, Any], name: str) -> float | None:
    """The median of a provider in microseconds; None when it was wrong or not timed."""
    entry = row.get("providers", {}).get(name, {})
    return entry["us"]["p50"] if "us" in entry else None


def best(row: dict[str, Any], names: Iterable[str]) -> tuple[str, float] | None:
    """(provider, microseconds) of the fastest provider; None when none was timed."""
    timed = [(n, t) for n in names if (t := us(row, n)) is not None]
    return min(timed, key=lambda pair: pair[1], default=None)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines of text, in microseconds; a row that failed gives its error."""
    cells, failed = [HEADINGS], []
    for row in rows:
        if "providers" not in row:
            failed.append(f"{row['key']}: {row.get('error', 'nothing was measured')}")
            continue
        ours, plain = best(row, OWN), us(row, PLAIN)
        peft = [t for n in (PEFT_BF16, PEFT_FP32, LOOP) if (t := us(row, n)) is not None]
        peer = best(row, (PEFT_COMPILED, JOINED, BNB, OWNER, *PEERS))
        kept = row["providers"].get(ours[0], {}).get("kept_bytes") if ours else None
        cells.append(
            (
                row["key"] + (", cut off" if row.get("partial") else ""),
                _number(row.get("floor", {}).get("us")),
                _number(plain),
                _number(us(row, PEFT_BF16) or us(row, LOOP)),
                _number(us(row, PEFT_FP32)),
                f"{peer[1]:.1f} {peer[0]}" if peer else "-",
                _number(ours[1] if ours else None),
                ours[0].removeprefix("peftkern ") if ours else "-",
                f"{ours[1] / min(peft):.3f}" if ours and peft else "-",
                f"{ours[1] / plain:.3f}" if ours and plain else "-",
                "-" if kept is None else f"{kept / 1e6:.2f}",
            )
        )
    widths = [max(len(r[i]) for r in cells) for i in range(len(HEADINGS))]
    lines = [
        "  ".join(
            [r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]
        )
        for r in cells
    ]
    return [*lines, *failed]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def race_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each race: its winner, the gain over the default, and the entrants that failed."""
    lines = []
    for row in rows:
        entrants = row.get("entrants", {})
        timed = {n: e["us"]["p50"] for n, e in entrants.items() if "us" in e}
        if not timed:
            lines.append(f"{row['key']}: {row.get('error', 'no entrant was right')}")
            continue
        name = min(timed, key=lambda n: timed[n])
        base = "default" if "default" in timed else "torch"
        gain = f"{timed[base] / timed[name]:.2f}x {base}" if base in timed else ""
        # the entrants that are not configs of a kernel
        beside = "  ".join(f"{n} {t:.1f}" for n, t in timed.items() if "=" not in n and n != base)
        out = [n for n, e in entrants.items() if not e.get("ok")]
        wrong = [n for n in out if entrants[n].get("error") is not None or "why" not in entrants[n]]
        lines.append(
            f"{row['key']:46} {timed[name]:9.1f} us {gain:14} {name}  {beside}"
            + (f"  {len(out)} out" if out else "")
            + (f"  WRONG: {'; '.join(wrong)}" if wrong else "")
        )
    return lines


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row in which a rival beats the best of peftkern, or its default (auto)."""
    found = []
    for row in rows:
        rival, ours = best(row, RIVALS), best(row, OWN)
        if rival is None:
            continue
        if ours is None:
            found.append(f"{row['key']}: peftkern has no right and timed provider")
        elif ours[1] > NOISE * rival[1]:
            found.append(f"{row['key']}: {rival[0]} {rival[1]:.1f} us, {ours[0]} {ours[1]:.1f} us")
        else:
            default = us(row, AUTO) or us(row, OURS["torch"])
            if default is not None and default > NOISE * rival[1]:
                found.append(
                    f"{row['key']}: {rival[0]} {rival[1]:.1f} us, its default {default:.1f} us"
                    f" ({ours[0]} would take {ours[1]:.1f})"
                )
    return found


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each provider of peftkern that was wrong, failed, hung or broke the device."""
    found = []
    for row in rows:
        if "error" in row:
            found.append(f"{row['key']}: {row['error']}")
        for name, entry in row.get("providers", {}).items():
            if name in OWN and (entry.get("ok") is False or "error" in entry):
                found.append(f"{row['key']}, {name}: {entry.get('error') or entry.get('errors')}")
        for name, entry in row.get("entrants", {}).items():
            if not entry.get("ok") and "OutOfResources" not in entry.get("why", ""):
                found.append(f"{row['key']}, {name}: {entry.get('why') or entry.get('error')}")
    return found


class Goal(NamedTuple):
    """A goal of docs/goals.md, "On a GPU", judged by the rows whose keys begin with ``row``."""

    text: str
    row: str
    limit: float
    unit: str
    read: Callable[[dict[str, Any]], float | None]
    h200: float | None = None  # the limit on an H200, if it is another one
    least: bool = False
    on_hopper: bool = False  # True: a time of an H100 or H200, which does not hold on other cards

    def limit_on(self, gpu: str) -> float:
        return self.h200 if self.h200 is not None and "H200" in gpu else self.limit


def _ours(row: dict[str, Any], scale: float = 1.0) -> float | None:
    found = best(row, OWN)
    return found[1] * scale if found else None


def _over_plain(row: dict[str, Any]) -> float | None:
    ours, plain = _ours(row), us(row, PLAIN)
    return ours / plain if ours is not None and plain else None


def _rate_over(rival: str) -> Callable[[dict[str, Any]], float | None]:
    def read(row: dict[str, Any]) -> float | None:
        ours, theirs = _ours(row), us(row, rival)
        return theirs / ours if ours and theirs is not None else None

    return read


def _host_cost(row: dict[str, Any]) -> float | None:
    found = [e["over_plain_us"] for n, e in row["providers"].items() if n in OWN]
    return min(found, default=None)


def _kept(row: dict[str, Any]) -> float | None:
    fastest = best(row, OWN)
    kept = row["providers"][fastest[0]].get("kept_bytes") if fastest else None
    return None if kept is None else kept / 1e6


LINEAR = "linear fwd+bwd, M=8192, 4096^2"
GOALS = (
    Goal(
        f"{LINEAR}, p=0, over the plain linear",
        "q_proj 8B M=8192 r=16 p=0 train", 1.18, "x", _over_plain, h200=1.13,
    ),
    Goal(
        f"{LINEAR}, p=0.1, over the plain linear",
        "q_proj 8B M=8192 r=16 p=0.1 train", 1.20, "x", _over_plain, h200=1.15,
    ),
    Goal(
        "q,k,v group, over the plain q,k,v",
        "qkv 8B M=8192 r=16 p=0.1 train", 1.05, "x", _over_plain,
    ),
    Goal("MLP, over the plain MLP", "mlp 8B M=8192 r=16 p=0.1 train", 1.0, "x", _over_plain),
    Goal(
        "decode M=1, over the bare product",
        "q_proj 8B M=1 r=16 p=0 infer graph", 1.15, "x", _over_plain,
    ),
    Goal(
        "mixed batch, M=16, 8 adapters, over the bare product",
        "mixed q_proj 8B M=16 T=1 r=16 adapters=8", 1.5, "x", _over_plain,
    ),
    Goal(
        "prefix decode, B=8, P=128, T=512, a layer, in a graph",
        "prefix decode B=8 T=1 S=512 P=128 32/8x128", 7.0, "us", _ours, on_hopper=True,
    ),
    Goal(
        "host cost of a linear over nn.Linear, no grad",
        "host cost 64x64 infer", 6.0, "us", _host_cost,
    ),
    Goal(
        "kept for backward beyond X, p=0.1",
        "q_proj 8B M=8192 r=16 p=0.1 train", 4.5, "MB", _kept,
    ),
    Goal(
        "Llama-8B layer, 7 adapters, fwd+bwd, p=0.1",
        "layer 8B M=8192 r=16 p=0.1 train", 15.0, "ms", lambda row: _ours(row, 1e-3),
        on_hopper=True,
    ),
    *(
        Goal(
            f"end to end, tokens/s over {rival}",
            "e2e 4x2048 r=16 p=0.1", limit, "x", _rate_over(rival), least=True,
        )
        for rival, limit in ((PEFT_BF16, 1.29), (PEFT_FP32, 1.76))
    ),
)  # fmt: skip


def goals(rows: list[dict[str, Any]], gpu: str) -> list[str]:
    """A line for each of :data:`GOALS` and each of its rows: met, NOT met or not measured."""
    lines = []
    for goal in GOALS:
        if goal.on_hopper and "H100" not in gpu and "H200" not in gpu:
            continue
        limit = goal.limit_on(gpu)
        sought = f"{'>=' if goal.least else '<='} {limit:g}"
        found = [
            (row["key"], value)
            for row in rows
            if "providers" in row and _is_of(row["key"], goal)
            if (value := goal.read(row)) is not None
        ]
        for key, value in found:
            met = value >= limit if goal.least else value <= limit
            text = goal.text if key == goal.row else f"{goal.text}, {key}"
            verdict = "met" if met else "NOT met"
            lines.append(f"{verdict:12}  {text}: {value:.3g} {goal.unit}, {sought}")
        if not found:
            lines.append(f"not measured  {goal.text}: {sought} {goal.unit}")
    return lines


def _is_of(key: str, goal: Goal) -> bool:
    """True when the row ``key`` belongs to ``goal``; those of whole models have several rows."""
    return key == goal.row or (goal.row.startswith("e2e ") and key.startswith(goal.row))


def report(contents: list[dict[str, Any]]) -> list[str]:
    """The whole report, as lines, of the content of several results files of one GPU."""
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    gpu = contents[0].get("gpu", {}).get("name", "unknown") if contents else "unknown"
    if any(data.get("dry") for data in contents):
        lines.append(DRY)
    for data in contents:
        part = data["part"]
        own = [r for r in data["rows"] if r.get("part") == part]
        rows += own
        state = "finished" if data["finished"] else f"cut off, {len(data['not_run'])} cases not run"
        ceilings = " ".join(f"{k}={v:.4g}" for k, v in data.get("ceilings", {}).items())
        lines += ["", f"== {part} on {gpu}, {state}; measured ceilings {ceilings}"]
        if part == "race":
            lines += race_lines(own)
        elif part in ("tests", "sanitizer"):
            lines += [f"{r['outcome']:8} {r['key']}" for r in own if r["outcome"] != "passed"]
            counts = {o: sum(r["outcome"] == o for r in own) for o in {r["outcome"] for r in own}}
            lines.append(", ".join(f"{n} {o}" for o, n in sorted(counts.items())) or "nothing ran")
        else:
            lines += table(own)
        lines += [f"note: {note}" for note in data["notes"]]
    measured = [r for r in rows if r.get("part") not in ("tests", "sanitizer")]
    if any("providers" in r for r in measured):
        lines += ["", *LEGEND, "", "== goals (docs/goals.md, On a GPU)"]
        lines += goals(measured, gpu)
        lost = losses(measured)
        lines += ["", f"== where peftkern loses: {len(lost)} of {len(measured)} rows", *lost]
    if off := wrong(measured):
        lines += ["", "== wrong, failed or hung", *off]
    return lines


def write_page(contents: list[dict[str, Any]], folder: Path) -> Path | None:
    """Write report.html, the page of ``peftkern bench``, of all timed rows; None without them.

    A row's "PEFT" is HF PEFT's faster form, its "peftkern" the best of our backends. What was
    wrong, failed or hung stands there by name.
    """
    rows = []
    for row in (r for data in contents for r in data["rows"]):
        ours, theirs = best(row, OWN), best(row, (PEFT_BF16, PEFT_FP32, LOOP))
        if ours is None:
            continue
        values = {"peftkern": ours[1] * 1e-6}
        if theirs is not None:
            values["PEFT"] = theirs[1] * 1e-6
        if (plain := us(row, PLAIN)) is not None:
            values["bare"] = plain * 1e-6
        others = {n: t for n in (PEFT_COMPILED, JOINED, BNB, OWNER, *PEERS) if (t := us(row, n))}
        values |= {name: time * 1e-6 for name, time in others.items()}
        rows.append({"row": row["key"], "unit": "s", "values": values, "note": f"by {ours[0]}"})
    if not rows:
        return None
    from peftkern.cli.bench.page import render
    from peftkern.files.atomic import write_text_atomically

    off = wrong([row for data in contents for row in data["rows"]])
    gpu = contents[0].get("gpu", {})
    dry = any(data.get("dry") for data in contents)
    page = {
        "title": f"make gpu: peftkern beside HF PEFT on {gpu.get('name', 'an unknown GPU')}",
        "what": DRY if dry else "",
        "machine": {k: v for k, v in gpu.items() if isinstance(v, str | int | float)},
        "rows": rows,
        "failed": dict(line.partition(": ")[::2] for line in off),
    }
    path = folder / "report.html"
    write_text_atomically(path, render(page))
    return path


def main(argv: list[str] | None = None) -> int:
    paths = [Path(p) for p in (sys.argv[1:] if argv is None else argv)]
    if not paths:
        print(__doc__)
        return 2
    contents = [json.loads(p.read_text(encoding="utf-8")) for p in paths]
    print("\n".join(report(contents)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
