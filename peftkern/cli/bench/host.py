"""The plugin that gives the suite its models, shows how far it is, and keeps its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .contest import APART, Contest
from .plugin import RESULTS


class Host:
    """What pytest calls while the suite runs.

    Attributes:
        rows: what was measured.
        wrong: in words, where the libraries' numbers differ.
        failed: {row: its error}.
    """

    def __init__(self, contest: Contest) -> None:
        self._contest = contest
        self.rows: list[Any] = []
        self.wrong: list[str] = []
        self.failed: dict[str, str] = {}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: Any = None

    @pytest.fixture
    def contest(self) -> Contest:
        """The models."""
        return self._contest

    @pytest.fixture
    def agree(self) -> Callable[[str, Any, Any], None]:
        """A function that notes a difference between ours and theirs beyond rounding."""
        limit = APART[self._contest.settings.dtype]

        def check(what: str, ours: Any, theirs: Any) -> None:
            ours, theirs = ours.detach().double(), theirs.detach().double()
            apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            if not apart <= limit:
                self.wrong.append(f"{what} by {apart:.1e} of the largest (allowed {limit:g})")

        return check

    def pytest_collection_finish(self, session: Any) -> None:
        """Start the bar."""
        if self._bar.console.is_terminal:
            self._bar.start()
        self._task = self._bar.add_task("measuring", total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say which row is next."""
        name = nodeid.rpartition("::")[2].removeprefix("bench_")
        self._bar.update(self._task, description=name.replace("[", ", ").rstrip("]"))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the error of a row that failed."""
        if report.failed:
            name = report.nodeid.rpartition("::")[2].removeprefix("bench_")
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            self.failed[name] = " ".join(text.split())[:300]
        if report.when == "teardown":
            self._bar.advance(self._task)

    def pytest_sessionfinish(self, session: Any) -> None:
        """Keep the rows."""
        self._bar.stop()
        self.rows = session.config.stash.get(RESULTS, [])
