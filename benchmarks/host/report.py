"""The table at the end of a run, and the file that its rows are saved in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .measure import OURS, PROVIDERS, Result, quantiles

RESULTS = Path(__file__).parents[1] / "results" / "cpu"
_HEADINGS = ("row", *PROVIDERS, "ratio", "paired", "CPU", "floor", "target", "")
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "B": ((2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}


def table(results: list[Result]) -> list[str]:
    """The rows as lines of text under a heading."""
    rows = [_HEADINGS, *(_cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = row
        cells = [
            first.ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    return [line(rows[0]), line(tuple("-" * w for w in widths)), *(line(row) for row in rows[1:])]


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        *(_value(result, provider) for provider in PROVIDERS),
        _number(result.ratio()),
        _number(result.paired_ratio()),
        _number(result.cpu_ratio()),
        _number(result.floor()),
        f"<= {result.target:.2f}" if result.target is not None else "-",
        result.verdict(),
    )


def _number(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _value(result: Result, provider: str) -> str:
    value = result.values.get(provider)
    if value is None:
        return "-"
    scale, unit = next((s for s in _SCALES[result.unit] if value >= s[0]), _SCALES[result.unit][-1])
    if provider not in result.samples:
        return f"{value / scale:.4g} {unit}"
    q = quantiles(result.samples[provider].wall)
    return f"{value / scale:.4g} {unit} [{q['p20'] / scale:.4g} {q['p80'] / scale:.4g}]"


def explain(results: list[Result]) -> list[str]:
    """The lines below the table that explain its columns."""
    lines = [
        "Medians of the wall clock [p20 p80]. ratio: peftkern / PEFT of the medians; 'added': what",
        "peftkern adds to the bare layer / what PEFT adds. paired: median of the rounds' ratios.",
        "CPU: ratio of the medians of CPU time. floor: bare / PEFT, what an adapter that costs",
        "nothing would reach. *: computed. A target is met when ratio and paired both are.",
    ]
    for r in results:
        for name in r.values.keys() - {*PROVIDERS}:
            ratio = r.values[OURS] / r.values[name]
            lines.append(f"{r.name}: {name} {_value(r, name)}, peftkern / {name} {ratio:.3f}")
    missed = [r.name for r in results if r.verdict() not in ("", "met")]
    if missed:
        lines.append(f"targets not met, or unclear: {'; '.join(missed)}")
    return lines


def machine() -> dict[str, Any]:
    """Facts of the machine and the code: processor, threads, versions, commit."""
    return {
        "cpu": _cpu_model(),
        "cpus": _cpus(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "peftkern": _our_version(),
        "commit": _commit(),
    }


def _our_version() -> str:
    from peftkern import __version__

    return __version__


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None without git."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
        except OSError:
            return None  # no git on this machine
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return f"{head}+" if head and git("status", "--porcelain", "-uno") else head


def save(results: list[Result]) -> Path:
    """Write the results with every round to a file named by date and time (UTC); returns it."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    content = {
        "date": now.isoformat(),
        "machine": machine(),
        "rows": [result.as_json() for result in results],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%dT%H%M%SZ}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
