"""Times several providers that take turns, and keeps the times of every round.

They take turns within one process (A B C, then B C A, ...), so that other load on the machine slows
all of them alike, and the ratio within a round is useful even when the times are not.
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
    """The work of one provider in a round, of which only ``run`` is timed.

    ``prepare`` returns the arguments of ``run``; the result of ``run`` is kept alive until the
    clock has stopped, and then passed to ``cleanup``. Work that is done in another process has
    ``timed`` instead, which does a number of calls there and returns their :func:`time_round`.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] | None = None
    cleanup: Callable[[Any], Any] | None = None
    timed: Callable[[int], tuple[float, float]] | None = None


@dataclass
class Samples:
    """Seconds per call, one entry a round, by the wall clock and in CPU time of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @classmethod
    def add(cls, parts: list[Samples]) -> Samples:
        """Several samples as one, in the order given."""
        return cls([t for s in parts for t in s.wall], [t for s in parts for t in s.cpu])


@dataclass
class Result:
    """One row of the table.

    ``values`` has the number to show for each provider, in ``unit`` "s" or "B"; ``samples`` is
    empty in a row of counts. ``target`` is an upper bound of the ratio.
    """

    name: str
    unit: Literal["s", "B"]
    values: dict[str, float]
    samples: dict[str, Samples] = field(default_factory=dict)
    kind: Kind = "ratio"
    target: float | None = None
    note: str = ""

    def ratio(self) -> float:
        """peftkern / PEFT, from the medians by the wall clock or from the counts."""
        return compare(self.kind, self.values)

    def cpu_ratio(self) -> float | None:
        """The same ratio from the medians of CPU time; None when nothing was timed."""
        if not self.samples:
            return None
        return compare(self.kind, {n: statistics.median(s.cpu) for n, s in self.samples.items()})

    def paired_ratio(self) -> float | None:
        """The median of the ratios within each round; None when nothing was timed."""
        if not self.samples:
            return None
        names = list(self.samples)
        rounds = zip(*(self.samples[n].wall for n in names), strict=True)
        return statistics.median(
            compare(self.kind, dict(zip(names, times, strict=True))) for times in rounds
        )

    def floor(self) -> float | None:
        """bare / PEFT by the wall clock, the ratio of an adapter that costs nothing.

        None when nothing was timed, there is no bare provider, or it is subtracted already.
        """
        if not self.samples or BARE not in self.values or self.kind == "added":
            return None
        return self.values[BARE] / self.values[PEFT]

    def verdict(self) -> str:
        """The table's last word: "met", "NOT met", "unclear" if the two ratios disagree, or ""."""
        if self.target is None:
            return ""
        ratios = {self.ratio() <= self.target, (self.paired_ratio() or self.ratio()) <= self.target}
        return "unclear" if len(ratios) > 1 else "met" if ratios.pop() else "NOT met"

    def as_json(self) -> dict[str, Any]:
        """The row with its rounds as plain data."""
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
    """peftkern / PEFT, or for the kind "added" the same ratio of what each adds to the bare layer.

    NaN when PEFT's part of the ratio is not positive.
    """
    floor = values[BARE] if kind == "added" else 0.0
    below = values[PEFT] - floor
    return (values[OURS] - floor) / below if below > 0 else float("nan")


def quantiles(times: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of the times."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": statistics.median(times), "p80": tenths[7]}


def interleave(
    works: Mapping[str, Work], rounds: int, calls: int = 1, warmup: int = 2
) -> dict[str, Samples]:
    """Seconds per call of every provider in ``rounds`` rounds, in which they take turns.

    Args:
        works: the work of each provider.
        rounds: the number of rounds that are kept.
        calls: calls of ``run`` in a row that are timed together, for work of microseconds; their
            mean counts.
        warmup: rounds before those, which are not kept.
    """
    names = list(works)
    samples = {name: Samples() for name in names}
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that collecting after a round skips all earlier objects
    gc.disable()
    try:
        for i in range(-warmup, rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                wall, cpu = time_round(works[name], calls)
                if i >= 0:
                    samples[name].wall.append(wall / calls)
                    samples[name].cpu.append(cpu / calls)
            gc.collect()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
    return samples


def time_round(work: Work, calls: int) -> tuple[float, float]:
    """(wall, CPU) seconds of ``calls`` calls."""
    if work.timed is not None:
        return work.timed(calls)
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
    """Raise AssertionError unless the tensors agree within ``tolerance``.

    ``tolerance`` is relative to the largest element of ``theirs``, or to 1 if that is larger.
    """
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    difference = (ours - theirs).abs().max().item()
    allowed = tolerance * max(1.0, theirs.abs().max().item())
    assert difference <= allowed, f"{what}: differs by {difference:.2e}, allowed {allowed:.2e}"


def _storages(t: Any) -> list[Any]:
    """The storages behind a tensor; of a quantised weight, those of its parts."""
    parts: list[Any]
    if hasattr(t, "packed"):
        parts = list(t.packed.tensors)
    elif hasattr(t, "__tensor_flatten__"):
        parts = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
    else:
        return [t.untyped_storage()]
    return [storage for part in parts for storage in _storages(part)]


def kept_bytes(forward: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``forward``.

    Each storage counts once, and those of ``weights`` not at all.
    """
    known = {s.data_ptr() for w in weights for s in _storages(w)}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        for storage in _storages(t):
            if storage.data_ptr() not in known:
                # held, so that no other storage gets the same address
                kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    total: int = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """(bytes left allocated, most bytes at once) of ``run`` on the CPU, beyond those before it.

    The first is counted while its result is alive. Both come from the allocator's own events, so
    that memory within operators counts too.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    del out
    return now, most
