"""Options of a benchmark run, and the table at the end; the fixtures are the package's."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.host import report
from peftkern.cli.bench.plugin import RESULTS
from peftkern.cli.bench.plugin import compare as compare
from peftkern.cli.bench.plugin import count as count
from peftkern.cli.bench.plugin import (
    pytest_collection_modifyitems as pytest_collection_modifyitems,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftkern benchmarks")
    group.addoption("--threads", type=int, default=1, help="torch's CPU threads (1)")
    group.addoption("--rounds", type=int, default=None, help="timed rounds, for every row")
    group.addoption(
        "--report", metavar="FILE", help="write the rows as a page, like peftkern bench's"
    )
    group.addoption(
        "--save-results", action="store_true", help="write benchmarks/results/cpu/<date>.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    for option, least in (("threads", 1), ("rounds", 2)):
        value = config.getoption(option)
        if value is not None and value < least:
            raise pytest.UsageError(f"--{option}: {value} was given, at least {least} is allowed")
    torch.set_num_threads(config.getoption("threads"))
    config.stash[RESULTS] = []  # the fixtures add to it


def pytest_report_header() -> str:
    found = report.machine()
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    return f"{found['cpu']}, torch threads: {found['threads']} of {found['cpus']} CPUs; {versions}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[RESULTS]
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
    if config.getoption("report"):
        terminalreporter.write_line(f"written: {report.page(results, config.getoption('report'))}")
    if config.getoption("save_results"):
        terminalreporter.write_line(f"written: {report.save(results)}")
