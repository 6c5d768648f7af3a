"""Launches every kernel once or twice on the smallest shapes: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize

Shapes are odd, so that every mask at an edge is needed, and splits are forced, so that partials and
their sum run. Vendor products are left out: they would take the tool's time. Prints the number of
launches and exits 1 when a result is not finite.
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
    """(what ran, its outputs): everything, or at most ``most`` runs of each kernel."""
    torch.manual_seed(0)
    operands = Operands(device, M=37, K=80, N=72, r=5)
    for entry in entries().values():
        yield from itertools.islice(entry.sanitize(operands), most)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = 0
    # the interpreter of a dry run takes seconds for what a device does at once
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
