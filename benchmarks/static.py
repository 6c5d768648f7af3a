"""Ring 3: compile every shipped kernel configuration for every architecture, without a GPU, and
read what came out.

    python -m benchmarks.static [--arch sm_90 ...] [--only TEXT] [--json] [--no-cache]

Prints kernel case, warps, registers, spilled bytes, stack, shared memory against the limit,
occupancy and the matrix and copy instructions in the machine code. Exits 1 on a compile error, a
spill, shared or tensor memory over the limit, or a matrix-bound case without the architecture's
matrix instruction (wgmma on sm_90, tcgen05 on sm_100). Results are cached by the hash of the
sources and of Triton's version, so a repeat takes seconds. It says nothing about speed or results:
rings 2 and 4 do.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.static_cases import Case, cases
from peftkern.kernels.common import Arch


class Target(NamedTuple):
    """An architecture: what default configs see of it, and what bounds the programs on one
    multiprocessor.
    """

    arch: Arch
    threads: int
    shared_per_sm: int
    backend: str = "cuda"


TARGETS = {
    "sm_80": Target(Arch(108, 80, 166912), 2048, 167936),
    "sm_86": Target(Arch(84, 86, 101376), 1536, 102400),
    "sm_89": Target(Arch(128, 89, 101376), 1536, 102400),
    "sm_90": Target(Arch(132, 90, 232448), 2048, 233472),
    "sm_100": Target(Arch(148, 100, 232448), 2048, 233472),
    "sm_120": Target(Arch(170, 120, 101376), 1536, 102400),
    "gfx942": Target(Arch(304, 80, 65536), 2048, 65536, "hip"),
}
TENSOR_MEMORY = 512  # columns, sm_100
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05"}  # elsewhere mma.sync is the only one
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "cp.async": r"cp\.async\.c[ag]",
    "cp.async.bulk.tensor": r"cp\.async\.bulk\.tensor",
    "mfma": r"v_mfma",
}


class _NoDevice:
    """Stands in for Triton's driver, so that the compiler sees ``target`` where a GPU would be."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _tool(name: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not in {folder}; this Triton build does not ship it")
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _ptxas_spills(compiled: Any, folder: Path) -> int:
    """Bytes of spill stores and loads a thread, as ptxas reports them."""
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    capability = compiled.metadata.target.arch
    name = f"sm_{capability}{'a' if capability >= 90 else ''}"
    tool = _tool("ptxas-blackwell" if capability >= 100 else "ptxas")
    command = [tool, "-v", f"--gpu-name={name}", str(source), "-o", str(folder / "again.cubin")]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _read_cuda(compiled: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        # A stack frame may be spills or not; only the assembler can say, so it runs again for the
        # few that have one.
        spilled = _ptxas_spills(compiled, Path(folder)) if stack else 0
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": stack,
        "spilled": spilled,
        "text": compiled.asm["ptx"],
    }


def _read_hip(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spilled": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        "text": text,
    }


