"""Runs ``peftkern`` and ``python -m peftkern``, if the extra "cli" is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# The extra's packages. Without this check `train` would fail late, with transformers' message.
EXTRA = ("accelerate", "rich", "typer")


def main() -> None:
    """Run the command and exit; see :func:`peftkern.cli.app.main`.

    Without the extra it writes one line on stderr on how to install it; the exit status is 1.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        needed = ", ".join(missing)
        sys.exit(f'peftkern: the command also needs {needed}: pip install "peftkern[cli]"')
    from .cli.app import main as run

    run()


if __name__ == "__main__":
    main()
