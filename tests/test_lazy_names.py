"""Lazy names: their types for type checkers are those of the objects that are then imported."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
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
    assert not hasattr(module, "no.such") and not hasattr(module, "__nothing__")


# which files of `peft` are its attributes after `import peft`; which of those given are not
# attributes of `peftkern` after `import peftkern`
_FILES_OF_PEFT = """
import types
import peft

def files(module):
    for name, value in list(vars(module).items()):
        if isinstance(value, types.ModuleType) and value.__name__ == f"{module.__name__}.{name}":
            yield value.__name__.partition(".")[2]
            yield from files(value)

print(*files(peft))
"""
_FILES_OF_OURS = """
import functools, sys
import peftkern

for name in sys.argv[1:]:
    try:
        functools.reduce(getattr, name.split("."), peftkern)
    except AttributeError:
        print(name)
"""


def run_python(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


def test_files_are_there_without_an_import_as_in_hf_peft() -> None:
    """`import peft` is enough for `peft.tuners.lora.layer.Linear`."""
    theirs = run_python(_FILES_OF_PEFT)
    assert "tuners.lora.layer" in theirs
    both = [name for name in theirs if (ROOT / "peftkern" / name.replace(".", "/")).is_dir()]
    both += [n for n in theirs if (ROOT / f"peftkern/{n.replace('.', '/')}.py").is_file()]
    assert len(both) > 35
    assert run_python(_FILES_OF_OURS, *both) == []


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