def occupancy(target: Target, registers: int, warps: int, shared: int) -> float:
    """Share of a multiprocessor's threads that resident programs fill (NVIDIA's granularity)."""
    threads = 32 * warps
    per_warp = -(-registers * 32 // 256) * 256
    fits = [target.threads // threads, 32, 65536 // (per_warp * warps) if registers else 32]
    if shared:
        fits.append(target.shared_per_sm // (shared + 1024))
    return min(fits) * threads / target.threads


_seen: dict[tuple[str, str], dict[str, Any]] = {}


def _facts(compiled: Any, name: str, hip: bool) -> dict[str, Any]:
    """What the machine code says, read once where several cases specialise to the same kernel."""
    key = (name, compiled.hash)
    if key not in _seen:
        _seen[key] = (_read_hip if hip else _read_cuda)(compiled)
    return dict(_seen[key])


def measure(case: Case, name: str) -> dict[str, Any]:
    """One row: the case compiled for architecture ``name``."""
    target = TARGETS[name]
    hip = target.backend == "hip"
    driver.set_active(
        _NoDevice(
            GPUTarget("hip", name, 64) if hip else GPUTarget("cuda", target.arch.capability, 32)
        )
    )
    row: dict[str, Any] = {"case": case.name, "kernel": case.launch.kernel.__name__, "arch": name}
    row["config"] = {k: v for k, v in case.launch.meta.items()}
    start = time.perf_counter()
    try:
        compiled = case.launch.kernel.warmup(
            *case.launch.args, grid=case.launch.grid, **case.launch.meta
        )
        facts = _facts(compiled, name, hip)
    except Exception as error:  # whatever the compiler raises is this row's result
        lines = str(error).strip().splitlines()
        return row | {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
    text = facts.pop("text")
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    row |= facts | {"shared": shared, "limit": target.arch.shared, "warps": warps}
    row["instructions"] = {k: n for k, p in INSTRUCTIONS.items() if (n := len(re.findall(p, text)))}
    row["occupancy"] = None if hip else round(occupancy(target, row["registers"], warps, shared), 3)
    row["seconds"] = round(time.perf_counter() - start, 2)
    problems = []
    if row["spilled"]:
        problems.append(f"spills {row['spilled']} bytes")
    if shared > target.arch.shared:
        problems.append(f"shared {shared} over {target.arch.shared}")
    # More tensor memory than there is does not stop the compiler: it emits an empty kernel, and the
    # launch fails.
    if (tensor_memory := getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY:
        problems.append(f"tensor memory {tensor_memory} columns over {TENSOR_MEMORY}")
    if case.matrix_bound and MATRIX.get(name, "") not in ("", *row["instructions"]):
        problems.append(f"no {MATRIX[name]}")
    return row | ({"problem": "; ".join(problems)} if problems else {})


def _measure_run(run: list[tuple[str, str]]) -> dict[str, Any]:
    """Rows of (architecture, case name) pairs, in a worker process."""
    rows = {}
    for name in dict.fromkeys(n for n, _ in run):
        wanted = {c for n, c in run if n == name}
        rows |= {
            f"{name} {c.name}": measure(c, name)
            for c in cases(TARGETS[name].arch)
            if c.name in wanted
        }
    return rows


@functools.cache
def source_hash() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*root.glob("kernels/*.py"), *root.glob("benchmarks/static*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _cache_file() -> Path:
    base = os.environ.get("PEFTKERN_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "peftkern"
    )
    return Path(base) / "static.json"


def _load_cache(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept["rows"] if kept.get("hash") == source_hash() else {}


def _save_cache(path: Path, rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({"hash": source_hash(), "rows": rows}))
    scratch.replace(path)


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--arch", nargs="+", choices=sorted(TARGETS), default=[n for n in TARGETS if n != "gfx942"]
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiler processes")
    parser.add_argument("--no-cache", action="store_true", help="compile again")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error(
            "TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it"
        )

    cache = {} if options.no_cache else _load_cache(_cache_file())
    start = time.perf_counter()
    keys = {
        name: [c.name for c in cases(TARGETS[name].arch) if options.only in c.name]
        for name in options.arch
    }
    missing = [(n, c) for n, names in keys.items() for c in names if f"{n} {c}" not in cache]
    # Neighbouring cases often specialise to one kernel, so a process takes runs of them, not every
    # other one.
    runs = [missing[i : i + 25] for i in range(0, len(missing), 25)]
    with ProcessPoolExecutor(
        max_workers=max(1, options.jobs), mp_context=get_context("spawn")
    ) as pool:
        for done in pool.map(_measure_run, runs):
            cache |= done
            _save_cache(_cache_file(), cache)
    rows = [cache[f"{name} {case}"] for name, names in keys.items() for case in names]
    if not options.json:
        print(
            f"{'arch':7s} {'case':38s} warps  regs spill stack  shared/limit  occup.  instructions"
        )
        print("\n".join(map(_line, rows)))
    # gfx942 is reported, not required: nobody has run it.
    bad = [r for r in rows if ("error" in r or "problem" in r) and not r["arch"].startswith("gfx")]
    if options.json:
        json.dump(
            {
                "triton": triton.__version__,
                "torch": torch.__version__,
                "failed": len(bad),
                "rows": rows,
            },
            sys.stdout,
        )
        print()
    else:
        took = time.perf_counter() - start
        print(f"{len(rows)} compiled cases ({len(missing)} new) in {took:.0f} s; {len(bad)} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
