"""The parts of ``benchmarks.gpu`` that check and do not measure.

They are the tests marked gpu, NVIDIA's compute-sanitizer over every kernel, and the hardware's
counters compared with the traffic that the project reports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import counters as gpu_counters
from .store import ROOT, Store

TOOLS = ("memcheck", "racecheck")
LOG_ENV = "PEFTKERN_GPU_LOG"  # where tests/gpu/conftest.py adds a line for every test
CPU_ENV = "PEFTKERN_GPU_TESTS_ON_CPU"  # run tests/gpu in Triton's interpreter
TAIL = 4000


def run(part: str, store: Store, until: float, dry: bool, env: dict[str, str]) -> None:
    if part == "tests":
        tests(store, until, dry, env)
    elif part == "counters":
        gpu_counters.check(store, until, dry, env)
    else:
        sanitizer(store, until, dry, env)


def tests(store: Store, until: float, dry: bool, env: dict[str, str]) -> None:
    """Run pytest over tests/gpu in several processes and add a row for each test that has run.

    A dry run only collects the tests.
    """
    scratch = Path(tempfile.mkdtemp(prefix="peftkern-gpu-tests-"))
    log, lines = scratch / "log", scratch / "lines"
    command = [
        sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q",
        "-o", "addopts=--import-mode=importlib --strict-markers -ra", "-p", "no:cacheprovider",
    ]  # fmt: skip
    if dry:
        command += ["--collect-only"]
        env = env | {CPU_ENV: "1"}
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    env = env | {LOG_ENV: str(lines)}
    with log.open("w") as out:
        child = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        taken = 0
        while True:
            ended = child.poll() is not None
            taken = _take(store, lines, taken)
            if ended or time.time() > until:
                break
            time.sleep(0.5)
        cut = child.poll() is None
        if cut:
            _end(child)
    print(_tail(log), flush=True)
    if cut:
        store.note("the budget ended before all tests had run")
    elif child.returncode not in (0, 5):
        store.note(f"pytest ended with status {child.returncode}")
        if not store.rows:
            store.put({"key": "pytest", "part": "tests", "outcome": "error", "why": _tail(log)})
    if not dry and not cut and not store.rows:
        store.put({"key": "pytest", "part": "tests", "outcome": "error", "why": "no test ran"})
    store.finish(["the tests that the budget cut"] if cut else [])


def _take(store: Store, lines: Path, taken: int) -> int:
    """Add the tests after the first ``taken`` lines; returns the number of lines now read."""
    if not lines.exists():
        return taken
    fresh = lines.read_text(encoding="utf-8").splitlines(keepends=True)[taken:]
    whole = [line for line in fresh if line.endswith("\n")]
    for line in whole:
        store.data["rows"].append({"part": "tests", **json.loads(line)})
    if whole:
        store.write()
    return taken + len(whole)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a process that this one started, with its children: it leads their group."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-TAIL:]


def sanitizer(store: Store, until: float, dry: bool, env: dict[str, str]) -> None:
    """Run each tool over :mod:`benchmarks.gpu.sanitize`, with its own time limit.

    A tool that is absent, or that cannot run here, is a row of its own outcome, not a failure.
    """
    script = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
    # first without a tool, which compiles everything and shows failures that no tool causes
    now = time.time()  # a dry run need not leave time for a tool
    plain = _one(script, env, until if dry else now + 0.4 * max(0.0, until - now))
    ran = plain["status"] == 0
    outcome = "passed" if ran else "time limit" if plain["status"] is None else "failed"
    store.put({"key": "without a tool", "part": "sanitizer", "outcome": outcome, **plain})
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # each block of memory comes from the driver, so that the tool sees where it ends
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for i, name in enumerate(TOOLS):
        row = {"key": name, "part": "sanitizer"}
        limit = (until - time.time()) / (len(TOOLS) - i)
        if dry or not Path(tool).exists():
            store.put({**row, "outcome": "absent", "why": "compute-sanitizer is not here"})
        elif not ran:
            why = f"the script without the tool: {outcome}"
            store.put({**row, "outcome": "skipped", "why": why})
        elif limit < 5:
            store.put({**row, "outcome": "not run", "why": "no time is left"})
        else:
            command = [
                tool,
                "--tool",
                name,
                "--error-exitcode",
                "86",
                "--print-limit",
                "20",
                *script,
            ]
            found = _one(command, env, time.time() + limit)
            store.put({**row, **found, "outcome": _verdict(found)})
        print(f"{name}: {store.rows[-1]['outcome']}", flush=True)
    store.finish([])


def _verdict(found: dict[str, object]) -> str:
    tail = str(found["tail"])
    if found["status"] is None:
        return "time limit"
    if found["status"] == 0:
        return "passed"
    refused = ("Device not supported", "not supported on this", "Unable to", "Failed to initialize")
    if found["status"] != 86 and any(text in tail for text in refused):
        return "unusable"
    return "failed"


def _one(command: list[str], env: dict[str, str], until: float) -> dict[str, object]:
    """{"status", "seconds", "tail"} of a run; the status is None if the limit ended it."""
    began = time.time()
    child = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=max(1.0, until - began))
        status: int | None = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        status = None
    return {"status": status, "seconds": round(time.time() - began, 1), "tail": output[-TAIL:]}
