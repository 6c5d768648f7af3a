"""Ring 4: the compiled kernels on a CUDA device, run separately by ``make gpu PART=tests``.

tests/kernels runs the same kernels in Triton's interpreter, and one process can only do one of the
two. So with ``-m "not gpu"`` or ``--quick`` this folder is not even collected.
"""

import json
import os
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path, config):
    without = "not gpu" in (config.option.markexpr or "") or config.getoption("--quick")
    if without and collection_path.suffix == ".py":
        return True
    return None


# a run that is cut off must have told of every kernel first
FIRST = ("test_gpu_kernels.py", "test_gpu_table.py", "test_gpu_prefix.py", "test_gpu_dora.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu" in item.nodeid or "gpu" in Path(str(item.path)).parts:
            item.add_marker(pytest.mark.gpu)
    ranks = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


_controller = True


def pytest_configure(config):
    global _controller
    _controller = not hasattr(config, "workerinput")  # under xdist it hears of every test


def pytest_runtest_logreport(report):
    """A line for every test that ended, so that a run that is cut off leaves what it found."""
    log = os.environ.get("PEFTKERN_GPU_LOG")
    if not (log and _controller) or (report.when != "call" and report.passed):
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    why = str(report.longrepr)[-2000:] if report.failed else ""
    line = {
        "key": report.nodeid,
        "outcome": outcome,
        "seconds": round(report.duration, 2),
        "why": why,
    }
    with open(log, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
