"""Rows of results as text, and what they were measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .measure import OURS, PROVIDERS, Result, quantiles

_HEADINGS = ("row", *PROVIDERS, "ratio", "paired", "CPU", "floor", "target", "")
_PEERS = ("liger-kernel", "unsloth", "lorafusion")
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


def machine(gpu: bool = True) -> dict[str, Any]:
    """Facts of the machine and the code: processor, GPU (if ``gpu``), threads, versions."""
    on_gpu = gpu and torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cpus": _cpus(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions("torch", "transformers", "peft", *_PEERS),
        "peftkern": _our_version(),
    }


def _versions(*names: str) -> dict[str, str]:
    """{package: its version} of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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
