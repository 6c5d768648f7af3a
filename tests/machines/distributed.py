"""``make test-distributed``: every test of several processes, the slow ones and DeepSpeed's too.

The results are written into docs/distributed.md. A test that is skipped counts as a failure here.

    python -m tests.machines.distributed [--only ROW] [further arguments for pytest]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "distributed.md"
# {row: the files whose tests it counts}
ROWS = {
    "DDP, FSDP2, FSDP1": ("test_sharded", "test_shards"),
    "ranks that differ, or die": ("test_agreement",),
    "experts under DDP": ("test_experts_ddp",),
    "quantised bases under FSDP": ("test_fsdp_quantised",),
    "ZeRO-2, ZeRO-3": ("test_zero",),
    "tensor parallelism": ("test_tensor_parallel",),
    "`peftkern train` in two processes": ("test_cli_processes", "test_cli_shares"),
}
SHOWN = ("torch", "transformers", "accelerate", "deepspeed", "peft")
_BEGIN, _END = "<!-- rows: written by make test-distributed -->", "<!-- end of rows -->"


def run(files: tuple[str, ...], arguments: list[str]) -> dict[str, int]:
    """The numbers of tests that passed, were skipped and failed; errors count as failures."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
            # a table is one fixture, which takes minutes
            *("-m", "not gpu", "-o", "timeout=1800", f"--junitxml={report}"),
            *(f"tests/{name}.py" for name in files),
            *arguments,
        ]
        ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        status = subprocess.run(command, cwd=ROOT, env={**os.environ, **ours}).returncode
        if not report.exists():  # not even begun
            return {"passed": 0, "skipped": 0, "failed": max(1, status)}
        suite = next(ElementTree.parse(report).iter("testsuite"))
    ran, failed, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    failed += errors
    if status and not failed:
        failed = 1  # stopped before its end, or found no test
    return {"passed": ran - failed - skipped, "skipped": skipped, "failed": failed}


def line_of(row: str, counts: dict[str, int]) -> str:
    date = datetime.date.today().isoformat()
    cells = [row, *(str(counts[name]) for name in ("passed", "skipped", "failed")), date]
    return f"| {' | '.join(cells)} |"


def write(lines: dict[str, str], versions: str, table: Path = TABLE) -> None:
    """Puts the lines of the rows that ran into the page; rows that did not run keep theirs."""
    before, rest = table.read_text().split(_BEGIN)
    old, after = rest.split(_END)
    known = (line for line in old.splitlines() if line.startswith("|"))
    kept = {line.split("|")[1].strip(): line for line in known} | lines
    head = [versions, "", "| tests | passed | skipped | failed | date |", "|---|---|---|---|---|"]
    new = "\n".join([_BEGIN, *head, *(kept[row] for row in ROWS if row in kept), _END])
    temporary = table.with_suffix(".tmp")
    temporary.write_text(before + new + after)
    temporary.replace(table)


def main() -> int:
    """0 when every test passed; one that was skipped has not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options, arguments = parser.parse_known_args()
    rows = [row for row in ROWS if options.only.lower() in row.lower()]
    if not rows:
        parser.error(f"--only {options.only!r}; the rows are {', '.join(ROWS)}")
    found = {row: run(ROWS[row], arguments) for row in rows}
    lines = {row: line_of(row, counts) for row, counts in found.items()}
    print("\n".join(lines.values()), flush=True)
    if not arguments:
        names = (f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
        write(lines, f"With {', '.join(names)}:")
    good = all(c["passed"] and not c["failed"] and not c["skipped"] for c in found.values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
