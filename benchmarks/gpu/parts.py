"""The parts of ``benchmarks.gpu`` that measure case after case, each in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from . import cases as gpu_cases
from .device import Cuda, Device, Dry
from .store import Broken, Store, Watch

BROKEN = 75  # exit status: the device is unusable in this process, so start another one


@dataclass(frozen=True)
class Part:
    """A part; ``measure`` gives the row of a case, which counts as hung after ``limit_s``."""

    name: str
    budget_s: int
    limit_s: int
    least_s: int  # seconds that must be left to start another case
    cases: Callable[[], Sequence[Any]]
    measure: Callable[[Any, Device, Store, float, Watch], dict[str, Any]]
    warm: Callable[[Any, Device], None] | None = None
    least_of: Callable[[Any], int] | None = None  # where cases differ much, in place of ``least_s``
    warm_key: Callable[[Any], Any] = lambda case: case.key


def _block(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    if not isinstance(case, gpu_cases.Case):
        from . import extra as gpu_extra

        return gpu_extra.measure(case, device, seconds=0.3)
    from . import run as gpu_run

    rounds = 0.8 if case.block == "layer" else 0.4
    return gpu_run.measure(
        case, device, store.data["ceilings"], seconds=rounds, left_s=left, watch=watch
    )


def _warm_block(case: Any, device: Device) -> None:
    from . import run as gpu_run

    if isinstance(case, gpu_cases.Case):
        gpu_run.warm(case, device)


def _decode_cases() -> list[Any]:
    from . import extra as gpu_extra

    cases: list[Any] = [*gpu_cases.decode_cases()]
    return cases[:2] + gpu_extra.cases() + cases[2:]


def _race_cases() -> Sequence[Any]:
    from .race_cases import race_cases

    return race_cases()


def _race(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    from . import race as gpu_race

    found = gpu_race.table(store.data) if case.whole else None
    return gpu_race.measure(case, device, seconds=0.25, watch=watch, found=found)


def _warm_race(case: Any, device: Device) -> None:
    from . import race as gpu_race

    gpu_race.warm(case, device)


def _model_cases() -> Sequence[Any]:
    from . import model as gpu_model

    return gpu_model.cases()


def _model(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    from . import model as gpu_model

    rate = store.data["ceilings"]["bf16_tflop_s"] * 1e12
    return gpu_model.measure(case, device, rate, seconds=min(20.0, left / 4), watch=watch)


def _headline_cases() -> Sequence[Any]:
    from . import headline as gpu_headline

    return gpu_headline.cases()


def _headline(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    """The row of a case of another part, measured as that part does."""
    from . import experts as gpu_experts
    from . import model as gpu_model
    from . import prefix as gpu_prefix

    way = _block
    if isinstance(case, gpu_prefix.PrefixCase):
        way = _prefix
    elif isinstance(case, gpu_experts.ExpertsCase):
        way = _experts
    elif isinstance(case, gpu_model.ModelCase):
        way = _model
    return {**way(case, device, store, left, watch), "part": "headline"}


def _headline_least(case: Any) -> int:
    from . import headline as gpu_headline

    return gpu_headline.least_s(case)


def _prefix_cases() -> Sequence[Any]:
    from . import prefix as gpu_prefix

    return gpu_prefix.cases()


def _prefix(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    from . import prefix as gpu_prefix

    return gpu_prefix.measure(case, device, store.data["ceilings"], seconds=0.3, watch=watch)


def _experts_cases() -> Sequence[Any]:
    from . import experts as gpu_experts

    return gpu_experts.cases()


def _experts(case: Any, device: Device, store: Store, left: float, watch: Watch) -> dict[str, Any]:
    from . import experts as gpu_experts

    return gpu_experts.measure(case, device, store.data["ceilings"], seconds=0.6, watch=watch)


def _warm_experts(case: Any, device: Device) -> None:
    from . import experts as gpu_experts

    gpu_experts.warm(case, device)


def _quantised_cases() -> Sequence[Any]:
    from . import quantised as gpu_quantised

    return gpu_quantised.cases()


def _quantised(
    case: Any, device: Device, store: Store, left: float, watch: Watch
) -> dict[str, Any]:
    from . import quantised as gpu_quantised

    return gpu_quantised.measure(case, device, store.data["ceilings"], seconds=0.3, watch=watch)


def _warm_quantised(case: Any, device: Device) -> None:
    from . import quantised as gpu_quantised

    gpu_quantised.warm(case, device)


PARTS = {
    part.name: part
    for part in (
        Part("race", 300, 90, 4, _race_cases, _race, _warm_race, None,
             lambda c: (c.op, c.r, c.mask, c.group, c.m > 16, c.m > 2048)),
        Part("linear", 200, 120, 5, gpu_cases.linear_cases, _block, _warm_block),
        Part("group", 120, 120, 6, gpu_cases.group_cases, _block, _warm_block),
        Part("layer", 100, 150, 12, gpu_cases.layer_cases, _block, _warm_block),
        Part("e2e", 180, 150, 25, _model_cases, _model),
        Part("decode", 70, 60, 4, _decode_cases, _block, _warm_block),
        Part("prefix", 60, 60, 4, _prefix_cases, _prefix),
        Part("experts", 120, 120, 10, _experts_cases, _experts, _warm_experts),
        Part("quantised", 90, 120, 4, _quantised_cases, _quantised, _warm_quantised),
        Part("headline", 290, 150, 5, _headline_cases, _headline, _warm_block, _headline_least),
    )
}  # fmt: skip


def device_of(dry: bool) -> Device:
    """The device to measure on.

    Raises:
        RuntimeError: there is no CUDA device, and this is not a dry run.
    """
    if dry:
        return Dry()
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; --dry-run goes through everything without one")
    return Cuda()


def kinds(part: Part) -> list[Any]:
    """One case of each kind, for a dry run."""

    def kind(case: Any) -> Any:
        if part.name == "headline":
            return case.key
        if isinstance(case, gpu_cases.Case):
            return case.block, case.what, case.graph, case.p > 0
        if part.name == "race":
            return case.op, case.mask, case.group > 1, case.graph
        if part.name == "prefix":
            return case.what
        if part.name == "experts":
            return case.layer, case.what
        if part.name == "quantised":  # each base once, and each kind of row
            return case.base if case.M == 1 else case.what
        return getattr(case, "checkpointing", type(case).__name__)

    return gpu_cases.first_of_each(part.cases(), kind)


def chosen(part: Part, dry: bool, only: str | None, most: int | None) -> list[Any]:
    cases = [c for c in (kinds(part) if dry else part.cases()) if only is None or only in c.key]
    return cases[:most]


@contextlib.contextmanager
def _auto_decides() -> Iterator[None]:
    """Let ``auto`` race in a dry run too, in Triton's interpreter, and keep none of the results."""
    from peftkern.kernels.tuning import Table
    from peftkern.ops import backend, race, tuned

    with (
        mock.patch.object(backend, "_no_choice", lambda: None),
        mock.patch.object(race, "BUDGET_S", 0.0),
        tuned.measured_with(Table({}, {}, "", "")),
    ):
        yield


