"""Imports: from lower layers only, without circles, and at HF PEFT's paths.

Also tested is that private attributes of a PeftModel are used only where they may be.
"""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = sorted(p for p in (ROOT / "peftkern").rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that `tree` imports at any depth, absolute; `package` resolves `from .x`.

    Imports for the type checker alone don't count: they never run.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported_names(ast.Module(node.orelse, []), package)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base]).rstrip(".")
            # `from peftkern import tuners` imports a module, `from torch import nn` names one.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from imported_names(node, package)


def imports_of(path: Path) -> list[str]:
    here = module_of(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    return list(imported_names(ast.parse(path.read_text()), package))


def test_imported_names_sees_every_form() -> None:
    source = """
    import a.b, c
    from d import e
    from . import f
    from ..g import h
    if TYPE_CHECKING:
        import never
    else:
        import i
    def late():
        try:
            import j
        except ImportError:
            from .k import l
    """
    tree = ast.parse(textwrap.dedent(source))
    assert list(imported_names(tree, "top.mid")) == [
        *("a.b", "c", "d.e", "top.mid.f", "top.g.h", "i", "j", "top.mid.k.l"),
    ]


def test_kernels_is_no_package() -> None:
    assert (ROOT / "kernels").is_dir()
    assert [str(p) for p in (ROOT / "kernels").rglob("__init__.py")] == []


def kernel_leaks(path: Path) -> list[str]:
    """The modules that a kernel file imports but must not depend on."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    names = [n for n in imports_of(path) if not n.startswith("peftkern.kernels.")]
    return [n for n in names if n.split(".")[0] not in allowed]


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.name)
def test_kernel_files_know_tensors_only(path: Path) -> None:
    assert kernel_leaks(path) == []


# The layers, from the ground up: a file imports from its own or from one below. What is not named
# here stands at the entry (get_peft_model, auto, fuse, explain, helpers). `utils` holds what has no
# layer of its own.
LAYERS = (
    {"_version", "files", "utils", "kernels"},
    {"configs", "ops"},
    {"tuners"},
    {"checkpoint"},
    {"model"},
    {"entry"},
    {"cli", "__main__"},
)
# HF PEFT's addresses that stand below what they hand on. Nothing of ours imports them, and they
# hold nothing but imports (`test_faces_only_hand_on`).
FACES = {
    *("config", "mapping_func", "peft_model"),
    *("tuners.lora.config", "tuners.lora.layer", "tuners.lora.variants"),
    *("tuners.p_tuning.config", "tuners.tuners_utils"),
    *("tuners.prefix_tuning.config", "tuners.prompt_tuning.config"),
    *("utils.hotswap", "utils.other", "utils.save_and_load"),
}

# names that come when they are asked for, from whatever layer they are of
LAZY = {"peftkern", "peftkern.tuners", "peftkern.utils"}


def layer_of(module: str) -> int:
    """The layer of `peftkern.X` or of anything inside it, counted from the ground."""
    room = module.split(".")[1]
    at = [i for i, layer in enumerate(LAYERS) if room in layer]
    return at[0] if at else next(i for i, layer in enumerate(LAYERS) if "entry" in layer)


def module_of(path: Path) -> str:
    """The dotted name of a file, `peftkern.X`; a folder's `__init__` has the folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("peftkern", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_breaches(path: Path) -> list[str]:
    """The modules that a file of the package imports from a layer above its own."""
    here, breaches = module_of(path), []
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        room = rest.split(".")[0]
        if top != "peftkern":
            continue
        # `from peftkern import get_peft_model` goes through the exports, that is, to the entry
        if layer_of(name) > layer_of(here):
            breaches.append(name)
        elif here.startswith("peftkern.ops") and room not in ("ops", "kernels"):
            # ops know kernels and tensors, and of ours nothing else but torch's private names
            if not name.startswith("peftkern.utils.private."):
                breaches.append(name)
    return breaches


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module in LAZY or module.removeprefix("peftkern.") in FACES:
        pytest.skip("it hands on names of layers above")
    assert import_breaches(path) == []


def strings_imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules that are named in strings.

    These are arguments of `import_module` and the tables of lazy names (`_WHERE`).
    """

    def absolute(text: str) -> str:
        level = len(text) - len(text.lstrip("."))
        parents = package.split(".")
        parents = parents[: len(parents) - (level - 1)] if level else []
        return ".".join([*parents, text.lstrip(".")])

    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found = list(node.args[:1])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            if ast.unparse(node.targets[0]) == "_WHERE":
                found = [key for key in node.value.keys if key is not None]
        for part in found:
            if isinstance(part, ast.Constant) and str(part.value).startswith((".", "peftkern.")):
                yield absolute(str(part.value))


def import_graph(paths: list[Path]) -> dict[str, set[str]]:
    """{file: files that it imports}, at any depth, in strings too."""
    names = {module_of(path) for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        here = module_of(path)
        package = here if path.name == "__init__.py" else here.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        graph[here] = set()
        for name in (*imported_names(tree, package), *strings_imported(tree, package)):
            while name and name not in names:
                name = name.rpartition(".")[0]
            graph[here] |= {name} - {"", here}
    return graph


@functools.cache
def graph_of(folder: str) -> dict[str, set[str]]:
    """:func:`import_graph` of a folder of the checkout; the kernels are in the package's."""
    more = KERNEL_FILES if folder == "peftkern" else []
    return import_graph([*sorted((ROOT / folder).rglob("*.py")), *more])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_names_that_come_later_stand_in_known_tables() -> None:
    """A file whose names are imported when they are asked for has its table in `_WHERE`."""
    for path in PACKAGE_FILES:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        later = [n for n in functions if n.name == "__getattr__"]
        if later and "import_module" in ast.unparse(later[0]):
            assert module_of(path) in LAZY and "_WHERE" in path.read_text(), path


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"]]


def test_strings_that_import_are_seen() -> None:
    source = """
    import importlib
    importlib.import_module(".tasks", __package__)
    _WHERE = {"..auto": "names", ".model": "PeftModel"}
    importlib.import_module("peftkern.checkpoint.x")
    other = {".no": "module"}
    """
    found = set(strings_imported(ast.parse(textwrap.dedent(source)), "top.mid"))
    assert found == {"top.mid.tasks", "top.auto", "top.mid.model", "peftkern.checkpoint.x"}


@pytest.mark.parametrize("folder", ["peftkern", "benchmarks", "tests"])
def test_no_file_imports_itself_through_others(folder: str) -> None:
    assert circles(graph_of(folder)) == []


@pytest.mark.parametrize("face", sorted(FACES))
def test_faces_only_hand_on(face: str) -> None:
    module = f"peftkern.{face}"
    path = ROOT / (module.replace(".", "/") + ".py")
    for node in ast.parse(path.read_text()).body:
        doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert doc or names or isinstance(node, ast.ImportFrom), ast.unparse(node)
    graph = graph_of("peftkern")
    assert {other for other, imported in graph.items() if module in imported} <= LAZY


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *KERNEL_FILES], ids=lambda p: p.name)
def test_nothing_shipped_needs_what_is_not(path: Path) -> None:
    roots = {n.split(".")[0] for n in imports_of(path)}
    assert not roots & {"tests", "benchmarks", "kernels"}


