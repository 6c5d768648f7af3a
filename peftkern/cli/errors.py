"""The errors that the command line reports to its user, each as one line on stderr."""

from __future__ import annotations


class UserError(Exception):
    """The input is wrong (an option, a file, a line of a file); exit code 2."""


class RunError(Exception):
    """The run failed with right input (for example, a loss is not finite); exit code 1."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, or the name of its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
