"""The tracked pages of Markdown, with their tables, headings and links."""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_BUILT = {".venv", ".venvs", "build", "dist", "site", "__pycache__", "runs", "demo-out"}


@cache
def tracked() -> tuple[str, ...]:
    """Paths of the files that belong to the project; without git those that no tool has made."""
    try:
        done = subprocess.run(
            "git ls-files -z --cached --others --exclude-standard".split(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        names = done.stdout.split("\0")[:-1] if done.returncode == 0 else []
    except OSError:
        names = []
    if not names:
        for folder, below, files in os.walk(ROOT):
            below[:] = [
                n for n in below if n not in _BUILT and not n.endswith((".egg-info", "_cache"))
            ]
            names += [str((Path(folder) / n).relative_to(ROOT)) for n in files]
    return tuple(sorted(n for n in names if (ROOT / n).is_file()))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A page without its fenced code."""
    return _FENCE.sub("", read(name))


def tables(name: str) -> dict[str, list[list[str]]]:
    """{heading: the rows of the tables below it, heads and rules left out, as lists of cells}."""
    found: dict[str, list[list[str]]] = {}
    heading, inside = "", False
    for line in prose(name).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        is_row = line.startswith("|")
        if is_row and inside and not set(line) <= set("|-: "):
            found.setdefault(heading, []).append([c.strip() for c in line.strip("|").split("|")])
        inside = is_row
    return found


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(name: str) -> set[str]:
    """Of a page's headings; equal ones are numbered from the second on."""
    found: dict[str, int] = {}
    out = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(name), re.M):
        text = slug(heading)
        count = found[text] = found.get(text, -1) + 1
        out.add(f"{text}-{count}" if count else text)
    return out


def links(name: str) -> list[str]:
    """Targets of a page's links and pictures, those to other hosts left out."""
    text = re.sub(r"`[^`\n]*`", "", prose(name))
    targets = re.findall(r"\[[^]]*\]\(([^()\s]+)\)", text)
    targets += re.findall(r"^\[[^]]+\]: +(\S+)", text, re.M)
    targets += re.findall(r"<(?:img|a) [^>]*(?:src|href)=\"([^\"]+)\"", text)
    return [t for t in targets if not re.match(r"[a-z]+:", t)]
