"""Compares each kernel's traffic as counted without a GPU with the hardware's counters.

    python -m benchmarks.gpu.counters            launch every kernel once, print the reports

The former is the report of :mod:`benchmarks.kernels`. Under NVIDIA's ``ncu``, its ``read`` is
compared with DRAM bytes read, where caches are emptied before each kernel, and its ``written`` with
sectors written to L2: a result of a few MB stays in L2, so that DRAM would not show it.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from peftkern.kernels import common, launching

from ..kernels.entry import Operands
from ..kernels.table import entries, traffic
from ..kernels.traffic import Traffic
from .store import ROOT, Store

METRICS = ("dram__bytes_read.sum", "lts__t_sectors_op_write.sum")
SECTOR = 32
BETWEEN = (0.9, 1.25)  # the ratios counted / reported that agree
REPORT = "REPORT "


def launch_all(device: str, M: int, K: int) -> list[Traffic]:
    """The report of every launch of the entries' counted calls, in order, after running them.

    Operands are X [M, K] and W [K, K], r = 16, with a mask.
    """
    reports: list[Traffic] = []
    run = common.Launch.run

    def noted(self: Any) -> None:
        reports.append(traffic(self))
        run(self)

    torch.manual_seed(0)
    operands = Operands(device, M, K, N=K, r=16)
    calls = [call for entry in entries().values() for call in entry.counted(operands)]
    with launching.as_written(), mock.patch.object(common.Launch, "run", noted):
        for call in calls:
            call()
    return reports


def read_csv(text: str) -> list[tuple[str, dict[str, float]]]:
    """[(kernel, {metric: value})] from the output of ``ncu --csv --page raw --print-units base``.

    Raises:
        ValueError: the text has no such table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    found = []
    for row in csv.DictReader(lines[start:]):
        if not (row.get("ID") or "").isdigit():  # the line with the units
            continue
        values = {m: float((row.get(m) or "nan").replace(",", "")) for m in METRICS}
        found.append((row["Kernel Name"], values))
    return found


def compare(
    reports: list[dict[str, Any]], counted: list[tuple[str, dict[str, float]]]
) -> list[dict[str, Any]]:
    """A row for each launch: its reported and its counted traffic, and "passed" if they agree.

    Raises:
        ValueError: the numbers of launches differ.
    """
    if len(reports) != len(counted):
        raise ValueError(f"{len(reports)} launches reported, {len(counted)} counted")
    rows = []
    for i, (report, (kernel, values)) in enumerate(zip(reports, counted, strict=True)):
        read, written = values[METRICS[0]], values[METRICS[1]] * SECTOR
        ratios = {
            # a seed is less than the sector that is fetched for it
            "read": read / report["read"] if report["read"] >= SECTOR else None,
            "written": written / report["written"],
        }
        agrees = all(v is None or BETWEEN[0] <= v <= BETWEEN[1] for v in ratios.values())
        rows.append(
            {
                "key": f"{i} {report['name']}",
                "part": "counters",
                "kernel": kernel,
                "reported": {k: report[k] for k in ("read", "written", "requested")},
                "counted": {"read": read, "written": written},
                "ratios": ratios,
                "outcome": "passed" if agrees else "failed",
                "why": "" if agrees else f"counted / reported: {ratios}",
            }
        )
    return rows


def check(store: Store, until: float, dry: bool, env: dict[str, str]) -> None:
    """Put a row for each launch, or one that tells that ``ncu`` is absent or may not count."""
    tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    script = [sys.executable, "-m", "benchmarks.gpu.counters"]
    if dry or not Path(tool).exists():
        why = "ncu is not here"
        store.put({"key": "ncu", "part": "counters", "outcome": "absent", "why": why})
        store.finish([])
        return
    command = [
        tool, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
        "--cache-control", "all", "--metrics", ",".join(METRICS),
        "--kernel-name", "regex:^_[a-z_]+_kernel", "--target-processes", "all", *script,
    ]  # fmt: skip
    try:
        # first without the tool, so that everything is compiled
        subprocess.run(script, env=env, cwd=ROOT, capture_output=True, timeout=until - time.time())
        done = subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=until - time.time()
        )
    except subprocess.TimeoutExpired:
        store.put({"key": "ncu", "part": "counters", "outcome": "time limit"})
        store.finish([])
        return
    lines = [line for line in done.stdout.splitlines() if line.startswith(REPORT)]
    try:
        reports = json.loads(lines[0].removeprefix(REPORT)) if lines else []
        for row in compare(reports, read_csv(done.stdout)):
            store.put(row)
    except ValueError as e:
        tail = (done.stdout + done.stderr)[-2000:]
        why = f"{e}; exit status {done.returncode}"
        outcome = "unusable" if "ERR_NVGPUCTRPERM" in tail or "profiler" in tail else "failed"
        store.put({"key": "ncu", "part": "counters", "outcome": outcome, "why": why, "tail": tail})
    store.finish([])


def main() -> int:
    cuda = torch.cuda.is_available()
    reports = launch_all("cuda", 4096, 2048) if cuda else launch_all("cpu", 300, 64)
    print(REPORT + json.dumps([t._asdict() for t in reports]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
