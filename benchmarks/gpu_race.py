"""The race: every candidate config of a kernel on one bucket of shapes, wrong ones thrown out
first, then timed in CUDA graphs; and hybrid against fused against torch with what won.

A case gives one row of the results and one or two entries of the tuning table
(:mod:`kernels.tuning`): the best config of the kernel itself, and for the products the
implementation to choose."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict
from typing import Any

from peftkern.kernels import tuning

from .gpu_candidates import Contest, RaceCase, contest
from .gpu_device import Device
from .gpu_numerics import LIMITS, relative
from .gpu_store import Broken, Watch
from .gpu_timing import Timed, interleave

MOST_COPIES = 16
# a raced op with implementations beside its configs -> (op of the choice, name of the kernel's own)
CHOICE_OF = {
    "gemm": ("forward", "fused"),
    "gemm_grad_input": ("grad_input", "fused"),
    "small": ("decode", "small"),
    "outer": ("grad_output", "one_pass"),
}
IMPLEMENTATIONS = ("torch", "hybrid", "two_pass")


def copies_for(case: RaceCase, device: Device) -> int:
    if device.dry:
        return 1
    size = 2 * (case.m * (case.n + case.k) + case.n * case.k)
    return max(1, min(MOST_COPIES, -(-3 * device.l2 // max(size, 1))))


def measure(
    case: RaceCase, device: Device, *, seconds: float, watch: Watch | None = None
) -> dict[str, Any]:
    """The row: for each entrant its error and quantiles of us, or why it is out; :class:`Broken`
    when the device is unusable after it."""
    began = time.monotonic()
    watch = watch or Watch()
    shown = case
    if device.dry:
        case = case.tiny()
    copies = copies_for(case, device)
    held = contest(case, device, copies)
    entrants = dict(list(held.entrants.items())[:2]) if device.dry else held.entrants
    if device.dry:  # and those that are no config
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
            device.poison(2 * case.m * max(case.n, case.k))
            outs = held.run(config, 0)
            error = max(relative(o, e) for o, e in zip(outs, exact, strict=True))
            entry["error"] = error if error == error else None
            entry["ok"] = error <= LIMITS[case.dtype]
            if entry["ok"]:
                works[label] = Timed(_graph(held, config, copies, device), copies)
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


def _graph(held: Contest, config: Any, copies: int, device: Device) -> Any:
    def run() -> None:
        for i in range(copies):
            held.run(config, i)

    return device.capture(run)


def warm(case: RaceCase, device: Device) -> None:
    """Compile every entrant of a case: one run of each, nothing checked."""
    held = contest(case.tiny() if device.dry else case, device, 1)
    for config in held.entrants.values():
        try:
            held.run(config, 0)
        except Exception:  # reported where it is raced
            if device.is_broken():
                raise
    device.synchronize()


def entries(row: dict[str, Any]) -> list[tuning.Entry]:
    """The table entries of a row; none when every config was wrong or failed."""
    if "entrants" not in row:
        return []
    case = RaceCase(**row["case"])
    timed = {n: e for n, e in row["entrants"].items() if "us" in e}
    configs = {n: e for n, e in timed.items() if n not in IMPLEMENTATIONS}
    key = case.table_key
    found = []

    def p50(name: str) -> float:
        return timed[name]["us"]["p50"]

    def entry(op: str, choice: str | None, name: str, count: int) -> tuning.Entry:
        return tuning.Entry(
            tuning.Key(**asdict(key) | {"op": op}), choice, timed[name]["config"],
            {q: timed[name]["us"][q] for q in ("p20", "p50", "p80")},
            p50("default") if "default" in timed else None, count,
        )  # fmt: skip

    if configs:
        found.append(entry(case.op, None, min(configs, key=p50), len(configs)))
    if case.op in CHOICE_OF and timed:
        op, own = CHOICE_OF[case.op]
        best = min(timed, key=p50)
        found.append(entry(op, best if best in IMPLEMENTATIONS else own, best, len(timed)))
    return found


def table(data: dict[str, Any]) -> tuning.Table:
    """The tuning table out of a results file's content."""
    made = tuning.Table(data["gpu"], data["versions"], data["sources"], data["updated"])
    for row in data["rows"]:
        made.add(entries(row))
    return made
