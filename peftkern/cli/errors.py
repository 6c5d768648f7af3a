"""The errors a user of the command line can meet; each becomes one line on stderr."""

from __future__ import annotations


class UserError(Exception):
    """The input is at fault (an option, a file, a line of a file). Exit code 2."""


class RunError(Exception):
    """The input was fine and the run still failed (a loss is not finite, say). Exit code 1."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, or the name of its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
