"""The errors that the command line reports to its user, each as one line on stderr."""

from __future__ import annotations


class CommandError(Exception):
    """An error with a message for the user.

    ``everywhere`` says that all processes of the run have it, so that one of them prints it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UserError(CommandError):
    """The input is wrong (an option, a file, a line of a file); exit code 2."""


class RunError(CommandError):
    """The run failed with right input (for example, a loss is not finite); exit code 1."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, or the name of its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
