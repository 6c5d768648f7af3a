"""Plans: what a call decides and starts is kept for calls of its kind (kernels/launching.py)."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from tests.children import ROOT
from tests.kernels.compiler import python

CODE = "".join(
    Path(__file__).with_name(name).read_text(encoding="utf-8")
    for name in ("on_standin.py", "on_cases.py")
)
CHECKS = re.findall(r"^def (check_\w+)", CODE, re.MULTILINE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """{check: its traceback, or None}, of a process that does not interpret kernels.

    It has caches of its own: what other tests write meanwhile must not come between two calls.
    """
    cache = tmp_path_factory.mktemp("caches")
    code = f"from tests.kernels.on_standin import run; run({CHECKS!r})"
    done = python("-c", code, cache=cache, TRITON_CACHE_DIR=str(cache / "triton"))
    assert done.returncode == 0, done.stderr
    results: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("check", CHECKS)
def test_plans(found: dict[str, str | None], check: str) -> None:
    assert found[check] is None, found[check]


def test_the_interpreter_runs_everything_as_written() -> None:
    from peftkern.kernels import launching

    assert launching.why_not == "Triton's interpreter"


def test_every_function_that_launches_is_planned() -> None:
    found = {}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                launches = "launch.run()" in ast.unparse(node)
                if launches:
                    decorators = [ast.unparse(d) for d in node.decorator_list]
                    found[path.stem, node.name] = any(d.startswith("planned(") for d in decorators)
    assert len(found) > 12 and all(found.values()), found
