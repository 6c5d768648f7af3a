"""Real text that every machine has: functions and docstrings of the running Python's standard
library.

Everything here depends only on the installed standard library and on the seed: files are taken in
the order of their paths, and what is held out is held out by whole files, so that no held-out
example shares its module with a training example.
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
    """One example: ``module`` is the file's path below the standard library, ``target`` what is to
    be said.
    """

    module: str
    name: str
    text: str
    target: str


def stdlib_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def functions(root: Path | None = None) -> list[Mined]:
    """Function source without its docstring -> the docstring, for functions of a moderate length.

    Comments are kept. Functions that say the same thing twice (equal source or equal docstring)
    count once.
    """
    found: list[Mined] = []
    seen: set[str] = set()
    for module, source, tree in _parsed(root or stdlib_folder()):
        lines = source.split("\n")  # as ast counts them: a form feed ends none
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
    """Docstring -> the topic of the package it is from (a key of TOPICS)."""
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

    Files are drawn until ``held_out`` examples are together (of each target, ``by_target``), at
    most ``per_module`` from each; the rest of a drawn file is not used at all. The drawn files hold
    no more than a third of what there is.
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
    """(path below root, source, syntax tree) of each .py file that this Python can parse, sorted by
    path.
    """
    files = [p for p in root.rglob("*.py") if _SKIPPED.isdisjoint(p.relative_to(root).parts)]
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # some are written on purpose in another encoding or an old syntax
        yield path.relative_to(root).as_posix(), source, tree


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's source, dedented, its docstring's lines cut out; None when nothing else is in
    the body.
    """
    doc = node.body[0]
    if len(node.body) < 2 or doc.lineno == node.lineno or node.body[1].lineno == doc.end_lineno:
        return None
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    rest = lines[doc.end_lineno : node.end_lineno]
    while rest and not rest[0].strip():
        rest = rest[1:]
    code = textwrap.dedent("\n".join(lines[start : doc.lineno - 1] + rest)).strip()
    return "\n".join(line.rstrip() for line in code.splitlines())
