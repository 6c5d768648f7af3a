"""Fixtures that measure rows under pytest-benchmark, for ``peftkern bench`` and ``make bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from .measure import OURS, Kind, Result, Work, interleave, quantiles

RESULTS = pytest.StashKey[list[Result]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


class ReplayClock:
    """A clock that lets pytest-benchmark record times that were measured before.

    The fixture of pytest-benchmark times one function alone, but here the providers take turns. So
    they are measured first and then replayed: ``play`` advances this clock by one recorded round.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, times: Iterator[float]) -> None:
        self.now += next(times)


_clock = ReplayClock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_clock))


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """A function that measures the providers of one row and adds the row to the table.

    pytest-benchmark gets peftkern's rounds, and the other providers' in ``extra_info``.
    """

    def measure(
        name: str,
        works: Mapping[str, Work],
        *,
        rounds: int = 15,
        calls: int = 1,
        warmup: int = 2,
        kind: Kind = "ratio",
        target: float | None = None,
        note: str = "",
    ) -> Result:
        rounds = request.config.getoption("rounds", None) or rounds
        samples = interleave(works, rounds, calls, warmup)
        medians = {provider: quantiles(s.wall)["p50"] for provider, s in samples.items()}
        result = Result(name, "s", medians, samples, kind, target, note)
        request.config.stash[RESULTS].append(result)
        benchmark.extra_info.update({k: v for k, v in result.as_json().items() if k != "rounds"})
        times = iter(samples[OURS].wall)
        benchmark.pedantic(_clock.play, args=(times,), rounds=rounds)
        return result

    return measure


@pytest.fixture
def count(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Result]:
    """A function that adds a row of counted bytes to the table.

    The bytes also go to ``extra_info`` of the test's timed row.
    """

    def add(
        name: str,
        values: dict[str, float],
        *,
        kind: Kind = "ratio",
        target: float | None = None,
        note: str = "",
    ) -> Result:
        result = Result(name, "B", values, kind=kind, target=target, note=note)
        request.config.stash[RESULTS].append(result)
        benchmark.extra_info.setdefault("bytes", {})[name] = values
        return result

    return add
