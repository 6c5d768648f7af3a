"""Options of a benchmark run, the ``compare`` fixture, and the table at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.host import report
from benchmarks.host.measure import OURS, Kind, Result, Work, interleave, quantiles

_RESULTS = pytest.StashKey[list[Result]]()


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


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftkern benchmarks")
    group.addoption("--threads", type=int, default=1, help="torch's CPU threads (1)")
    group.addoption("--rounds", type=int, default=None, help="timed rounds, for every row")
    group.addoption(
        "--save-results", action="store_true", help="write benchmarks/results/cpu/<date>.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    for option, least in (("threads", 1), ("rounds", 2)):
        value = config.getoption(option)
        if value is not None and value < least:
            raise pytest.UsageError(f"--{option}: {value} was given, at least {least} is allowed")
    torch.set_num_threads(config.getoption("threads"))
    config.stash[_RESULTS] = []


def pytest_report_header() -> str:
    found = report.machine()
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    return f"{found['cpu']}, torch threads: {found['threads']} of {found['cpus']} CPUs; {versions}"


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
        rounds = request.config.getoption("rounds") or rounds
        samples = interleave(works, rounds, calls, warmup)
        medians = {provider: quantiles(s.wall)["p50"] for provider, s in samples.items()}
        result = Result(name, "s", medians, samples, kind, target, note)
        request.config.stash[_RESULTS].append(result)
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
        request.config.stash[_RESULTS].append(result)
        benchmark.extra_info.setdefault("bytes", {})[name] = values
        return result

    return add


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[_RESULTS]
    if not results:
        return
    terminalreporter.section(
        f"peftkern / HF PEFT / bare; torch threads: {torch.get_num_threads()}; "
        f"load {', '.join(f'{x:.1f}' for x in os.getloadavg())}"
    )
    for line in report.table(results):
        terminalreporter.write_line(line)
    for line in report.explain(results):
        terminalreporter.write_line(line)
    if config.getoption("save_results"):
        terminalreporter.write_line(f"written: {report.save(results)}")
