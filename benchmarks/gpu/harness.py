"""Ring 4: everything that needs a CUDA device, in parts that keep their results when cut off.

    python -m benchmarks.gpu --part first       what a fresh machine is to tell in nine minutes
    python -m benchmarks.gpu --part tests|sanitizer|counters|race|linear|group|layer|e2e|...|all
    python -m benchmarks.gpu --part linear --dry-run        on a CPU: all code, but a fake clock

This process never touches the device. Each part runs in a process of its own that writes one row
after another (see :mod:`benchmarks.gpu.store`). When a case hangs or breaks the device, that
process is ended, the provider that ran is noted and left out, and another process goes on. A part
continues the unfinished results of an earlier run of the same code. Files go to ``--out``, else
benchmarks/results/<gpu>, and an archive of them to $OUT (:mod:`benchmarks.gpu.archive`);
docs/gpu.md describes their content.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import archive as gpu_archive
from . import checks as gpu_checks
from . import parts as gpu_parts
from . import report as gpu_report
from . import store as gpu_store
from .device import slug, versions
from .store import Store

ORDER = ("tests", "sanitizer", "counters", "linear", "race", "group", "decode", "prefix",
         "experts", "quantised", "layer", "e2e")  # fmt: skip
BUDGETS = {"tests": 200, "sanitizer": 90, "counters": 60} | {
    n: p.budget_s for n, p in gpu_parts.PARTS.items()
}
ALL_S = 510  # seconds of several parts together, as one command on the machine may take 9 minutes
# Parts that one command runs: correctness of every kernel, then the rows of the goals.
SEVERAL = {"first": ("tests", "headline"), "all": ORDER}
GRACE_S = 10
RESTARTS = 12


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--part", choices=(*SEVERAL, "headline", *ORDER), required=True)
    parser.add_argument("--budget", type=float, help="seconds for the part, or for all of them")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, a fake clock")
    parser.add_argument("--only", help="cases with this text in their key")
    parser.add_argument("--cases", type=int, help="at most so many cases")
    parser.add_argument("--out", type=Path, help="where results go")
    parser.add_argument("--fresh", action="store_true", help="start over, continue nothing")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--no-warm", action="store_true", help="no compiling in parallel beforehand"
    )
    for internal in ("--file", "--until", "--share"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.probe:
        return _probe(args)
    if args.share:
        at, of = map(int, args.share.split("/"))
        gpu_parts.warm(gpu_parts.PARTS[args.part], (at, of), float(args.until), args.dry_run)
        return 0
    if args.file:
        part = gpu_parts.PARTS[args.part]
        cases = gpu_parts.chosen(part, args.dry_run, args.only, args.cases)
        return gpu_parts.work(
            part, Store.open(Path(args.file)), cases, float(args.until), args.dry_run
        )
    names = list(SEVERAL.get(args.part, (args.part,)))
    if args.list or args.dry_run:
        for name in names:
            if name in gpu_parts.PARTS:
                _list(gpu_parts.PARTS[name], args)
        if args.list:
            return 0
    return _supervise(names, args)


def _list(part: gpu_parts.Part, args: argparse.Namespace) -> None:
    cases = gpu_parts.chosen(part, False, args.only, None)
    print(f"{part.name}: {len(cases)} cases, budget {part.budget_s} s")
    for case in cases:
        print(f"  {case.key}")


def _probe(args: argparse.Namespace) -> int:
    """Print the device's facts and measured rates as JSON."""
    print("PROBE " + json.dumps(_facts(args.dry_run)))
    return 0


def _facts(dry: bool) -> dict[str, Any]:
    device = gpu_parts.device_of(dry)
    return {"gpu": device.facts(), "ceilings": device.ceilings(), "versions": versions()}


def _command(*more: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *more]


def environment(dry: bool) -> dict[str, str]:
    """The environment of the processes that measure."""
    env = dict(os.environ, PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(gpu_store.ROOT), env.get("PYTHONPATH")]))
    env.setdefault("PYTHONWARNINGS", "ignore")
    for name in ("PEFTKERN_BACKEND", "PEFTKERN_RACE"):
        env.pop(name, None)
    if dry:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return env


