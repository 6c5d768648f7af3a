"""Plots and tables of benchmarks/results/ for docs/benchmarks.md.

    python -m benchmarks.plots            writes docs/images/*.svg and the page's part between marks
    python -m benchmarks.plots --check    exit status 1 where they do not fit the results

Each plot holds its numbers as JSON in its metadata. ``--check`` compares those, not the pixels,
which depend on the version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
START, END = "<!-- results: written by python -m benchmarks.plots -->", "<!-- end of results -->"

# {name: (title, pattern for the start of a row's name)}; a row goes to the first that matches
SUBJECTS = {
    "prefix": ("A model with a prefix", r"(training step|decode \d+ tokens) with a prefix"),
    "memory": ("Bytes", r"bytes |peak "),
    "merging": ("Merging", r"merge"),
    "adapters": ("Adding, switching, loading", r"add_|set_|disable_|inject|from_pretrained|load_"),
    "decoding": ("Decoding, and calls without gradients", r"decode|runner|\d+ requests|.*no grad"),
    "training": ("Training", r""),
}
SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "B": ((2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}


@dataclass(frozen=True)
class Bar:
    """A row of a plot: ratios to HF PEFT's time or bytes."""

    name: str
    ratio: float
    floor: float | None  # the model or block without adapters
    aim: float | None


def newest(folder: Path, name: str = "row") -> list[dict[str, Any]]:
    """The newest version of each row in the files of ``folder``, whose names are their dates."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found[row[name]] = row
    return list(found.values())


def by_subject(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SUBJECTS}
    for row in rows:
        subject = next(s for s, (_, start) in SUBJECTS.items() if re.match(start, row["row"]))
        found[subject].append(row)
    return {name: rows for name, rows in reversed(found.items()) if rows}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4) + 0.0  # + 0.0 turns -0.0 into 0.0


def _two_places(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"


def cpu_bars(rows: Iterable[dict[str, Any]]) -> list[Bar]:
    return [
        Bar(r["row"], _round(r["ratio"]) or 0.0, _round(r["floor"]), _round(r["target"]))
        for r in rows
    ]


def gpu_bars(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[Bar]]]:
    """(part, bars) of a GPU's rows: peftkern's fastest correct way over HF PEFT's faster one.

    Rows that lack either of them are left out.
    """
    from .gpu.report import OWN, PEFT_BF16, PEFT_FP32, PLAIN, best, us

    parts: dict[str, list[Bar]] = {}
    for row in rows:
        ours, theirs = best(row, OWN), best(row, (PEFT_BF16, PEFT_FP32))
        if ours is None or theirs is None:
            continue
        plain = us(row, PLAIN)
        floor = None if plain is None else _round(plain / theirs[1])
        bar = Bar(row["key"], _round(ours[1] / theirs[1]) or 0.0, floor, None)
        parts.setdefault(row["part"], []).append(bar)
    yield from parts.items()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_folders(results: Path) -> list[Path]:
    return sorted(
        p for p in results.iterdir() if p.name not in ("cpu", "static") and any(p.glob("*.json"))
    )


def plots(results: Path = RESULTS) -> dict[str, tuple[str, list[Bar]]]:
    """{file name: (title, bars)} of every plot that the results have rows for."""
    found = {
        f"bench-{name}.svg": (SUBJECTS[name][0], cpu_bars(rows))
        for name, rows in by_subject(newest(results / "cpu")).items()
    }
    for folder in gpu_folders(results):
        for part, bars in gpu_bars(newest(folder, "key")):
            found[f"bench-{_slug(folder.name)}-{part}.svg"] = (f"{folder.name}: {part}", bars)
    return found


def series(title: str, bars: list[Bar]) -> str:
    """The numbers of a plot as the JSON text that its file holds."""
    return json.dumps({"title": title, "bars": [asdict(bar) for bar in bars]}, sort_keys=True)


def series_of(path: Path) -> str | None:
    """The JSON text of the numbers in the plot at ``path``; None when there is none."""
    if not path.is_file():
        return None
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8"), re.S)
    return unescape(found[1]) if found else None


def draw(path: Path, title: str, bars: list[Bar]) -> None:
    """Write the plot of ``bars``: the same bytes at each call with one version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [bar.name.replace("peftkern", "").strip() for bar in bars]
    settings = {
        "svg.hashsalt": "peftkern", "svg.fonttype": "none", "font.family": "sans-serif",
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8.5, 1.3 + 0.3 * len(bars)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15)
        axes = figure.add_subplot()
        rows = range(len(bars))
        axes.barh(rows, [bar.ratio for bar in bars], color="#3f51b5", height=0.6)
        most = max(1.0, *(bar.ratio for bar in bars))
        for row, bar in zip(rows, bars, strict=True):
            beside = axes.get_yaxis_transform()  # x is a share of the axes' width, y a row
            axes.text(1.02, row, _two_places(bar.ratio), va="center", transform=beside)
        for label, marker, color, values in (
            ("without adapters", "|", "#000000", [bar.floor for bar in bars]),
            ("aim", "d", "#e65100", [bar.aim for bar in bars]),
        ):
            there = [(v, row) for v, row in zip(values, rows, strict=True) if v is not None]
            if there:
                axes.plot(
                    [v for v, _ in there], [row for _, row in there], linestyle="none",
                    marker=marker, color=color, markersize=9 if marker == "|" else 5,
                    markeredgewidth=2 if marker == "|" else 0, label=label,
                )  # fmt: skip
        axes.axvline(1.0, color="#9e9e9e", linewidth=1, zorder=0, label="HF PEFT")
        axes.set_yticks(rows, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02 * most)
        axes.set_xlabel("peftkern / HF PEFT (less is better)")
        axes.set_title(title, loc="left")
        figure.legend(loc="outside lower right", ncols=3, frameon=False)
        data = {"Date": None, "Creator": None, "Description": series(title, bars)}
        _replace(path, lambda scratch: figure.savefig(scratch, format="svg", metadata=data))


