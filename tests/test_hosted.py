"""Files for a code host: the workflow names existing commands, and the forms are valid."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .pages import ROOT, read, tracked

WORKFLOWS = [n for n in tracked() if n.startswith(".github/workflows/")]
FORMS = [n for n in tracked() if n.startswith(".github/ISSUE_TEMPLATE/") and "config" not in n]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.M))
PINNED = set(re.findall(r"^([\w-]+)==", read("constraints.txt"), re.M))


def commands(workflow: dict[str, Any]) -> Iterator[list[str]]:
    """The words of every line that a workflow runs."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield shlex.split(line)


def problem(words: list[str]) -> str | None:
    """The reason that a command fails on a machine with a checkout and Python; None if it runs."""
    program, rest = words[0], words[1:]
    if program == "make":
        return None if rest and set(rest) <= TARGETS else f"no target: {rest}"
    if program == "ruff":
        known = rest[:1] in (["check"], ["format"]) and rest[-1] == "."
        return None if known else f"ruff has no {rest}"
    if program == "pip":
        known = rest[:3] == ["install", "-c", "constraints.txt"] and set(rest[3:]) <= PINNED
        return None if known else f"not pinned: {rest}"
    is_script = program == "bash" and len(rest) == 1 and (ROOT / rest[0]).is_file()
    return None if is_script else f"no such command: {words}"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_names_what_there_is(name: str) -> None:
    workflow = yaml.safe_load(read(name))
    assert set(workflow) >= {"name", True, "jobs", "permissions"}  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    found = list(commands(workflow))
    assert found and [p for words in found if (p := problem(words))] == []
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] > 0
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


@pytest.mark.parametrize(
    "line, right",
    [
        ("make docs", True),
        ("make dcos", False),
        ("bash .ci/run", True),
        ("bash .ci/walk", False),
        ("tox", False),
        ("ruff format --check .", True),
        ("ruff forma .", False),
        ("pip install -c constraints.txt ruff", True),
        ("pip install ruff", False),
    ],
)
def test_a_command_that_is_not_there_is_seen(line: str, right: bool) -> None:
    assert (problem(line.split()) is None) == right


def test_the_workflow_runs_all_that_must_pass() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    jobs = workflow["jobs"]
    lines = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert "bash .ci/run" in lines["test"] and "make docs" in lines["docs"]
    assert "ruff format --check ." in lines["format"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    # the Makefile's own defaults, so that a hosted machine installs what everybody does
    assert re.search(r"vars\.TORCH \|\| '(.*?)'", workflow["env"]["TORCH"])[1] in read("Makefile")
    assert jobs["test"]["env"]["PYTHON"] == "python${{ matrix.python }}"


@pytest.mark.parametrize("name", FORMS)
def test_a_form_asks_something(name: str) -> None:
    form = yaml.safe_load(read(name))
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown"}
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names) >= 3
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_the_forms_are_there() -> None:
    assert {Path(name).stem for name in FORMS} == {"bug_report", "feature_request"}
