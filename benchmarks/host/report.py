"""The file that rows are saved in."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from peftkern.cli.bench import rows
from peftkern.cli.bench.measure import Result
from peftkern.cli.bench.rows import explain as explain
from peftkern.cli.bench.rows import table as table

RESULTS = Path(__file__).parents[1] / "results" / "cpu"


def machine() -> dict[str, Any]:
    """Facts of the machine and the code, this checkout's commit included."""
    return {**rows.machine(), "commit": _commit()}


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


def page(results: list[Result], path: str) -> str:
    """Write the rows as a page of HTML, which needs no other file; returns ``path``."""
    from peftkern.cli.bench.page import render
    from peftkern.files.atomic import write_text_atomically

    content = {
        "title": "make bench: peftkern beside HF PEFT",
        "machine": machine(),
        "rows": [result.as_json() for result in results],
    }
    write_text_atomically(path, render(content))
    return path


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