def _header(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that all results of this run begin with.

    Raises:
        RuntimeError: the device cannot be used.
    """
    if args.dry_run:
        return {**_facts(True), "dry": True}
    command = _command("--part", "linear", "--probe")
    done = subprocess.run(
        command,
        env=environment(False),
        cwd=gpu_store.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    for line in done.stdout.splitlines():
        if line.startswith("PROBE "):
            return {**json.loads(line.removeprefix("PROBE ")), "dry": False}
    raise RuntimeError(f"the device cannot be used:\n{done.stdout}{done.stderr[-2000:]}")


def _supervise(names: list[str], args: argparse.Namespace) -> int:
    began = time.time()
    try:
        header = _header(args)
    except (RuntimeError, subprocess.TimeoutExpired) as e:
        print(e, file=sys.stderr)
        return 2
    gpu = header["gpu"]["name"]
    if args.dry_run and args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="peftkern-dry-"))
    folder = gpu_store.results_folder(slug(gpu), args.out)
    print(f"{gpu}; {header['versions']}; {header['ceilings']}; results in {folder}", flush=True)
    planned = sum(BUDGETS[n] for n in names)
    total = args.budget or (ALL_S if args.part in SEVERAL else planned)
    share = (total - (time.time() - began)) / planned
    with _kept(gpu_archive.path_for(slug(gpu)), folder, slug(gpu)):
        return _run_parts(names, args, gpu, folder, header, share)


@contextlib.contextmanager
def _kept(archive: Path | None, folder: Path, gpu: str) -> Iterator[None]:
    """Keep ``archive`` up to date with the results in ``folder`` within the block."""
    if archive is None:
        yield
        return
    keeper = gpu_archive.Keeper(archive, lambda: gpu_archive.files(folder, gpu))
    keeper.start()
    try:
        yield
    finally:
        keeper.close()
        print(f"all results: {archive}", flush=True)


def _run_parts(
    names: list[str],
    args: argparse.Namespace,
    gpu: str,
    folder: Path,
    header: dict[str, Any],
    share: float,
) -> int:
    """Run the parts one after another, print the report, and return the exit status."""
    contents, bad = [], False
    for name in names:
        store = open_store(name, gpu, folder, header, args)
        until = time.time() + BUDGETS[name] * share
        print(f"== {name}: {until - time.time():.0f} s, {store.path}", flush=True)
        if name in gpu_parts.PARTS:
            run_part(gpu_parts.PARTS[name], store, until, args)
        else:
            gpu_checks.run(name, store, until, args.dry_run, environment(args.dry_run))
        store = Store.open(store.path)
        contents.append(store.data)
        if name == "race" and not args.dry_run:
            _write_table(store)
        bad = bad or any(r.get("outcome") in ("failed", "error") for r in store.rows)
    print("\n".join(gpu_report.report(contents)), flush=True)
    if (page := gpu_report.write_page(contents, folder)) is not None:
        print(f"written: {page}", flush=True)
    return 1 if bad or any(gpu_report.wrong(d["rows"]) for d in contents) else 0


def _write_table(store: Store) -> None:
    """Write the tuning table into the checkout, ready to be committed.

    ``benchmarks.gpu.table`` can make it again from the results.
    """
    from . import table as gpu_table

    try:
        path = gpu_table.write([store.path])
    except (OSError, ValueError) as e:
        print(f"no tuning table: {e}", flush=True)
        return
    print(f"tuning table: {path}", flush=True)


def open_store(
    part: str, gpu: str, folder: Path, header: dict[str, Any], args: argparse.Namespace
) -> Store:
    """The results file for this part: the unfinished one in ``folder``, or a new one.

    Either takes over the rows of earlier runs of the same code, in ``folder`` and in
    benchmarks/results/<gpu>.
    """
    before = []
    if not args.fresh and part in gpu_parts.PARTS:  # tests and tools always run completely
        before = gpu_store.earlier(part, gpu, [gpu_store.RESULTS / slug(gpu), folder])
        before = [s for s in before if s.data.get("dry") == args.dry_run]
    if before and before[-1].path.parent == folder and not before[-1].data["finished"]:
        store = before.pop()
        if current := store.data["current"]:  # cut off, not hung: hung cases are closed already
            store.note(f"continued after a cut within {current['key']}")
        store.data |= {**header, "current": None, "not_run": []}
        store.write()
    else:
        path = folder / f"{gpu_store.stamp()}-{part}.json"
        store = Store.create(path, part, **header, budget_s=args.budget or BUDGETS[part])
    done = store.done()
    for old in before:
        for row in old.rows:
            if row["key"] not in done and "error" not in row and not row.get("partial"):
                store.put({**row, "from": old.path.name})
    return store


def run_part(part: gpu_parts.Part, store: Store, until: float, args: argparse.Namespace) -> None:
    """Compile, then run measuring processes one after another, until cases or time are used up."""
    dry = ["--dry-run"] if args.dry_run else []
    more = [*(["--only", args.only] if args.only else [])]
    more += ["--cases", str(args.cases)] if args.cases else []
    env = environment(args.dry_run)
    if not (args.dry_run or args.no_warm or args.only or part.warm is None):
        _warm(part, store, until, env)
    for _ in range(RESTARTS):
        if time.time() > until - part.least_s:
            break
        command = _command(
            "--part", part.name, "--file", str(store.path), "--until", str(until), *dry, *more
        )
        worker = subprocess.Popen(command, env=env, cwd=gpu_store.ROOT)
        status, why = _watch(worker, store.path, until + GRACE_S)
        if status == 0:
            return
        store = Store.open(store.path)
        if status is None and why == "budget":
            store.note("the budget ended within a case")
            break
        if status != gpu_parts.BROKEN:
            blamed = store.blame(why)
            print(f"{blamed or 'nothing'}: {why}", flush=True)
            if blamed is None:  # it ended before any case, and so would another process
                store.note(f"the measuring process {why}")
                break
    store = Store.open(store.path)
    cases = gpu_parts.chosen(part, args.dry_run, args.only, args.cases)
    store.finish([c.key for c in cases if c.key not in store.done()])


def _watch(worker: subprocess.Popen[bytes], path: Path, until: float) -> tuple[int | None, str]:
    """(exit status, what happened); the status is None if the budget or a hang ended the worker."""
    while worker.poll() is None:
        time.sleep(0.3)
        why = ""
        if time.time() > until:
            why = "budget"
        else:
            current = Store.open(path).data["current"]
            if current and time.time() - current["since"] > current["limit_s"]:
                why = f"hung: more than {current['limit_s']} s"
        if why:
            worker.kill()
            worker.wait()
            return None, why
    return worker.returncode, f"ended with status {worker.returncode}"


def _warm(part: gpu_parts.Part, store: Store, until: float, env: dict[str, str]) -> None:
    """Compile in several processes, for at most a quarter of the time; Triton caches on disk."""
    began = time.time()
    end = began + 0.25 * (until - began)
    memory = store.data["gpu"]["memory_bytes"] // (12 * 2**30)
    count = max(1, min(10, (os.cpu_count() or 2) // 2, memory))
    # no races of the dispatcher, as other processes use the device now
    env = env | {"OMP_NUM_THREADS": "1", "PEFTKERN_RACE": "0"}
    started = [
        subprocess.Popen(
            _command("--part", part.name, "--share", f"{i}/{count}", "--until", str(end)),
            env=env, cwd=gpu_store.ROOT, stdout=subprocess.DEVNULL,
        )
        for i in range(count)
    ]  # fmt: skip
    while any(p.poll() is None for p in started) and time.time() < end + 2:
        time.sleep(0.3)
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    print(f"compiled with {count} processes in {time.time() - began:.0f} s", flush=True)
