"""What a GPU has measured, from the files of ``benchmarks.gpu``, to stand beside the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from ..gpu.report import OWN, us
from ..gpu.store import RESULTS, Store, sources
from .gpus import GPUS


class Measured(NamedTuple):
    """A row of a results file, and whether it measured the code that is here."""

    row: dict[str, Any]
    present: bool


def is_of(facts: dict[str, Any], gpu: str) -> bool:
    """True when a results file's facts of its device are those of ``gpu``, a name of ``GPUS``.

    Name and number of multiprocessors have to agree: an H100 PCIe has other rates.
    """
    name = facts.get("name", "").replace("RTX ", "RTX")
    return bool(re.search(rf"\b{gpu}\b", name)) and facts.get("sms") == GPUS[gpu].arch[0]


def rows_of(gpu: str, folder: Path | None = None) -> dict[str, Measured]:
    """{key: row} that a GPU of this name has measured; of each key the newest.

    Dry runs, whose clock is fake, do not count.
    """
    found = []
    for path in (folder or RESULTS).glob("*/*.json"):
        try:
            data = Store.open(path).data
        except (OSError, ValueError):
            continue  # of another kind, such as the CPU's, or cut off while it was written
        if is_of(data.get("gpu", {}), gpu) and not data.get("dry"):
            found.append(data)
    found.sort(key=lambda data: data["started"])
    here = sources() if found else ""
    return {
        row["key"]: Measured(row, data["sources"] == here)
        for data in found
        for row in data["rows"]
        if "providers" in row
    }


def microseconds(rows: dict[str, Measured], key: str, provider: str) -> float | None:
    """The median of a provider of ``benchmarks.gpu`` in the row ``key``.

    None when nobody measured it; of peftkern's providers also when its code was another, as the
    model is of the code that is here.
    """
    if key not in rows or (provider in OWN and not rows[key].present):
        return None
    return us(rows[key].row, provider)
