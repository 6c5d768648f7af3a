"""What the results say: one table a part (floor, PEFT, best peer, peftkern), DESIGN 6's goals, and
where peftkern loses.

    python -m benchmarks.gpu.report RESULTS.json ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .providers import AUTO, OURS, PEERS, PEFT_BF16, PEFT_COMPILED, PEFT_FP32, PLAIN

NOISE = 1.02  # a ratio up to here is no loss
MIXED = "peftkern mixed"
PREFIX, JOINED = "peftkern prefix", "prefix in a static cache"
LOOP = "loop over adapters"
OWN = (*OURS.values(), AUTO, MIXED, PREFIX)
RIVALS = (PEFT_BF16, PEFT_FP32, LOOP, PEFT_COMPILED, JOINED, *PEERS)
LEGEND = (
    "us of one call, medians; floor: roofline from the measured ceilings; peftkern: the best of",
    "its backends, named under 'by'; '/ PEFT': against PEFT's faster form. A provider whose",
    "numbers are off is not timed.",
)
HEADINGS = (
    "case", "floor", "plain", "PEFT bf16", "PEFT fp32", "best peer", "peftkern",
    "by", "/ PEFT", "/ plain", "kept MB",
)  # fmt: skip


def us(row: dict[str, Any], name: str) -> float | None:
    """The median of a provider that was right and timed."""
    entry = row.get("providers", {}).get(name, {})
    return entry["us"]["p50"] if "us" in entry else None


def best(row: dict[str, Any], names: Iterable[str]) -> tuple[str, float] | None:
    """(provider, us) of the fastest."""
    timed = [(n, t) for n in names if (t := us(row, n)) is not None]
    return min(timed, key=lambda pair: pair[1], default=None)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as text, us; a row that failed says why."""
    cells, failed = [HEADINGS], []
    for row in rows:
        if "providers" not in row:
            failed.append(f"{row['key']}: {row.get('error', 'nothing was measured')}")
            continue
        ours, plain = best(row, OWN), us(row, PLAIN)
        peft = [t for n in (PEFT_BF16, PEFT_FP32, LOOP) if (t := us(row, n)) is not None]
        peer = best(row, (PEFT_COMPILED, JOINED, *PEERS))
        kept = row["providers"].get(ours[0], {}).get("kept_bytes") if ours else None
        cells.append(
            (
                row["key"],
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
    """The winner of every race beside the default, and who failed."""
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
        # whoever is no config of a kernel
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
    """Where a rival is faster than the best of peftkern, or than its default (auto)."""
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
    """Providers of peftkern whose numbers are off, or that failed, hung or broke the device."""
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


def goals(rows: list[dict[str, Any]], gpu: str) -> list[str]:
    """DESIGN 6, each met, NOT met or not measured. Its microseconds are an H100's: on other cards
    only the ratios count."""
    by_key = {row["key"]: row for row in rows if "providers" in row}
    same_card = "H100" in gpu or "H200" in gpu
    lines = []

    def say(text: str, value: float | None, limit: float, unit: str, least: bool = False) -> None:
        if value is None:
            lines.append(f"not measured  {text}")
            return
        met = value >= limit if least else value <= limit
        sign = ">=" if least else "<="
        lines.append(
            f"{'met' if met else 'NOT met':12}  {text}: {value:.3g} {unit}, {sign} {limit:g}"
        )

    def ours(row: dict[str, Any] | None) -> float | None:
        found = best(row, OWN) if row else None
        return found[1] if found else None

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    for p, limit in ((0.1, 770.0), (0.0, 740.0)):
        row = by_key.get(f"q_proj 8B M=8192 r=16 p={p:g} train")
        text = f"linear fwd+bwd, M=8192, 4096^2, p={p:g}"
        if same_card:
            say(text, ours(row), limit, "us")
        say(
            f"{text}, over the plain linear",
            ratio(ours(row), us(row, PLAIN) if row else None),
            1.10,
            "x",
        )
    row = by_key.get("qkv 8B M=8192 r=16 p=0.1 train")
    say(
        "q,k,v group, over the plain q,k,v",
        ratio(ours(row), us(row, PLAIN) if row else None),
        1.0,
        "x",
    )
    row = by_key.get("q_proj 8B M=1 r=16 p=0 infer graph")
    if same_card:
        say("decode M=1 in a graph", ours(row), 12.5, "us")
    say(
        "decode M=1, over the bare product",
        ratio(ours(row), us(row, PLAIN) if row else None),
        1.1,
        "x",
    )
    row = by_key.get("prefix decode B=8 T=1 S=512 P=128 32/8x128")
    if same_card:
        say("prefix decode, B=8, P=128, T=512, a layer, in a graph", ours(row), 7.0, "us")
    row = by_key.get("host cost 64x64 infer")
    over = [e["over_plain_us"] for n, e in (row or {}).get("providers", {}).items() if n in OWN]
    say("host cost of a linear over nn.Linear, no grad", min(over, default=None), 6.0, "us")
    row = by_key.get("q_proj 8B M=8192 r=16 p=0.1 train")
    fastest = best(row, OWN) if row else None
    kept = row["providers"][fastest[0]].get("kept_bytes") if row and fastest else None
    say("kept for backward beyond X, p=0.1", None if kept is None else kept / 1e6, 4.5, "MB")
    rates = [row for key, row in by_key.items() if key.startswith("e2e 4x2048 r=16 p=0.1")]
    for row in rates:
        for rival, limit in ((PEFT_BF16, 1.6), (PEFT_FP32, 2.0)):
            say(
                f"{row['key']}, tokens/s over {rival}",
                ratio(us(row, rival), ours(row)),
                limit,
                "x",
                True,
            )
    if not rates:
        say("end to end, tokens/s over PEFT", None, 1.6, "x")
    return lines


def report(contents: list[dict[str, Any]]) -> list[str]:
    """All of it for the content of several results files of one GPU."""
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    gpu = contents[0].get("gpu", {}).get("name", "unknown") if contents else "unknown"
    if any(data.get("dry") for data in contents):
        lines.append("A dry run: the clock is fake, no time or ratio below means anything.")
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
        lines += ["", *LEGEND, "", "== goals of DESIGN 6"]
        lines += goals(measured, gpu)
        lost = losses(measured)
        lines += ["", f"== where peftkern loses: {len(lost)} of {len(measured)} rows", *lost]
    if off := wrong(measured):
        lines += ["", "== wrong, failed or hung", *off]
    return lines


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
