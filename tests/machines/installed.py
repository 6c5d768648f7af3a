"""A pytest plugin that fails unless tests import all of peftkern from one folder.

pytest -p tests.machines.installed --installed-in FOLDER
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--installed-in", type=Path, help="where peftkern must be imported from")


def from_elsewhere(folder: Path) -> list[str]:
    """The loaded modules of peftkern that are not from within ``folder``, with their files."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "peftkern":
            continue
        # a folder without __init__.py, such as that of the kernels, has a path alone
        file = getattr(module, "__file__", None)
        places = [file] if file else [*getattr(module, "__path__", ())]
        found += [f"{name}: {at}" for at in places if not Path(at).is_relative_to(folder)]
    return found


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--installed-in")
    if folder is None:
        raise pytest.UsageError("--installed-in: give the folder that peftkern is installed in")
    importlib.import_module("peftkern")
    if wrong := from_elsewhere(folder):
        raise pytest.UsageError(f"--installed-in {folder}: {', '.join(wrong)}")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    # for each test: a worker of xdist has modules of its own
    assert from_elsewhere(item.config.getoption("--installed-in")) == []
