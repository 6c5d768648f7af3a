"""The rows of ``make test-versions``, and the table of their results."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.machines import versions

ROOT = Path(__file__).resolve().parents[1]


def bounds(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in requirements)
    return {m[1]: m[2] for m in found if m}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lower_bounds_are_the_oldest_row() -> None:
    extras = project()["optional-dependencies"]
    needed = bounds(project()["dependencies"]) | bounds(extras["cli"])
    oldest = versions.ROWS[0]
    pinned = dict(pin.split("==") for pin in (*oldest.pins, *oldest.bare))
    pinned |= {"torch": oldest.torch}
    asked = bounds(extras["test"]) | needed
    run = {name: pin for name, pin in pinned.items() if name in asked}
    assert {name: Version(asked[name]) for name in run} == {n: Version(run[n]) for n in run}
    assert set(needed) - set(run) == set()


def test_each_python_that_is_said_to_do_is_a_row() -> None:
    rows = sorted({row.python for row in versions.ROWS}, key=Version)
    said = [
        line.rpartition(" ")[2]
        for line in project()["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    assert said == rows
    allowed = SpecifierSet(project()["requires-python"])
    assert [f"3.{minor}" for minor in range(99) if f"3.{minor}.5" in allowed] == rows
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py{rows[0].replace('.', '')}"
    assert tools["mypy"]["python_version"] == rows[0]


def test_rows_that_did_not_run_keep_their_lines(tmp_path: Path) -> None:
    table = tmp_path / "versions.md"
    table.write_text(f"above\n{versions._BEGIN}\n{versions._END}\nbelow\n")
    counts = {"passed": 3, "skipped": 2, "failed": 1}
    first, second, third = (
        versions.line_of(row, ["1.0"] * (1 + len(versions.SHOWN)), counts) for row in versions.ROWS
    )
    versions.write({"newest": third, "oldest": first}, table)
    versions.write({"CUDA target": second, "oldest": first.replace("1.0", "1.1")}, table)
    lines = table.read_text().splitlines()
    assert lines[0] == "above" and lines[-1] == "below"
    assert lines[4:-2] == [first.replace("1.0", "1.1"), second, third]
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:-2])


def test_a_python_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no Python 3\.1 "):
        versions.interpreter("3.1")
