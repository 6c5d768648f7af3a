"""The parts of ``benchmarks.gpu`` that are no measurements: the tests marked gpu, NVIDIA's
compute-sanitizer over every kernel, and its counters beside the traffic we report.
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
    """pytest over tests/gpu in several processes; every test is a row as soon as it has run. A dry
    run collects them only."""
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
    """Add the tests that have ended since; returns how many lines are read."""
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
    """End a process that we started with its own children: it leads their group."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-TAIL:]


def sanitizer(store: Store, until: float, dry: bool, env: dict[str, str]) -> None:
    """Each tool over :mod:`benchmarks.gpu.sanitize`, with its own limit; one that is not there, or
    that cannot run here, is said and not failed."""
    script = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
    # without the tool first: a plain failure is told apart, and everything is compiled then
    now = time.time()  # a dry run has no tool to leave time for
    plain = _one(script, env, until if dry else now + 0.4 * max(0.0, until - now))
    ran = plain["status"] == 0
    outcome = "passed" if ran else "time limit" if plain["status"] is None else "failed"
    store.put({"key": "without a tool", "part": "sanitizer", "outcome": outcome, **plain})
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # memory from the driver, block by block, so that the tool sees where each one ends
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
    """{"status" (None: it ran past the limit), "seconds", "tail"}."""
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
