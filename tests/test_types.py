"""What type checkers are told: no `self` is of any type."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "peftkern").rglob("*.py"))


def selves_of_any_type(source: str) -> list[int]:
    """Lines of methods whose `self` is annotated as `Any`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for arg in node.args.args[:1]
        if arg.arg == "self" and arg.annotation is not None and ast.unparse(arg.annotation) == "Any"
    ]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_self_is_of_any_type(path: Path) -> None:
    assert selves_of_any_type(path.read_text()) == []


def test_a_self_of_any_type_is_seen() -> None:
    assert selves_of_any_type("class A:\n    def f(self: Any, x: int) -> None: ...") == [2]
    assert selves_of_any_type("class A:\n    def f(self: Adapted, x: Any) -> None: ...") == []
