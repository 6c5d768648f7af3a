"""Real text on every machine: functions and docstrings of the running Python's standard library.

The result depends only on the installed standard library and on the seed: files are taken in the
order of their paths. Whole files are held out, so that no held-out example is from the same module
as a training example.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

# Installed packages, tests and vendored code are not the standard library's own text.
_SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "_bundled",
        "lib2to3",
    }
)
PROMPT = "Python function:\n\n{source}\n\nIts docstring, in a few words:\n\n"

TOPICS: dict[str, tuple[str, ...]] = {
    "internet": (
        "email", "http", "urllib", "imaplib", "smtplib", "ftplib", "poplib", "xmlrpc", "wsgiref",
        "mailbox", "ssl", "socket", "socketserver", "ipaddress", "nntplib", "telnetlib", "cgi",
    ),
    "concurrency": (
        "asyncio", "multiprocessing", "threading", "concurrent", "queue", "selectors", "sched",
        "subprocess", "_threading_local",
    ),
    "testing and debugging": (
        "unittest", "doctest", "pdb", "bdb", "trace", "traceback", "tracemalloc", "inspect", "dis",
        "profile", "cProfile", "pstats", "timeit", "symtable",
    ),
    "files and archives": (
        "tarfile", "zipfile", "shutil", "pathlib", "tempfile", "_pyio", "gzip", "bz2", "lzma", "os",
        "fileinput", "glob", "filecmp", "zipimport", "posixpath", "ntpath", "genericpath",
    ),
    "numbers and dates": (
        "_pydecimal", "fractions", "statistics", "datetime", "_pydatetime", "calendar", "random",
        "numbers", "_strptime", "zoneinfo",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Mined:
    """One example; ``module``: the file's path below the standard library, ``target``: answer."""

    module: str
    name: str
    text: str
    target: str


def stdlib_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def functions(root: Path | None = None) -> list[Mined]:
    """Examples (source of a function without its docstring, the docstring), of moderate length.

    Comments are kept. Of functions with equal source or docstring only one is used.
    """
    found: list[Mined] = []
    seen: set[str] = set()
    for module, source, tree in _parsed(root or stdlib_folder()):
        lines = source.split("\n")  # as ast counts lines: a form feed does not end one
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            doc = ast.get_docstring(node)
            if doc is None or not 20 <= len(doc) <= 200 or not doc.isascii():
                continue
            code = _without_docstring(node, lines)
            if code is None or not 60 <= len(code) <= 600 or not {code, doc}.isdisjoint(seen):
                continue
            seen |= {code, doc}
            found.append(Mined(module, node.name, PROMPT.format(source=code), doc))
    return _some(found, root)


def topics(root: Path | None = None) -> list[Mined]:
    """Examples (docstring, the topic of its package, a key of TOPICS)."""
    topic_of = {package: topic for topic, packages in TOPICS.items() for package in packages}
    found: list[Mined] = []
    seen: set[str] = set()
    for module, _, tree in _parsed(root or stdlib_folder()):
        topic = topic_of.get(module.split("/")[0].removesuffix(".py"))
        if topic is None:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            doc = ast.get_docstring(node)
            if doc is None or len(doc) < 40 or doc in seen:
                continue
            seen.add(doc)
            found.append(Mined(module, node.name, doc[:600], topic))
    return _some(found, root)


def split_by_module(
    items: list[Mined], held_out: int, seed: int, per_module: int = 4, by_target: bool = False
) -> tuple[list[Mined], list[Mined]]:
    """(training, held-out) examples from disjoint sets of files, each shuffled with ``seed``.

    Files are drawn until there are ``held_out`` examples (with ``by_target``, of each target), at
    most ``per_module`` from each file. The rest of a drawn file is not used. The drawn files have
    at most a third of all examples.
    """
    rng = random.Random(seed)
    held: list[Mined] = []
    training: list[Mined] = []
    for target in sorted({i.target for i in items}) if by_target else [None]:
        by_module: dict[str, list[Mined]] = {}
        for item in items:
            if target is None or item.target == target:
                by_module.setdefault(item.module, []).append(item)
        modules = sorted(by_module)
        rng.shuffle(modules)
        missing = held_out
        spare = sum(map(len, by_module.values())) // 3
        for module in modules:
            own = by_module[module]
            if missing > 0 and len(own) <= spare:
                spare -= len(own)
                chosen = rng.sample(own, min(len(own), per_module, missing))
                held += chosen
                missing -= len(chosen)
            else:
                training += own
    rng.shuffle(held)
    rng.shuffle(training)
    return training, held


def _some(found: list[Mined], root: Path | None) -> list[Mined]:
    if not found:
        raise UserError(
            f"no documented functions below {root or stdlib_folder()}: this Python came without "
            "the sources of its standard library, which the demo takes its text from"
        )
    return found


def _parsed(root: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """(path below root, source, syntax tree) of each .py file that this Python can parse."""
    files = [p for p in root.rglob("*.py") if _SKIPPED.isdisjoint(p.relative_to(root).parts)]
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # some files have another encoding or an old syntax on purpose
        yield path.relative_to(root).as_posix(), source, tree


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's source, dedented, without its docstring; None if the body has nothing else."""
    doc = node.body[0]
    if len(node.body) < 2 or doc.lineno == node.lineno or node.body[1].lineno == doc.end_lineno:
        return None
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    rest = lines[doc.end_lineno : node.end_lineno]
    while rest and not rest[0].strip():
        rest = rest[1:]
    code = textwrap.dedent("\n".join(lines[start : doc.lineno - 1] + rest)).strip()
    return "\n".join(line.rstrip() for line in code.splitlines())
