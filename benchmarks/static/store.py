"""Kept results of ``benchmarks.static``: those committed for a version of Triton, and the user's.

Both map a key (``benchmarks.static.key``) to the compiler's facts. A committed row also names its
first case and its config for readers of the file; only the facts are used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "static"
FACTS = (
    "warps", "registers", "spilled", "stack", "shared", "tensor_memory", "instructions",
    "loads", "stores", "products", "serialized",
)  # fmt: skip
MOST_KEPT = 5000  # rows in the user's file; beyond that the oldest are dropped

Facts = dict[str, Any]


def committed_file() -> Path:
    return FOLDER / f"triton-{triton.__version__}.json"


def user_file() -> Path:
    base = os.environ.get("PEFTKERN_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "peftkern"
    )
    return Path(base) / f"static-{triton.__version__}.json"


def _replace(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text``, at once; not at all on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _facts(row: dict[str, Any]) -> Facts:
    return {name: row[name] for name in FACTS}


def load_committed() -> dict[str, Facts]:
    """The committed rows of this Triton.

    When the file is broken, as after a merge, there are none, and a line on stderr tells it.
    """
    path = committed_file()
    try:
        return {row["key"]: _facts(row) for row in json.loads(path.read_text("utf-8"))["rows"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        print(
            f"{path.name} is not used, it is no file of results ({type(error).__name__}: {error}); "
            "--refresh writes it anew",
            file=sys.stderr,
        )
        return {}


def save_committed(rows: Iterable[dict[str, Any]]) -> Path:
    """Write the committed file, one line for each compiled kernel; returns its path.

    Lines are in the order of the cases; rows without a result are left out.
    """
    lines: dict[str, str] = {}
    for row in rows:
        if "error" not in row and row["key"] not in lines:
            names = ("arch", "case", "kernel", *FACTS, "config", "key")
            lines[row["key"]] = json.dumps({n: row[n] for n in names})
    head = json.dumps({"triton": triton.__version__})[:-1]
    _replace(committed_file(), head + ', "rows": [\n' + ",\n".join(lines.values()) + "\n]}\n")
    return committed_file()


def load_user() -> dict[str, Facts]:
    try:
        kept = json.loads(user_file().read_text("utf-8"))
        return {key: _facts(facts) for key, facts in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def add_to_user(new: dict[str, Facts]) -> None:
    kept = list((load_user() | new).items())[-MOST_KEPT:]
    _replace(user_file(), json.dumps(dict(kept)))
