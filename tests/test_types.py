"""Annotations for type checkers: no `self: Any`, and types in all code that runs on the host."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Self, get_type_hints

import pytest

import peftkern

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "peftkern").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def test_what_makes_a_peft_model_says_so() -> None:
    """With `Any` a checker and an editor know no method of what everybody's script holds."""
    for makes in (peftkern.get_peft_model, peftkern.AutoPeftModel.from_pretrained):
        assert get_type_hints(makes)["return"] is peftkern.PeftModel
    assert get_type_hints(peftkern.PeftModel.from_pretrained)["return"] is Self


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


# Triton's own functions, which are not Python's
DEVICE = {"triton.jit", "device_function"}


def without_types(source: str) -> list[str]:
    """Functions that run on the host and lack the type of a parameter, or of what they return."""
    found = []
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef):
                if {ast.unparse(d).partition("(")[0] for d in node.decorator_list} & DEVICE:
                    continue  # nor what stands in it
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                given += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
                typed = all(a.annotation or a.arg in ("self", "cls") for a in given)
                if node.name in DEVICE:
                    continue  # its text is in the key of every compiled kernel, types and all
                if not typed or node.returns is None:
                    found.append(node.name)
            pending.append(node)
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_the_host_side_of_kernels_has_types(path: Path) -> None:
    """mypy must not ask it of Triton's functions, so it cannot of these."""
    assert without_types(path.read_text()) == []


def test_functions_without_types_are_seen() -> None:
    source = """
@triton.jit(do_not_specialize=["M"])
def kernel(x, M, BLOCK: tl.constexpr):
    pass
@device_function
def tile(x):
    pass
def launch(x: Tensor, M) -> Tensor:
    def grid(meta: dict[str, int]):
        pass
class Config:
    @property
    def bytes(self):
        pass
    def fine(self, *sizes: int) -> None:
        pass
"""
    assert sorted(without_types(source)) == ["bytes", "grid", "launch"]
