"""Writing files so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write(temporary_name)`` in the folder of ``path``, then rename the result onto
    ``path``.

    The temporary file is flushed to disk before the rename and removed when ``write`` raises.
    """
    path = Path(path)
    fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    try:
        write(tmp)
        # mkstemp makes the file private; give it the mode that a plain open() would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(tmp, 0o666 & ~umask)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        if os.path.exists(tmp):
            os.unlink(tmp)
        raise


@contextlib.contextmanager
def replaced_together(folder: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary folder inside ``folder``; what is in it at the end of the block replaces the
    files of the same names, one rename after the other. After an error nothing is replaced."""
    staged = tempfile.mkdtemp(prefix=".saving-", dir=folder)
    try:
        yield staged
        for name in sorted(os.listdir(staged), reverse=True):
            os.replace(os.path.join(staged, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` in one step."""
    write_atomically(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
