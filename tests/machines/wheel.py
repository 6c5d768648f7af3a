"""``make test-wheel``: the quick tests on an installed wheel, as users have it.

A copy of the checkout gives a source distribution, that gives a wheel, and the wheel is installed
into a fresh environment, which links to everything else that is installed here. The tests are those
in the source distribution, in a folder without the package's sources; the plugin
:mod:`tests.machines.installed` refuses modules of the package from anywhere else. It uses no
network.

    python -m tests.machines.wheel [arguments for pytest]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("peftkern", "kernels", "tests", "benchmarks", "docs", "examples", ".github")
FILES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "Makefile"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml"),
)
# pip, where all that a build needs is installed already
BUILD = ("--no-deps", "--no-build-isolation", "--no-index")

# Test files that read the sources or all pages, or run Python in the checkout: of an installed
# package there is nothing for them to see.
READ_THE_SOURCES = (
    *("test_docs.py", "test_hosted.py", "test_site.py"),
    *("test_imports.py", "test_layout.py", "test_lazy_names.py", "test_private_names.py"),
    *("test_types.py", "test_variants_apart.py", "test_wheel.py"),
    *("kernels/test_extending.py", "kernels/test_kernel_static.py"),
    *("kernels/test_kernel_table.py", "kernels/test_static_results.py"),
)


def copy_of_the_checkout(folder: Path) -> Path:
    """``folder``, with what git keeps of the checkout and a distribution is made of."""
    junk = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=junk)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def run_checked(command: Sequence[str | Path], cwd: Path) -> None:
    """Runs it; AssertionError with its own words when it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pip(*arguments: str | Path, cwd: Path) -> None:
    run_checked([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], cwd)


def make_sdist(tree: Path, folder: Path) -> Path:
    """The source distribution of a copy of the checkout, made in ``folder``."""
    folder.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run_checked([sys.executable, "-c", code], tree)
    (made,) = folder.glob("peftkern-*.tar.gz")
    return made


def make_wheel(source: Path, folder: Path) -> Path:
    """The wheel of a source distribution or of a folder with the sources, made in ``folder``."""
    folder.mkdir()
    pip("wheel", *BUILD, "-w", folder, source, cwd=folder)
    (made,) = folder.glob("peftkern-*.whl")
    return made


def linked_site(folder: Path, without: Iterable[str]) -> Path:
    """``folder``, filled with links to all packages that are installed here and their metadata.

    peftkern and the packages that ``without`` names are left out.
    """
    folder.mkdir()
    names = "|".join(map(re.escape, ("peftkern", *without)))
    hidden = re.compile(rf"^({names})(-|\.|$)|^__editable__|\.pth$")
    for site in (Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")):
        for entry in site.iterdir() if site.is_dir() else ():
            if not hidden.search(entry.name) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def environment(folder: Path, wheel: Path, without: Iterable[str] = ()) -> Path:
    """The Python of a fresh environment with the wheel and links to other installed packages.

    Packages in ``without`` are left out.
    """
    run_checked([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    # before the links, or it would find them: "already installed"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    links = linked_site(folder / "links", without)
    (site_of(python) / "links.pth").write_text(f"{links}\n")
    return python


def site_of(python: Path) -> Path:
    """The folder that packages are installed into, of an environment's Python."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    return site


def tests_of(sdist: Path, folder: Path) -> Path:
    """The folder of the source distribution, unpacked without the sources of the package.

    So a ``peftkern`` that is imported there can only be an installed one.
    """
    # an early 3.11 has no filters, a 3.12 warns without one
    how: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, **how)
    (tests,) = folder.iterdir()
    for name in ("peftkern", "kernels", "setup.py", "peftkern.egg-info"):
        gone = tests / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    return tests


def pytest_on(python: Path, tests: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """pytest on the tests of :func:`tests_of`, started; its output is in the pipe ``stdout``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    command = [
        *(str(python), "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"),
        *("-p", "tests.machines.installed", f"--installed-in={site_of(python)}"),
        *(f"--ignore=tests/{name}" for name in READ_THE_SOURCES),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=tests,
        env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> int:
    """pytest's exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = make_sdist(copy_of_the_checkout(folder / "checkout"), folder / "sdist")
        wheel = make_wheel(sdist, folder / "wheel")
        python = environment(folder / "environment", wheel)
        print(f"{wheel.name}, of {sdist.name}, installed in {site_of(python)}", flush=True)
        tests = tests_of(sdist, folder / "unpacked")
        with pytest_on(python, tests, ["--quick", *sys.argv[1:]]) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
        return process.returncode


if __name__ == "__main__":
    sys.exit(main())
