"""The host's time of a launch and of a training linear on the kernels; see :mod:`.launches`."""

from __future__ import annotations

from typing import Any

import pytest

from . import launches


def test_launches(
    benchmark: Any, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = request.config.getoption("rounds") or 21
    found = benchmark.pedantic(lambda: list(launches.rows(rounds)), rounds=1)
    benchmark.extra_info["rows"] = [row._asdict() for row in found]
    with capsys.disabled():
        print("", *launches.table(found), sep="\n")
    assert all(row.planned < row.written for row in found)
