"""What is built and installed: the source distribution, the wheel of it, and the command.

Nothing here reaches the checkout's own modules: see `tests/machines/wheel.py`, which
``make test-wheel`` runs with more tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

import peftkern
from tests.machines import wheel as building
from tests.machines.installed import from_elsewhere
from tests.test_layout import PROBE, add_probe

ROOT = Path(__file__).resolve().parents[1]

# What a demo, a training run, a benchmark and a build leave in a checkout.
LEFT_BEHIND = (
    *("demo-report.html", "demo-out/lm/record.json", "runs/adapter_model.safetensors"),
    *("peftkern/cli/demo/demo-report.html", "peftkern/cli/record.json", "docs/site/index.html"),
    *("benchmarks/results/cpu/2026-01-01T000000Z.json", "tests/out.json", ".venv/pyvenv.cfg"),
    *("build/lib/peftkern/old.py", "dist/peftkern-0.0.1.tar.gz"),
)


@dataclass
class Built:
    """A copy of the checkout, and what was made of it."""

    tree: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    tree = add_probe(building.copy_of_the_checkout(folder / "checkout"))
    for name in LEFT_BEHIND:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    sdist = building.make_sdist(tree, folder / "sdist")
    return Built(tree, sdist, building.make_wheel(sdist, folder / "wheel"))


def files(tree: Path, folders: Iterable[str], pattern: str) -> set[str]:
    found = (p for folder in folders for p in (tree / folder).rglob(pattern))
    return {p.relative_to(tree).as_posix() for p in found}


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs it from its own folder, where nothing of ours lies."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    return subprocess.run(
        [str(a) for a in arguments],
        cwd=python.parent,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


# ------------------------------------------------------------------------------ what they hold


def test_the_sdist_holds_the_sources_the_tests_and_nothing_left_behind(built: Built) -> None:
    with tarfile.open(built.sdist) as packed:
        names = {m.name.partition("/")[2] for m in packed.getmembers() if m.isfile()}
    made = {n for n in names if n.startswith("peftkern.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    expected = {*building.FILES, "peftkern/py.typed"}
    expected |= files(built.tree, building.FOLDERS, "*.py")
    expected |= files(built.tree, building.FOLDERS, "*.md")
    expected |= files(built.tree, ["kernels", "benchmarks/results/static"], "*.json")
    assert "kernels/device_name=PROBE.json" in expected
    assert names - made == expected


def test_the_wheel_of_the_sdist_holds_the_package_and_nothing_else(built: Built) -> None:
    names = set(zipfile.ZipFile(built.wheel).namelist())
    code = files(built.tree, ["peftkern"], "*.py")
    code.discard("peftkern/kernels/__init__.py")  # the mapping of setup.py takes its place
    kernels = files(built.tree, ["kernels"], "*.py") | files(built.tree, ["kernels"], "*.json")
    shipped = {n for n in names if ".dist-info/" not in n}
    assert shipped == code | {f"peftkern/{n}" for n in kernels} | {"peftkern/py.typed"}
    assert any(n.endswith("/LICENSE") for n in names)


# -------------------------------------------------------------------------------- that they run


@pytest.mark.long
def test_the_installed_wheel_runs(built: Built, tmp_path: Path) -> None:
    python = building.environment(tmp_path / "environment", built.wheel)
    done = run(python, python, "-c", PROBE)
    version = built.wheel.name.split("-")[1]
    home = building.site_of(python) / "peftkern" / "kernels"
    assert done.stdout.strip() == f"{version} table 0 {home}", done.stderr
    for command in ([python.parent / "peftkern"], [python, "-m", "peftkern"]):
        done = run(python, *command, "--version")
        assert (done.returncode, done.stdout) == (0, f"peftkern {version}\n"), done.stderr


# one file or two of each part of the package
PART = (
    *("test_config.py", "test_layers.py", "test_ops.py", "test_checkpoint.py", "test_targets.py"),
    *("test_explain.py", "test_prompt_adapters.py", "test_prefix_model.py", "test_fuse.py"),
    *("test_cli_options.py", "test_cli_data.py", "kernels/test_kernel_bits.py"),
)


@pytest.mark.slow
def test_the_quick_tests_pass_on_the_installed_wheel(built: Built, tmp_path: Path) -> None:
    python = building.environment(tmp_path / "environment", built.wheel)
    tests = building.tests_of(built.sdist, tmp_path / "unpacked")
    arguments = ["--quick", *(f"tests/{name}" for name in PART)]
    with building.pytest_on(python, tests, arguments) as process:
        said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 100, said


def test_modules_from_elsewhere_are_seen(tmp_path: Path) -> None:
    assert f"peftkern: {peftkern.__file__}" in from_elsewhere(tmp_path)


def test_the_plugin_refuses_another_peftkern(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.machines.installed", "--collect-only"]
    done = subprocess.run(
        [*command, f"--installed-in={tmp_path}", "tests/test_version_rows.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert f"peftkern: {ROOT / 'peftkern' / '__init__.py'}" in done.stderr


def test_files_that_read_the_sources_are_there() -> None:
    gone = [n for n in building.READ_THE_SOURCES if not (ROOT / "tests" / n).is_file()]
    assert gone == []