def work(part: Part, store: Store, cases: Sequence[Any], until: float, dry: bool) -> int:
    """Measure cases until ``until``; returns the exit status, :data:`BROKEN` or 0."""
    with _auto_decides() if dry else contextlib.nullcontext():
        return _work(part, store, cases, until, dry)


def _work(part: Part, store: Store, cases: Sequence[Any], until: float, dry: bool) -> int:
    device = device_of(dry)
    torch.backends.cuda.matmul.allow_tf32 = False
    gc.freeze()
    done = store.done()
    left_out = []
    for case in cases:
        if case.key in done:
            continue
        left = until - time.time()
        if left < (part.least_of(case) if part.least_of else part.least_s):
            left_out.append(case.key)
            continue
        store.begin(case.key, part.limit_s)
        try:
            row = part.measure(case, device, store, left, store.watch(case.key))
        except Broken as e:
            print(f"BROKEN by {e.culprit} in {case.key}: {e}", flush=True)
            store.blame(str(e), e.culprit)
            return BROKEN
        except Exception as e:
            why = f"{type(e).__name__}: {str(e)[:300]}"
            print(f"FAILED {case.key}: {why}", flush=True)
            if device.is_broken():
                store.blame(why)
                return BROKEN
            row = {"key": case.key, "part": part.name, "error": why}
            gc.collect()
            device.empty()
        store.put(row)
        print(_line(row), flush=True)
    store.finish(left_out)
    return 0


def _line(row: dict[str, Any]) -> str:
    """One line for the log on a row."""
    entries = row.get("providers") or row.get("entrants") or {}
    timed = {name: e["us"]["p50"] for name, e in entries.items() if "us" in e}
    # only a string: in a race "error" is a number
    failed = {name for name, e in entries.items() if isinstance(e.get("error"), str)}
    wrong = [name for name, e in entries.items() if e.get("ok") is False or name in failed]
    if row["part"] == "race" and timed:
        best = min(timed, key=lambda n: timed[n])
        base = "default" if "default" in timed else "torch"
        timed = {base: timed.get(base, float("nan")), best: timed[best]}
        wrong = [f"{len(wrong)} of {len(entries)}"] if wrong else []
    text = "  ".join(f"{name} {t:.1f}" for name, t in timed.items())
    tail = f"  OUT: {', '.join(wrong)}" if wrong else ""
    return f"{row['key']}: {row.get('error', text)}{tail}  ({row.get('seconds', 0)} s)"


def warm(part: Part, share: tuple[int, int], until: float, dry: bool) -> None:
    """Compile every ``share[1]``-th kind of case from number ``share[0]`` on, until ``until``."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if part.warm is None:
        return
    device = device_of(dry)
    unique = gpu_cases.first_of_each(part.cases(), part.warm_key)
    for case in unique[share[0] :: share[1]]:
        if time.time() > until:
            return
        try:
            part.warm(case, device)
        except Exception:  # the measurement will report it
            if device.is_broken():
                return
        device.empty()
