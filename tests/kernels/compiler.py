"""Processes that compile kernels, for tests of ring 3 in a process that interprets them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import children
from tests.children import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "static"


def python(
    *arguments: str, cache: Path | None, root: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    """The result of Python run in the checkout ``root`` without TRITON_INTERPRET.

    ``cache`` is the folder for the user's results; None is the user's own. ``env`` are variables.
    """
    own = env if cache is None else {**env, "PEFTKERN_CACHE": str(cache)}
    return children.python(*arguments, root=root, without=("TRITON_INTERPRET",), **own)
