"""``peftkern`` and ``python -m peftkern``: the command, where the extra "cli" is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# What the extra installs. `train` would ask for accelerate late, in transformers' words.
EXTRA = ("accelerate", "rich", "typer")


def main() -> None:
    """Run the command and exit; see :func:`peftkern.cli.app.main`.

    Without the extra: one line on stderr that says how to get it, and exit status 1.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        needed = ", ".join(missing)
        sys.exit(f'peftkern: the command also needs {needed}: pip install "peftkern[cli]"')
    from .cli.app import main as run

    run()


if __name__ == "__main__":
    main()
