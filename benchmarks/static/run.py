"""Ring 3: compiles every shipped kernel config for every architecture without a GPU, and judges it.

    python -m benchmarks.static [--arch sm_90 ...] [--only TEXT ...] [--json] [--no-cache]
    python -m benchmarks.static --refresh   # after a change to a kernel, a config or the cases

It prints, for each case of a kernel, the warps, registers, spilled bytes, stack, shared memory with
its limit, occupancy, and the matrix and copy instructions in the machine code. The exit status is 1
after a compile error, a spill, shared or tensor memory over the limit, a matrix-bound case without
the architecture's matrix instruction (wgmma on sm_90, tcgen05 on sm_100), or a launch for which
Triton makes no launcher (:mod:`.launching`). It tests neither speed nor results, which rings 4 and
2 do.

The compiler's results are kept under a key that covers everything they depend on (:mod:`.key`): in
``results/static/triton-<version>.json``, which is committed, and in the user's cache. So a second
run takes seconds, and after an edit only changed kernels are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.kernels.entry import Case
from benchmarks.static import store
from benchmarks.static.cases import cases, tuned_cases
from benchmarks.static.compiling import compile_launch
from benchmarks.static.key import key_of
from benchmarks.static.launching import launcher_problem
from peftkern.kernels import tuning
from peftkern.kernels.common import Arch


class Target(NamedTuple):
    """An architecture: the facts for default configs, and the limits of one multiprocessor."""

    arch: Arch
    threads: int
    programs: int
    shared_per_sm: int
    backend: str = "cuda"


TARGETS = {
    "sm_80": Target(Arch(108, 80, 166912), 2048, 32, 167936),
    "sm_86": Target(Arch(84, 86, 101376), 1536, 16, 102400),
    "sm_89": Target(Arch(128, 89, 101376), 1536, 24, 102400),
    "sm_90": Target(Arch(132, 90, 232448), 2048, 32, 233472),
    "sm_100": Target(Arch(148, 100, 232448), 2048, 32, 233472),
    "sm_120": Target(Arch(170, 120, 101376), 1536, 24, 102400),
    "gfx942": Target(Arch(304, 80, 65536), 2048, 32, 65536, "hip"),
}
TENSOR_MEMORY = 512  # columns, sm_100
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05"}  # other architectures only have mma.sync


def occupancy(target: Target, row: dict[str, Any]) -> float:
    """The share of a multiprocessor's threads that resident programs fill, from 0 to 1.

    Registers are rounded up to NVIDIA's granularity.
    """
    threads = 32 * row["warps"]
    per_warp = -(-row["registers"] * 32 // 256) * 256
    fits = [target.threads // threads, target.programs, 65536 // max(1, per_warp * row["warps"])]
    if row["shared"]:
        fits.append(target.shared_per_sm // (row["shared"] + 1024))
    return min(fits) * threads / target.threads


def specify(case: Case, name: str) -> dict[str, Any]:
    """A row without its facts; with ``error`` when Triton refuses the launch itself."""
    kernel = case.launch.kernel
    row: dict[str, Any] = {
        "arch": name,
        "case": case.name,
        "kernel": f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}",
        "config": dict(case.launch.meta),
        "matrix_bound": case.matrix_bound,
    }
    try:
        return row | {"key": key_of(case.launch, name)}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:200]}


def judge(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The row with its facts, their limits, and a ``problem`` if it has one."""
    row = row | facts
    if "error" in row:
        return row
    name, target = row["arch"], TARGETS[row["arch"]]
    row["limit"] = target.arch.shared
    row["occupancy"] = None if target.backend == "hip" else round(occupancy(target, row), 3)
    problems = [row["launcher"]] if row.get("launcher") else []
    if row["spilled"]:
        problems.append(f"spills {row['spilled']} bytes")
    if row["shared"] > row["limit"]:
        problems.append(f"shared {row['shared']} over {row['limit']}")
    # With too much tensor memory the compiler does not fail: it emits an empty kernel, and the
    # launch fails.
    if row["tensor_memory"] > TENSOR_MEMORY:
        problems.append(f"tensor memory {row['tensor_memory']} columns over {TENSOR_MEMORY}")
    if row["matrix_bound"] and MATRIX.get(name, "") not in ("", *row["instructions"]):
        problems.append(f"no {MATRIX[name]}")
    return row | ({"problem": "; ".join(problems)} if problems else {})


def measure(case: Case, name: str) -> dict[str, Any]:
    """The row of ``case`` for architecture ``name``, compiled now."""
    row = specify(case, name) | {"launcher": launcher_problem(case.launch, name)}
    return judge(row, compile_launch(case.launch, name))


def all_cases(name: str, tables: Path) -> list[Case]:
    """All cases of an architecture: those that ship, and those of its tuning tables."""
    target = TARGETS[name]
    tuned = [] if target.backend == "hip" else tuned_cases(target.arch, tables)
    return [*cases(target.arch), *tuned]


def _start_worker(folder: str, parent: int) -> None:
    triton.knobs.cache.dir = folder  # hundreds of megabytes, which nobody reads again

    def leave_with_parent() -> None:  # a parent that is killed cannot stop its workers
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _compile_run(run: list[tuple[str, str, str]], tables: Path) -> dict[str, dict[str, Any]]:
    """{key: facts} of (architecture, case name, key) triples, in a worker process."""
    found = {}
    for name in dict.fromkeys(n for n, _, _ in run):
        wanted = {c: key for n, c, key in run if n == name}
        for case in all_cases(name, tables):
            if case.name in wanted:
                found[wanted[case.name]] = compile_launch(case.launch, name)
    return found


def _compile(missing: list[tuple[str, str, str]], tables: Path, jobs: int) -> dict[str, Any]:
    """{key: facts}; each is added to the user's file as soon as it is known, but for errors."""
    found: dict[str, Any] = {}
    runs = [missing[i : i + 8] for i in range(0, len(missing), 8)]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            max_workers=max(1, min(jobs, len(runs))),
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(folder, os.getpid()),
        ) as pool,
    ):
        try:
            for done in pool.map(_compile_run, runs, [tables] * len(runs)):
                found |= done
                store.add_to_user({k: facts for k, facts in done.items() if "error" not in facts})
        except BrokenProcessPool:  # LLVM ends its process in an unexpected state
            left = [f"{name} {case}" for name, case, key in missing if key not in found]
            raise SystemExit(
                f"a compiler process died on one of: {', '.join(left[: 8 * jobs])}; "
                "--jobs 1 --only finds which"
            ) from None
    return found


def _line(row: dict[str, Any]) -> str:
    head = f"{row['arch']:7s} {row['case']:38s}"
    if "error" in row:
        return f"{head} ERROR {row['error']}"
    used = " ".join(f"{k}:{n}" for k, n in row["instructions"].items())
    share = "-" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
    return (
        f"{head} {row['warps']:5d} {row['registers']:5d} {row['spilled']:5d} {row['stack']:5d}"
        f" {row['shared']:7d}/{row['limit']:<6d} {share:>5s}  {used}"
        + (f"  <- {row['problem']}" if "problem" in row else "")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", choices=sorted(TARGETS), help="default: all of CUDA's")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help='rows whose "ARCH CASE" contains one of these'
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes")
    parser.add_argument("--no-cache", action="store_true", help="compile again, whatever is kept")
    parser.add_argument(
        "--refresh",
        action="store_true",
        help="compile what is stale and write the committed file of this Triton anew",
    )
    parser.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="exit with 3, compiling nothing, when more than N kernels would be compiled",
    )
    parser.add_argument(
        "--tables",
        type=Path,
        default=tuning.FOLDER,
        metavar="FOLDER",
        help="tuning tables whose configs are compiled too (default: those that ship)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.refresh and (options.arch or options.only):
        parser.error("--refresh writes all rows: it goes with neither --arch nor --only")
    if triton.knobs.runtime.interpret:
        parser.error(
            "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it"
        )
    start = time.perf_counter()
    required = [n for n, t in TARGETS.items() if t.backend == "cuda"]
    names = options.arch or (list(TARGETS) if options.refresh else required)
    try:
        rows = [
            specify(case, name) | {"launcher": launcher_problem(case.launch, name)}
            for name in names
            for case in all_cases(name, options.tables)
            if not options.only or any(text in f"{name} {case.name}" for text in options.only)
        ]
    except ValueError as error:  # from a tuning table
        parser.error(str(error))
    kept = {} if options.no_cache else store.load_committed() | store.load_user()
    missing: dict[str, tuple[str, str, str]] = {}  # by key, so that equal cases compile once
    for row in rows:
        if "key" in row and row["key"] not in kept:
            missing.setdefault(row["key"], (row["arch"], row["case"], row["key"]))
    if options.most is not None and len(missing) > options.most:
        print(
            f"{len(missing)} kernels have no kept result for Triton {triton.__version__}, more "
            f"than {options.most}; `python -m benchmarks.static --refresh` compiles them and "
            f"writes {store.committed_file().relative_to(store.ROOT)}, to be committed",
            file=sys.stderr,
        )
        return 3
    kept |= _compile(list(missing.values()), options.tables, options.jobs)
    rows = [judge(row, kept.get(row.get("key"), {})) for row in rows]
    if options.refresh:
        store.save_committed(rows)
    # gfx942 is reported but not required, as nobody has run it
    bad = [r for r in rows if ("error" in r or "problem" in r) and r["arch"] in required]
    if options.json:
        told = {"triton": triton.__version__, "torch": torch.__version__, "failed": len(bad)}
        print(json.dumps(told | {"compiled": len(missing), "rows": rows}))
    else:
        print(
            f"{'arch':7s} {'case':38s} warps  regs spill stack  shared/limit  occup.  instructions"
        )
        print("\n".join(map(_line, rows)))
        took = time.perf_counter() - start
        print(f"{len(rows)} cases ({len(missing)} compiled) in {took:.0f} s; {len(bad)} failed")
    return 1 if bad else 0
