"""The built and installed package: source distribution, wheel, command, and their requirements.

Nothing here uses the checkout's own modules: see `tests/machines/wheel.py`, which
``make test-wheel`` runs with more tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peftkern
from peftkern.__main__ import EXTRA
from tests.machines import wheel as building
from tests.machines.installed import from_elsewhere
from tests.test_imports import KERNEL_FILES, PACKAGE_FILES, imports_of
from tests.test_layout import PROBE, add_probe

ROOT = Path(__file__).resolve().parents[1]

# What a demo, a training run, a benchmark and a build leave in a checkout.
LEFT_BEHIND = (
    *("demo-report.html", "demo-out/lm/record.json", "runs/adapter_model.safetensors"),
    *("peftkern/cli/demo/demo-report.html", "peftkern/cli/record.json", "docs/site/index.html"),
    *("benchmarks/results/report.html", "tests/out.json", ".venv/pyvenv.cfg", "site/index.html"),
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
    for kind in ("*.py", "*.md", "*.yml", "*.svg"):
        expected |= files(built.tree, building.FOLDERS, kind)
    expected |= files(built.tree, ["kernels", "benchmarks/results"], "*.json")
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


# -------------------------------------------------------------------------- what they need besides

LIBRARY = """
import importlib, pkgutil, sys
from importlib.util import find_spec
assert [name for name in HIDDEN if find_spec(name)] == []
import torch, transformers as tf, peftkern
for name in peftkern.__all__:
    getattr(peftkern, name)
modules = [m.name for m in pkgutil.walk_packages(peftkern.__path__, "peftkern.")]
kept = ("peftkern.cli", "peftkern.__main__", "peftkern.tuners.lora.hf_layer")
for name in modules:
    if not name.startswith(kept):  # the command; what only HF PEFT's own layers need
        importlib.import_module(name)

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
sizes |= dict(num_attention_heads=2)
ids = torch.arange(4)[None]
for config in (
    peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    peftkern.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
):
    model = peftkern.get_peft_model(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), config)
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    print(peftkern.explain(model))
    model.save_pretrained("adapter")
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes))
    peftkern.PeftModel.from_pretrained(base, "adapter")
print(len(modules), "modules")
"""


@pytest.fixture(scope="module")
def bare(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment without the extra, and without HF PEFT."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    return building.environment(folder, built.wheel, without=(*EXTRA, "peft"))


@pytest.mark.long
def test_the_library_works_without_the_extra(bare: Path) -> None:
    done = run(bare, bare, "-c", f"HIDDEN = {(*EXTRA, 'peft')!r}\n{LIBRARY}")
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) > 100


@pytest.mark.parametrize("arguments", [[], ["--version"], ["train", "--help"]])
def test_the_command_without_the_extra_is_one_clear_error(bare: Path, arguments: list[str]) -> None:
    expected = (
        'peftkern: the command also needs accelerate, rich, typer: pip install "peftkern[cli]"\n'
    )
    for command in ([bare.parent / "peftkern"], [bare, "-m", "peftkern"]):
        done = run(bare, *command, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def third_party(paths: Iterable[Path]) -> set[str]:
    """The packages of others that the files import, also within functions."""
    roots = {name.partition(".")[0] for path in paths for name in imports_of(path)}
    return roots - set(sys.stdlib_module_names) - {"peftkern"}


def named(requirements: Iterable[str]) -> set[str]:
    return {Requirement(line).name for line in requirements}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: named(lines) for name, lines in project["optional-dependencies"].items()}
    command = ROOT / "peftkern" / "cli"
    of_command = [p for p in PACKAGE_FILES if p.is_relative_to(command)]
    of_demo = [p for p in of_command if p.is_relative_to(command / "demo")]
    library = third_party({*PACKAGE_FILES, *KERNEL_FILES} - {*of_command})
    # `fuse` works on HF PEFT's layers: whoever has some has HF PEFT. GGUF files, and bitsandbytes'
    # optimizers, are asked for by name; DeepSpeed is imported where it has divided the weights
    asked = {"peft", "liger_kernel", "gguf", "bitsandbytes", "deepspeed"}
    assert library - asked == named(project["dependencies"])
    assert extras["liger"] == {"liger-kernel"}
    # Trainer imports accelerate; a model in GGUF, as the demo's is, needs what reads it
    # What options ask for by name: DeepSpeed, TRL, datasets (with pyarrow; a .parquet file does),
    # matplotlib, without which report.html has no plots. Jinja comes with torch, YAML with
    # transformers
    by_name = {"deepspeed", "trl", "datasets", "pyarrow", "matplotlib", "jinja2", "yaml"}
    # of bench, whose suite is pytest's, and what it measures where it is installed
    by_name |= {"pytest", "peft", "unsloth", "lorafusion"}
    needed = third_party({*of_command} - {*of_demo}) - (library - {"gguf"}) - by_name
    assert needed | {"accelerate"} == extras["cli"] | {"gguf"} == {*EXTRA, "gguf"}
    # what transformers' tokenizers import, and the demo's peer
    needed = third_party(of_demo) - library - extras["cli"]
    unseen = {"gguf", "matplotlib", "peft", "protobuf", "sentencepiece", "peftkern"}
    assert needed | unseen == extras["demo"]
