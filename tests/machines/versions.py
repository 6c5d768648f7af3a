"""``make test-versions``: the numeric tests on the oldest versions, the CUDA target's, the newest.

Each row has an environment of its own under .venvs/, which is kept while its versions stay the
same. The results are written into docs/versions.md. The row "oldest" has pyproject.toml's lower
bounds. This needs Linux on x86_64, gcc, and each row's Python on the path or in pyenv.

    python -m tests.machines.versions [--only ROW] [further arguments for pytest]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.machines import stubs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venvs"
TABLE = ROOT / "docs" / "versions.md"


@dataclass(frozen=True)
class Row:
    """One environment: ``pins`` are installed with their requirements, torch and ``bare`` without.

    The requirements of the latter would be the CUDA libraries, which
    :mod:`tests.machines.stubs` replaces.
    """

    name: str
    python: str
    torch: str
    pins: tuple[str, ...]
    bare: tuple[str, ...]


# What torch, and what is installed without its needs, needs besides.
_NEEDS = (
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools<82", "sympy", "typing_extensions"),
    *("psutil", "pyyaml", "tqdm"),
)
# What the tests need. The interpreter of triton 3.6 fails on numpy 2.4.
_TESTS = (
    "pytest>=8.4",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "sentencepiece",
    "matplotlib",
)

ROWS = (
    Row(
        "oldest",
        "3.11",
        "2.11.0",
        (
            *("triton==3.6.0", "transformers==5.15.1", "safetensors==0.8.0", "numpy==2.0.0"),
            *("huggingface_hub==1.5.0", "typer==0.19.0", "rich==13.0.0"),
            *("regex==2025.10.22", "tqdm==4.66.3"),
        ),
        ("accelerate==1.3.0", "peft==0.21.2"),
    ),
    Row(
        "CUDA target",
        "3.12",
        "2.11.0",
        ("triton==3.6.0", "transformers==5.17.0", "numpy<2.4", "datasets"),
        ("accelerate==1.15.0", "peft==0.21.2", "trl==1.16.0"),
    ),
    Row(
        "newest",
        "3.13",
        "2.14.1",
        ("triton==3.9.0", "transformers==5.24.0", "numpy<2.4", "datasets"),
        ("accelerate==1.15.0", "peft==0.21.2", "trl==1.16.0"),
    ),
)

SHOWN = (
    *("torch", "triton", "transformers", "peft", "accelerate", "safetensors"),
    *("huggingface_hub", "numpy"),
)
_BEGIN, _END = "<!-- rows: written by make test-versions -->", "<!-- end of rows -->"
_HEAD = ("row", "Python", *SHOWN, "passed", "skipped", "failed", "date")


def interpreter(version: str) -> str:
    """A Python of this version ("3.12") that runs.

    Raises:
        SystemExit: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = shutil.which(f"python{version}")
    candidates = [found, *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:
            return candidate
    raise SystemExit(f"no Python {version} with venv and ensurepip, on the path or in {pyenv}")


def environment(row: Row) -> Path:
    """The row's Python, in an environment that has the row's versions.

    The environment is made if there is none or if it has other versions.
    """
    place = FOLDER / row.name.replace(" ", "-")
    python, stamp = place / "bin" / "python", place / "versions.json"
    wanted = json.dumps([asdict(row), _NEEDS, _TESTS])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"Making {place} (some minutes, once)", flush=True)
    subprocess.run([interpreter(row.python), "-m", "venv", "--clear", str(place)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    subprocess.run([*pip, "--no-deps", f"torch=={row.torch}"], check=True)
    subprocess.run([*pip, *row.pins, *_NEEDS, *_TESTS], check=True)
    subprocess.run([*pip, "--no-deps", *row.bare], check=True)
    made = stubs.make(next(place.glob("lib/python*/site-packages/torch/lib")))
    if made:
        print(f"torch's CUDA libraries are stubs: {', '.join(made)}", flush=True)
    stamp.write_text(wanted)
    return python


def versions_in(python: Path) -> list[str]:
    """Python's version and those of ``SHOWN``, as installed."""
    code = (
        "import importlib.metadata as m, platform\n"
        f"print(platform.python_version(), *(m.version(n) for n in {SHOWN!r}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def run_tests(row: Row, python: Path, arguments: list[str]) -> dict[str, int]:
    """The numbers of tests that passed, were skipped and failed; errors count as failures."""
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        *(str(python), "-m", "pytest", "-q", "-m", "numeric and not slow and not gpu"),
        # what warns differs from version to version; `make test` judges it on one set
        *("-W", "default"),
        *("-p", "no:cacheprovider", f"--junitxml={report}", *arguments),
    ]
    ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}).returncode
    if not report.exists():  # not even begun
        return {"passed": 0, "skipped": 0, "failed": max(1, status)}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    ran, failed, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed += errors
    if status and not failed:
        failed = 1  # stopped before its end, or found no test
    return {"passed": ran - failed - skipped, "skipped": skipped, "failed": failed}


def line_of(row: Row, versions: list[str], counts: dict[str, int]) -> str:
    date = datetime.date.today().isoformat()
    cells = [row.name, *versions, *(str(counts[n]) for n in ("passed", "skipped", "failed")), date]
    return f"| {' | '.join(cells)} |"


def write(lines: dict[str, str], table: Path = TABLE) -> None:
    """Puts the lines of the rows that ran into the table; rows that did not keep theirs."""
    text = table.read_text()
    before, rest = text.split(_BEGIN)
    old, after = rest.split(_END)
    kept = {line.split("|")[1].strip(): line for line in old.splitlines()[3:] if line.strip()}
    kept |= lines
    ordered = [kept[row.name] for row in ROWS if row.name in kept]
    head = [f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    new = "\n".join([_BEGIN, *head, *ordered, _END])
    temporary = table.with_suffix(".tmp")
    temporary.write_text(before + new + after)
    temporary.replace(table)


def main() -> int:
    """0 when every row that was asked for passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options, arguments = parser.parse_known_args()
    rows = [row for row in ROWS if options.only.lower() in row.name.lower()]
    if not rows:
        parser.error(f"--only {options.only!r}; the rows are {', '.join(r.name for r in ROWS)}")
    whole = not any(a.startswith("tests/") or a in ("-k", "-x") for a in arguments)
    good, lines = True, {}
    for row in rows:
        python = environment(row)
        print(f"\n{row.name}: {', '.join(versions_in(python))}", flush=True)
        counts = run_tests(row, python, arguments)
        good &= not counts["failed"] and counts["passed"] > 0
        lines[row.name] = line_of(row, versions_in(python), counts)
        print(lines[row.name], flush=True)
    if whole:
        write(lines)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
