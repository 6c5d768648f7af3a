"""The program for compute-sanitizer: launches every kernel once or twice on small shapes.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Shapes are odd, so that every mask at an edge is needed, and splits are forced, so that partial sums
and their reduction run. Vendor products are left out, as they would take the tool's time. It prints
the number of launches; the exit status is 1 when a result is not finite.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.entry import Operands
from ..kernels.table import entries


def runs(device: str, most: int | None = None) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, outputs) of each run: of all, or of at most ``most`` for each kernel."""
    torch.manual_seed(0)
    operands = Operands(device, M=37, K=80, N=72, r=5)
    for entry in entries().values():
        yield from itertools.islice(entry.sanitize(operands), most)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = 0
    # a dry run's interpreter takes seconds for each run, so it gets few of them
    for name, outs in runs(device, most=2 if device == "cpu" else None):
        bad = [o for o in outs if not bool(o.isfinite().all())]
        if bad:
            print(f"{name}: not finite", file=sys.stderr)
            return 1
        done += 1
        print(f"ran {name}", flush=True)
    print(f"{done} launches of every kernel, all finite")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
