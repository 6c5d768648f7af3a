"""Runs the suite on the user's model, and writes the report."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...files.atomic import write_text_atomically
from ..errors import RunError, UserError
from ..figures import can_draw
from ..modelio import hush_transformers
from ..ranks import on_cpu
from .settings import BenchSettings

_NEEDED = {
    "peft": "peft",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
}
SUITE = Path(__file__).parent / "suite" / "bench_model.py"


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure, write ``report.html`` and ``results.json`` into ``--out``; returns the content.

    Raises:
        UserError: the model cannot be loaded, packages are missing, or ``--out`` is a file.
        RunError: a row failed, or the libraries' numbers differ; both files are written.
    """
    absent = [name for name in _NEEDED if find_spec(name.replace("-", "_")) is None]
    if absent:
        raise UserError(f"bench needs {', '.join(absent)}: pip install {' '.join(absent)}")
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; it must be a folder")
    hush_transformers()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    content = _measured(settings)
    out.mkdir(parents=True, exist_ok=True)
    from .page import render, verdict

    write_text_atomically(out / "results.json", json.dumps(content, indent=1) + "\n")
    write_text_atomically(out / "report.html", render(content))
    print(verdict(content["rows"], content["wrong"], content["failed"]))
    if not can_draw():
        print("report.html has no plot without 'matplotlib': pip install matplotlib")
    print(f"written: {out / 'report.html'}, {out / 'results.json'}")
    if content["failed"]:
        raise RunError("; ".join(f"{name}: {why}" for name, why in content["failed"].items()))
    if content["wrong"]:
        raise RunError(f"the numbers of peftkern and HF PEFT differ: {'; '.join(content['wrong'])}")
    return content


def _measured(settings: BenchSettings) -> dict[str, Any]:
    import pytest

    from .base import base_of
    from .contest import Contest
    from .host import Host
    from .rows import machine

    device = torch.device(
        "cuda" if torch.cuda.is_available() and not on_cpu(settings.cpu) else "cpu"
    )
    contest = Contest(base_of(settings).to(device), settings, device)
    host = Host(contest)
    words = io.StringIO()
    args = [
        str(SUITE), "-q", "--benchmark-only", "--benchmark-quiet", "--tb=line",
        "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "peftkern.cli.bench.plugin",
        "-c", os.devnull, "--rootdir", str(SUITE.parent), "--confcutdir", str(SUITE.parent),
        "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*",
        "-k", " or ".join(f"bench_{part}" for part in settings.parts),
    ]  # fmt: skip
    with contest, contextlib.redirect_stdout(words):
        code = pytest.main(args, plugins=[host])
    if code not in (0, 1) or not (host.rows or host.failed):
        raise RunError(f"the suite did not run: {words.getvalue().strip()[-500:]}")
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    model = settings.model or "a random Llama, 256 wide with 4 layers"
    name = Path(model).resolve().name if settings.model else model
    return {
        "title": f"peftkern beside HF PEFT: {name}",
        "what": f"{model}, {settings.dtype}, on {device.type}; {now:%Y-%m-%d %H:%M} UTC",
        "date": now.isoformat(),
        "machine": machine(gpu=device.type == "cuda"),
        "work": {k: v for k, v in vars(settings).items() if k not in ("out", "model")},
        "missing": contest.missing,
        "wrong": host.wrong,
        "failed": host.failed,
        "rows": [row.as_json() for row in host.rows if row.name != "training step for memory"],
    }