def test_every_folder_of_the_package_is_one() -> None:
    folders = {p.parent for p in PACKAGE_FILES}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


# -------------------------------------------------------------------- what a PeftModel keeps


# HF PEFT's name for what `adapter_names` go through; its users open it themselves
OPEN = {"_enable_peft_forward_hooks"}


def private_names(tree: ast.AST) -> set[str]:
    """Private names that classes define, or that methods give their object."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {d.name for d in node.body if isinstance(d, ast.FunctionDef)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return {name for name in found if name.startswith("_") and not name.startswith("__")} - OPEN


def test_nothing_reaches_into_a_peft_model() -> None:
    own = sorted((ROOT / "peftkern" / "model").glob("*.py"))
    names: set[str] = set().union(*(private_names(ast.parse(p.read_text())) for p in own))
    assert {"_add_heads", "_adapters_disabled"} <= names
    # what tuners define under the same name is theirs
    reached = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path in PACKAGE_FILES
        if path not in own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in names
        if ast.unparse(node.value) != "self"
    ]
    assert reached == []


def test_a_peft_model_does_not_ask_which_kind_it_has() -> None:
    for path in (ROOT / "peftkern" / "model").glob("*.py"):
        if path.name != "prompt_names.py":  # where HF PEFT's name of it stands
            assert "is_prompt_learning" not in path.read_text(), path
