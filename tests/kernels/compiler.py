"""Ring 3 from tests that interpret kernels: processes of their own, which compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "static"


def python(*arguments: str, cache: Path | None, root: Path = ROOT) -> subprocess.CompletedProcess:
    """Python in the checkout ``root`` without TRITON_INTERPRET; ``cache`` holds the user's results
    (None: where the user's are).
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    if cache is not None:
        environment["PEFTKERN_CACHE"] = str(cache)
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )
