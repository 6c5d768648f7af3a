"""Ring 3: compiles every shipped kernel config for every architecture without a GPU, and judges it.

    python -m benchmarks.static [--arch sm_90 ...] [--only TEXT ...] [--json] [--no-cache]
    python -m benchmarks.static --refresh   # after a change to a kernel, a config or the cases

It prints, for each case of a kernel, the warps, registers, spilled bytes, stack, shared memory with
its limit, occupancy, how often its programs fill the device (waves), how many tiles are in flight
while a step of its loops is computed (ahead), the narrowest access of a large tile in bytes a
thread (width), and the matrix and copy instructions in the machine code. The exit status is 1 after
a compile error, a spill, shared or tensor memory over the limit, a matrix-bound case without the
architecture's matrix instruction (wgmma on sm_90, tcgen05 on sm_100), a launch for which Triton
makes no launcher (:mod:`.launching`), or one that breaks a rule of :mod:`.judging` without an
exemption (:mod:`.exemptions`). It tests neither speed nor results, which rings 4 and 2 do.

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
from typing import Any

import torch
import triton

from benchmarks.kernels.entry import Case
from benchmarks.static import exemptions, store
from benchmarks.static.cases import cases, tuned_cases
from benchmarks.static.compiling import compile_launch
from benchmarks.static.judging import TARGETS, judge
from benchmarks.static.key import key_of
from benchmarks.static.launching import launcher_problem
from peftkern.kernels import tuning


def specify(case: Case, name: str) -> dict[str, Any]:
    """A row without its facts; with ``error`` when Triton refuses the launch itself."""
    kernel = case.launch.kernel
    row: dict[str, Any] = {
        "arch": name,
        "case": case.name,
        "kernel": f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}",
        "config": dict(case.launch.meta),
        "grid": list(case.launch.grid),
        "matrix_bound": case.matrix_bound,
    }
    try:
        return row | {"key": key_of(case.launch, name)}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:200]}


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
    filled = "-" if row["waves"] is None else f"{row['waves']:.2f}"
    ahead = "-" if row["ahead"] is None else str(row["ahead"])
    wide = {None: "-", 0: "bulk"}.get(row["width"], str(row["width"]))
    return (
        f"{head} {row['warps']:5d} {row['registers']:5d} {row['spilled']:5d} {row['stack']:5d}"
        f" {row['shared']:7d}/{row['limit']:<6d} {share:>5s} {filled:>6s} {ahead:>5s} {wide:>5s}"
        f"  {used}"
        + (f"  exempt: {', '.join(row['exempt'])}" if row["exempt"] else "")
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
    if options.only and not rows:
        parser.error(f'--only {" ".join(options.only)}: no row\'s "ARCH CASE" contains this')
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
    # what is true of all rows only, and of the Triton that results are committed for
    whole = not (options.arch or options.only) and store.committed_file().exists()
    unused = exemptions.unused(rows) if whole else []
    if options.json:
        told = {"triton": triton.__version__, "torch": torch.__version__, "failed": len(bad)}
        print(json.dumps(told | {"compiled": len(missing), "unused": unused, "rows": rows}))
    else:
        print(
            f"{'arch':7s} {'case':38s} warps  regs spill stack  shared/limit  occup.  waves ahead"
            " width  instructions"
        )
        print("\n".join(map(_line, rows)))
        for name in unused:
            print(f"no row needs the exemption {name!r} in benchmarks/static/exemptions.py")
        took = time.perf_counter() - start
        print(f"{len(rows)} cases ({len(missing)} compiled) in {took:.0f} s; {len(bad)} failed")
    return 1 if bad else 0
