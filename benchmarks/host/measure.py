"""Time several providers side by side, and keep what each of them did in every round.

Providers take turns within one process (A B C, then B C A, ...), so that a neighbour on the machine
slows all of them alike, and the ratio within a round means something even where the times do not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

BARE, PEFT, OURS = "bare", "PEFT", "peftkern"
PROVIDERS = (BARE, PEFT, OURS)

Kind = Literal["ratio", "added"]


@dataclass(frozen=True)
class Work:
    """What one provider does in a round. Only ``run`` is timed.

    ``prepare`` returns the arguments of ``run``; what ``run`` returns is kept alive until the clock
    has stopped, and then handed to ``cleanup``.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] | None = None
    cleanup: Callable[[Any], Any] | None = None


@dataclass
class Samples:
    """Seconds per call, one entry a round: by the wall clock, and of CPU time of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @classmethod
    def add(cls, parts: list[Samples]) -> Samples:
        """Several samples as one, in the order given."""
        return cls([t for s in parts for t in s.wall], [t for s in parts for t in s.cpu])


@dataclass
class Result:
    """One row of the table.

    ``values`` is what is shown for each provider, in ``unit`` "s" or "B"; ``samples`` is empty for
    what is counted and not timed. A target is an upper bound of the ratio.
    """

    name: str
    unit: Literal["s", "B"]
    values: dict[str, float]
    samples: dict[str, Samples] = field(default_factory=dict)
    kind: Kind = "ratio"
    target: float | None = None
    note: str = ""

    def ratio(self) -> float:
        """peftkern against HF PEFT, from the medians (wall clock) or counts."""
        return compare(self.kind, self.values)

    def cpu_ratio(self) -> float | None:
        """The same from the medians of CPU time; None where nothing was timed."""
        if not self.samples:
            return None
        return compare(self.kind, {n: statistics.median(s.cpu) for n, s in self.samples.items()})

    def paired_ratio(self) -> float | None:
        """The median of the ratios of every single round; None where nothing was timed."""
        if not self.samples:
            return None
        names = list(self.samples)
        rounds = zip(*(self.samples[n].wall for n in names), strict=True)
        return statistics.median(
            compare(self.kind, dict(zip(names, times, strict=True))) for times in rounds
        )

    def floor(self) -> float | None:
        """bare / PEFT by the wall clock: the ratio of an adapter that costs nothing. None where
        nothing was timed, or bare is left out already."""
        if not self.samples or BARE not in self.values or self.kind == "added":
            return None
        return self.values[BARE] / self.values[PEFT]

    def verdict(self) -> str:
        """The word for the table: "unclear" when the two ratios of the wall clock disagree."""
        if self.target is None:
            return ""
        ratios = {self.ratio() <= self.target, (self.paired_ratio() or self.ratio()) <= self.target}
        return "unclear" if len(ratios) > 1 else "met" if ratios.pop() else "NOT met"

    def as_json(self) -> dict[str, Any]:
        """All of it, every round included, as plain data."""
        return {
            "row": self.name,
            "note": self.note,
            "unit": self.unit,
            "kind": self.kind,
            "values": self.values,
            "quantiles": {n: quantiles(s.wall) for n, s in self.samples.items()},
            "cpu_quantiles": {n: quantiles(s.cpu) for n, s in self.samples.items()},
            "ratio": self.ratio(),
            "paired_ratio": self.paired_ratio(),
            "cpu_ratio": self.cpu_ratio(),
            "floor": self.floor(),
            "target": self.target,
            "verdict": self.verdict(),
            "rounds": {n: {"wall": s.wall, "cpu": s.cpu} for n, s in self.samples.items()},
        }


def compare(kind: Kind, values: Mapping[str, float]) -> float:
    """peftkern / PEFT, or with ``added`` the same of what each adds to the bare layer.

    NaN where PEFT adds nothing, or takes nothing.
    """
    floor = values[BARE] if kind == "added" else 0.0
    below = values[PEFT] - floor
    return (values[OURS] - floor) / below if below > 0 else float("nan")


def quantiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": statistics.median(times), "p80": tenths[7]}


def interleave(
    works: Mapping[str, Work], rounds: int, calls: int = 1, warmup: int = 2
) -> dict[str, Samples]:
    """Seconds per call of every provider, ``rounds`` times, the providers taking turns.

    Args:
        works: what each provider does.
        rounds: how many rounds are kept.
        calls: calls of ``run`` in a row, timed together; the mean counts. For what takes
            microseconds.
        warmup: rounds before, which are not kept.
    """
    names = list(works)
    samples = {name: Samples() for name in names}
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # what lives already need not be looked at after every round
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                wall, cpu = _round(works[name], calls)
                if i >= 0:
                    samples[name].wall.append(wall / calls)
                    samples[name].cpu.append(cpu / calls)
            gc.collect()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
    return samples


def _round(work: Work, calls: int) -> tuple[float, float]:
    """(wall, CPU) seconds of ``calls`` calls."""
    run = work.run
    args = work.prepare() if work.prepare is not None else ()
    out: Any = None
    cpu = time.process_time()
    wall = time.perf_counter()
    for _ in repeat(None, calls):
        out = run(*args)
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    if work.cleanup is not None:
        work.cleanup(out)
    return wall, cpu


def check_equal(what: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """AssertionError unless the two agree within ``tolerance`` of the largest element of ``theirs``
    (and no less than that of 1, for outputs of ordinary size)."""
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = (ours - theirs).abs().max().item()
    allowed = tolerance * max(1.0, theirs.abs().max().item())
    assert difference <= allowed, f"{what}: differs by {difference:.2e}, allowed {allowed:.2e}"


def kept_bytes(forward: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``forward``, each storage once, without those
    of ``weights``."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            # holding the storage keeps its address from being given out twice
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes on the CPU that ``run`` leaves allocated while what it returned is alive, and the most
    that it had at once, both beyond what was there before: counted from the allocator's own events,
    memory within operators included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = run()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    del out
    return now, most
