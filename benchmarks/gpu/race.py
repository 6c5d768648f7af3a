"""The race: times every candidate config of a kernel on one bucket of shapes, after a check.

Configs with wrong results are thrown out, the others are timed in CUDA graphs. The race also times
every way to run a whole operation, with the configs that have won so far, as a user calls it (or in
a graph, for a case with ``graph``).

A case gives one row of the results and one entry of the tuning table (:mod:`kernels.tuning`).
"""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import asdict
from typing import Any

from peftkern.kernels import tuning
from peftkern.kernels.grad_sb import TWO_PASS
from peftkern.ops import choices, tuned

from .contest import Contest, RaceCase
from .device import Device
from .numerics import LIMITS, relative
from .race_cases import contest
from .store import Broken, Watch
from .timing import Timed, interleave

MOST_COPIES = 16


def copies_for(case: RaceCase, device: Device) -> int:
    if device.dry:
        return 1
    size = 2 * (case.rows * (case.n + case.k) + max(1, case.experts) * case.n * case.k)
    return max(1, min(MOST_COPIES, -(-3 * device.l2 // max(size, 1))))


def measure(
    case: RaceCase,
    device: Device,
    *,
    seconds: float,
    watch: Watch | None = None,
    found: tuning.Table | None = None,
) -> dict[str, Any]:
    """The row of a case: each entrant's error and quantiles of microseconds, or why it is out.

    Whole operations run with the configs of ``found``.

    Raises:
        Broken: the device is unusable after an entrant ran.
    """
    with contextlib.ExitStack() as stack:
        if case.whole and found is not None:
            stack.enter_context(tuned.measured_with(found))
        return _measure(case, device, seconds, watch)


def _measure(case: RaceCase, device: Device, seconds: float, watch: Watch | None) -> dict[str, Any]:
    began = time.monotonic()
    watch = watch or Watch()
    shown = case
    if device.dry:
        case = case.tiny()
    copies = copies_for(case, device)
    held = contest(case, device, copies)
    entrants = dict(list(held.entrants.items())[:2]) if device.dry else held.entrants
    if device.dry:  # two configs suffice, and every entrant that is not a config
        entrants |= {k: v for k, v in held.entrants.items() if isinstance(v, str)}
    row: dict[str, Any] = {
        "key": shown.key,
        "part": "race",
        "case": asdict(case),
        "copies": copies,
        "entrants": {},
    }
    exact = held.exact()
    works: dict[str, Timed] = {}
    for label, config in entrants.items():
        entry = row["entrants"][label] = {
            "config": asdict(config) if hasattr(config, "__dataclass_fields__") else None
        }
        if label in watch.banned:
            entry["ok"], entry["why"] = False, f"left out after: {watch.banned[label]}"
            continue
        watch.at(label)
        try:
            device.poison(2 * case.rows * max(case.n, case.k))
            outs = held.run(config, 0)
            error = max(relative(o, e) for o, e in zip(outs, exact, strict=True))
            entry["error"] = error if error == error else None
            entry["ok"] = error <= LIMITS[case.dtype]
            if entry["ok"]:
                works[label] = _timed(held, config, copies, device, case)
        except Exception as e:
            if device.is_broken():
                raise Broken(label, e) from e
            entry["ok"], entry["why"] = False, f"{type(e).__name__}: {str(e)[:200]}"
    del exact
    watch.at(None)
    if works:
        for label, q in interleave(works, device, seconds, most=20, least=5).items():
            row["entrants"][label]["us"] = q
    row["seconds"] = round(time.monotonic() - began, 2)
    del held, works
    gc.collect()
    device.empty()
    return row


def _timed(held: Contest, config: Any, copies: int, device: Device, case: RaceCase) -> Timed:
    def run() -> None:
        for i in range(copies):
            held.run(config, i)

    if case.whole and not case.graph:
        run()
        return Timed(run, copies, host=True)
    return Timed(device.capture(run), copies)


def warm(case: RaceCase, device: Device) -> None:
    """Compile every entrant of a case by one run of each, without a check."""
    held = contest(case.tiny() if device.dry else case, device, 1)
    for config in held.entrants.values():
        try:
            held.run(config, 0)
        except Exception:  # the race will report it
            if device.is_broken():
                raise
    device.synchronize()


def entries(row: dict[str, Any]) -> list[tuning.Entry]:
    """The tuning table's entries from a row; none when every config was wrong or failed."""
    if "entrants" not in row:
        return []
    case = RaceCase(**row["case"])
    timed = {n: e for n, e in row["entrants"].items() if "us" in e}
    times = {n: e["us"]["p50"] for n, e in timed.items()}

    def entry(name: str, choice: str | None, beside: str, **more: Any) -> tuning.Entry:
        us = {q: timed[name]["us"][q] for q in ("p20", "p50", "p80")}
        config = timed[name]["config"]
        return tuning.Entry(
            case.table_key, choice, config, us, times.get(beside), len(timed), **more
        )

    if case.whole:
        if choices.TORCH not in times:
            return []
        best = choices.winner(times)
        out = {
            n: str(e.get("why") or f"error {e.get('error')}")
            for n, e in row["entrants"].items()
            if n not in times
        }
        return [entry(best, best, choices.TORCH, times=times, left_out=out)]
    if not times:
        return []
    best = min(times, key=lambda name: times[name])
    choice = None
    if case.op == "grad_sb":
        choice = TWO_PASS if best == TWO_PASS else "one_pass"
    return [entry(best, choice, "default")]


def table(data: dict[str, Any]) -> tuning.Table:
    """The tuning table from a results file's content."""
    made = tuning.Table(data["gpu"], data["versions"], data["kernels"], data["updated"])
    for row in data["rows"]:
        made.add(entries(row))
    return made
