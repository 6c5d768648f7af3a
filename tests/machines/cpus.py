"""``make test-cpus``: the numeric tests once for every instruction set that this processor has.

A processor without AVX-512, or with AMX, sums in other orders than this one; so do other numbers of
threads and other code paths of MKL and oneDNN. Each row below makes torch use one of them, in a
process of its own, as the variables are read when torch is loaded. Every test must pass on each
row: a test that fails has a tolerance that was tuned on one machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

SUMMARY = re.compile(r"=+ (.*(?:passed|failed|error|no tests ran).*) in [\d.]+s")


@dataclass(frozen=True)
class Cpu:
    """One way to compute.

    ``capability`` is ATen's name for its instruction set, ``needs`` the flags that a processor must
    have, ``variables`` the environment for MKL and oneDNN.
    """

    name: str
    capability: str
    threads: int
    needs: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


CPUS = (
    Cpu(
        "no vectors beyond SSE",
        "default",
        1,
        variables={"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    ),
    Cpu(
        "AVX2, 2 threads",
        "avx2",
        2,
        ("avx2",),
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    ),
    Cpu(
        "AVX-512",
        "avx512",
        1,
        ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        {
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "MKL_CBWR": "AVX512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        },
    ),
    Cpu("as it is, 2 threads", "", 2),
)


def processor_flags() -> set[str]:
    """The flags of this processor, as Linux lists them; none where it does not."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next((set(line.split()[2:]) for line in file if line.startswith("flags")), set())
    except OSError:
        return set()


def environment(cpu: Cpu) -> dict[str, str]:
    """The environment in which torch computes as ``cpu`` does."""
    ours = ("ATEN_CPU", "MKL_", "ONEDNN_", "OMP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    if cpu.capability:
        kept["ATEN_CPU_CAPABILITY"] = cpu.capability
    kept |= cpu.variables
    # threads that spin while they wait take the cores from each other
    kept |= {"OMP_NUM_THREADS": str(cpu.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def capability_taken(cpu: Cpu) -> str:
    """ATen's own word for what it uses in that environment, in lower case."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(cpu), capture_output=True, text=True
    )
    return done.stdout.strip().lower()


def run_tests(cpu: Cpu, jobs: int, arguments: list[str]) -> tuple[bool, str]:
    """(True when all passed, pytest's last line) of the numeric tests in that environment.

    They run in as many processes as ``jobs`` threads allow.
    """
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:benchmark", "-q"),
        *("-n", str(max(1, jobs // cpu.threads))),
        *("-m", "numeric and not slow and not gpu", *arguments),
    ]
    with subprocess.Popen(
        command, env=environment(cpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            found = SUMMARY.search(line) or re.match(r"(\d+ (?:passed|failed).*) in [\d.]+s", line)
            last = found[1] if found else last
    return process.returncode == 0, last or f"exit status {process.returncode}"


def main() -> int:
    """0 when every way that this processor has passed every test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="threads in all")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options, arguments = parser.parse_known_args()
    flags = processor_flags()
    table = Table("processor", "torch says", "tests", "minutes", title="numeric tests")
    good = ran = 0
    for cpu in CPUS:
        if options.only.lower() not in cpu.name.lower():
            continue
        if missing := [flag for flag in cpu.needs if flag not in flags]:
            table.add_row(cpu.name, f"not on this machine: no {', '.join(missing)}", "", "")
            continue
        ran += 1
        taken = capability_taken(cpu)
        if cpu.capability and taken != cpu.capability:
            table.add_row(cpu.name, f"[red]{taken or 'nothing'}[/red]", "not run", "")
            continue
        print(f"\n{cpu.name}", flush=True)
        start = time.perf_counter()
        passed, said = run_tests(cpu, options.jobs, arguments)
        good += passed
        colour = "green" if passed else "red"
        minutes = f"{(time.perf_counter() - start) / 60:.1f}"
        table.add_row(cpu.name, taken, f"[{colour}]{said}[/{colour}]", minutes)
    Console().print(table)
    return 0 if ran and good == ran else 1


if __name__ == "__main__":
    sys.exit(main())
