"""What a GPU has measured, from the files of ``benchmarks.gpu``, to stand beside the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..gpu.report import us
from ..gpu.store import RESULTS, SCHEMA


def _contents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # cut off while it was written
        if isinstance(data, dict) and data.get("schema") == SCHEMA and "rows" in data:
            yield data


def rows_of(gpu: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """{key: row} that the GPU of this name in ``GPUS`` has measured; of each key the newest.

    Dry runs, whose clock is fake, do not count.
    """
    found = [
        data
        for data in _contents(folder)
        if gpu in data.get("gpu", {}).get("name", "").replace(" ", "") and not data.get("dry")
    ]
    found.sort(key=lambda data: data["started"])
    return {row["key"]: row for data in found for row in data["rows"] if "providers" in row}


def microseconds(rows: dict[str, dict[str, Any]], key: str, provider: str) -> float | None:
    """The median of a provider of ``benchmarks.gpu`` in the row ``key``; None without one."""
    return us(rows[key], provider) if key in rows else None
