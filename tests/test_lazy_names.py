"""Names that come when they are asked for: what type checkers are told of them is what comes."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.test_imports import LAZY

ROOT = Path(__file__).resolve().parents[1]


def source_of(package: str) -> str:
    return (ROOT / package.replace(".", "/") / "__init__.py").read_text()


def told_to_checkers(source: str) -> list[tuple[str, str]]:
    """(module, name) of what is imported under `if TYPE_CHECKING:`, each handed on by its name."""
    told = []
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            assert block.orelse == []
            for node in block.body:
                assert isinstance(node, ast.ImportFrom), ast.unparse(node)
                for alias in node.names:
                    assert alias.asname == alias.name, f"{alias.name} is not handed on"
                    told.append(("." * node.level + (node.module or ""), alias.name))
    return told


def table(source: str) -> list[tuple[str, str]]:
    """(module, name) of `_WHERE`, in which the names come at run time."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_WHERE":
            where = ast.literal_eval(node.value)
            return [(module, name) for module, names in where.items() for name in names.split()]
    raise AssertionError("no `_WHERE`")


def differences(source: str) -> list[tuple[str, str]]:
    told, comes = told_to_checkers(source), table(source)
    assert len({name for _, name in comes}) == len(comes), "a name stands twice in `_WHERE`"
    return sorted(set(told) ^ set(comes))


@pytest.mark.parametrize("package", sorted(LAZY))
def test_checkers_are_told_what_comes(package: str) -> None:
    assert differences(source_of(package)) == []


@pytest.mark.parametrize("package", sorted(LAZY))
def test_checkers_see_no_getattr_that_gives_anything(package: str) -> None:
    """With it every misspelt name would be of type `Any`."""
    shown = [
        node
        for node in ast.parse(source_of(package)).body
        if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
    ]
    assert shown == []


@pytest.mark.parametrize("package", sorted(LAZY))
def test_every_name_comes(package: str) -> None:
    module = importlib.import_module(package)
    for where, name in table(source_of(package)):
        assert getattr(module, name) is getattr(importlib.import_module(where, package), name)
    assert set(module.__all__) - {"__version__"} == {n for _, n in table(source_of(package))}
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "mistake",
    [
        ("    from .lora import VeloraConfig as VeloraConfig\n", ""),  # forgotten
        ("from .lora import VeloraConfig", "from .velora import VeloraConfig"),  # elsewhere
        ('_WHERE = {\n    ".lora": (\n        "', '_WHERE = {\n    ".lora": (\n        "New '),
    ],
)
def test_differences_are_seen(mistake: tuple[str, str]) -> None:
    source = source_of("peftkern.tuners")
    assert mistake[0] in source
    assert differences(source.replace(*mistake))


def test_no_file_has_the_name_of_what_is_exported() -> None:
    """`import peftkern.explain`, in whatever file, would put the module in the function's place."""
    import pkgutil

    import peftkern

    assert not {m.name for m in pkgutil.iter_modules(peftkern.__path__)} & set(peftkern.__all__)
