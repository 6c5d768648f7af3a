"""Times several providers on the device, which take turns.

Events bracket a few calls. Every provider runs once a round and the order rotates, so that a clock
that drifts or a busy neighbour affects all providers alike.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from .device import Device

REGION_S = 2e-3  # the least time between two events, so that their own cost does not count


@dataclass(frozen=True)
class Timed:
    """Work to time: ``run`` does ``inner`` calls, one on each rotated buffer, within ``mode``.

    With ``host`` the host's time counts too, as the device waits for it.
    """

    run: Callable[[], Any]
    inner: int = 1
    mode: Callable[[], AbstractContextManager[Any]] = nullcontext
    host: bool = False


def quantiles(times: list[float]) -> dict[str, float]:
    """{"p20", "p50", "p80", "rounds"} of the times."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "p20": tenths[1],
        "p50": statistics.median(times),
        "p80": tenths[7],
        "rounds": len(times),
    }


def interleave(
    works: Mapping[str, Timed], device: Device, seconds: float, *, most: int = 40, least: int = 8
) -> dict[str, dict[str, float]]:
    """{provider: quantiles of the microseconds of one call}.

    Args:
        works: the work of each provider; each has run once before, so that nothing compiles here.
        seconds: the device time for all rounds, of which there are ``least`` to ``most``.
    """
    if device.dry:
        most = least = 2
    names = list(works)
    for name in names:  # warm up clocks and caches
        with works[name].mode():
            for _ in range(1 if device.dry else 2):
                works[name].run()
    device.synchronize()
    once = {name: max(_time(works[name], 1 if device.dry else 2, device), 1e-6) for name in names}
    longest = 1 if device.dry else 100
    repeats = {n: max(1, min(longest, round(REGION_S / t + 0.5))) for n, t in once.items()}
    cost = sum(once[n] * repeats[n] for n in names)
    rounds = max(least, min(most, int(seconds / cost)))
    times: dict[str, list[float]] = {name: [] for name in names}
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                spent = _time(works[name], repeats[name], device)
                times[name].append(spent / works[name].inner * 1e6)
    finally:
        if was_on:
            gc.enable()
    return {name: quantiles(t) for name, t in times.items()}


def _time(work: Timed, repeats: int, device: Device) -> float:
    """Seconds of one ``run``, as the mean of ``repeats`` in a row."""
    start, end = device.event(), device.event()
    with work.mode():
        device.synchronize()
        if not work.host:
            device.occupy()
        start.record()
        for _ in range(repeats):
            work.run()
        end.record()
        device.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