def _replace(path: Path, write: Any) -> None:
    """Replace the file at ``path`` by what ``write`` writes, at once; not at all on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _value(row: dict[str, Any], provider: str) -> str:
    """The cell of a time or a number of bytes; the increase over the bare layer in added rows."""
    value = row["values"].get(provider)
    if value is None:
        return ""
    if row["kind"] == "added":
        value -= row["values"]["bare"]
    if value == 0:
        return "0"
    scales = SCALES[row["unit"]]
    scale, unit = next((s for s in scales if abs(value) >= s[0]), scales[-1])
    return f"{value / scale:.3g} {unit}"


def _cpu_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| row | without adapters | HF PEFT | peftkern | ratio | aim | |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        aim = "" if row["target"] is None else f"<= {row['target']:.2f}"
        bare = "" if row["kind"] == "added" else _value(row, "bare")
        values = [bare, _value(row, "PEFT"), _value(row, "peftkern"), _two_places(row["ratio"])]
        yield f"| {' | '.join([row['row'], *values, aim, row['verdict']])} |"


def _runs(results: Path) -> Iterator[str]:
    for path in sorted((results / "cpu").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        machine = data["machine"]
        versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
        yield (
            f"- `{path.name}`: {machine['cpu']} ({machine['capability']}), threads: "
            f"{machine['threads']}; Python {machine['python']}, {versions}; "
            f"commit `{machine['commit']}`"
        )


def _compiled(results: Path) -> Iterator[str]:
    """The table of the compiler's results, one line for each architecture."""
    yield "| Triton | architecture | compiled | most registers | most shared KiB | bytes spilled |"
    yield "|---|---|---|---|---|---|"
    for path in sorted((results / "static").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for arch in dict.fromkeys(row["arch"] for row in data["rows"]):
            rows = [row for row in data["rows"] if row["arch"] == arch]
            most = [max(row[name] for row in rows) for name in ("registers", "shared")]
            spilled = sum(row["spilled"] for row in rows)
            yield (
                f"| {data['triton']} | {arch} | {len(rows)} | {most[0]} | {most[1] / 1024:.0f} "
                f"| {spilled} |"
            )


def _gpus(results: Path) -> Iterator[str]:
    folders = gpu_folders(results)
    if not folders:
        yield "None: no GPU has run this."
    for folder in folders:
        from .gpu.report import goals

        rows = newest(folder, "key")
        yield from (f"### {folder.name}", "")
        for part, _ in gpu_bars(rows):
            yield from _picture(f"bench-{_slug(folder.name)}-{part}.svg", f"{folder.name}, {part}")
        yield from ("", "[Goals](goals.md#on-a-gpu):", "", "```", *goals(rows, folder.name), "```")


def _picture(name: str, title: str) -> Iterator[str]:
    yield f"![{title}: bars of peftkern's ratio to HF PEFT](images/{name})"


def page_part(results: Path = RESULTS) -> str:
    """The text that belongs between the two marks in docs/benchmarks.md."""
    lines = []
    for name, rows in by_subject(newest(results / "cpu")).items():
        title = SUBJECTS[name][0]
        lines += [f"### {title}", "", *_picture(f"bench-{name}.svg", title), ""]
        lines += [*_cpu_table(rows), ""]
    lines += ["### The runs", "", *_runs(results), "", "## On a GPU", "", *_gpus(results), ""]
    lines += ["## What the compiler says", "", *_compiled(results)]
    return "\n".join(lines)


def stale(results: Path = RESULTS, page: Path = PAGE, images: Path = IMAGES) -> list[str]:
    """Names of the plots, and of the page, that do not fit the results."""
    wanted = plots(results)
    found = [n for n, plot in wanted.items() if series_of(images / n) != series(*plot)]
    found += [p.name for p in images.glob("bench-*.svg") if p.name not in wanted]
    if page_part(results) != _split(page)[1].strip("\n"):
        found.append(page.name)
    return sorted(found)


def _split(page: Path) -> tuple[str, str, str]:
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(END) < text.index(START):
        raise ValueError(f"{page}: one line {START!r} and, after it, one {END!r} are needed")
    head, rest = text.split(START)
    middle, tail = rest.split(END)
    return head, middle, tail


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where stale")
    options = parser.parse_args(argv)
    old = stale()
    if options.check:
        for name in old:
            print(f"{name} is not what benchmarks/results say now", file=sys.stderr)
        return bool(old)
    wanted = plots()
    for name in old:
        if name in wanted:
            draw(IMAGES / name, *wanted[name])
        elif name != PAGE.name:
            (IMAGES / name).unlink()
    head, _, tail = _split(PAGE)
    text = f"{head}{START}\n\n{page_part()}\n\n{END}{tail}"
    _replace(PAGE, lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(f"written: {', '.join(old) or 'nothing, all was up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
