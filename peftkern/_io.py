"""Writing files so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_STAGING = ".saving-"  # how names of what is not complete yet begin
_STALE_SECONDS = 3600.0  # and when they are as old as this they are nobody's any more


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write(temporary_name)`` in the folder of ``path``, then rename the result onto
    ``path``.

    The temporary file is flushed to disk before the rename and removed when ``write`` raises.
    """
    path = Path(path)
    fd, tmp = tempfile.mkstemp(prefix=f"{_STAGING}{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    try:
        write(tmp)
        # mkstemp makes the file private; give it the mode that a plain open() would have given
        os.chmod(tmp, 0o666 & ~_umask())
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        if os.path.exists(tmp):
            os.unlink(tmp)
        raise


# Files that belong together are complete in this folder before the first of them is put in place.
# Whoever finds it takes its files before those beside it: they are the newer ones.
COMMITTED = ".peftkern-save"


@contextlib.contextmanager
def replaced_together(folder: str | os.PathLike[str], without: Sequence[str] = ()) -> Iterator[str]:
    """A temporary folder inside ``folder``; what is in it at the end of the block replaces the
    files of the same names, and the files named ``without`` go. All of that is decided by one
    rename: a process killed before it leaves the old files; killed after it, the new ones, which
    :func:`places` finds and the next save puts where they belong. After an error nothing is
    replaced.
    """
    folder = os.fspath(folder)
    _drop_stale(folder)
    staged = tempfile.mkdtemp(prefix=_STAGING, dir=folder)
    committed = os.path.join(folder, COMMITTED)
    try:
        yield staged
        os.chmod(staged, 0o777 & ~_umask())  # mkdtemp's are private
        for attempt in range(3):
            _put_in_place(folder)
            try:
                os.rename(staged, committed)
                break
            except OSError:  # another process has committed since; its save goes first
                if attempt == 2 or not os.path.isdir(committed):
                    raise
        for name in without:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
        _put_in_place(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(folder: str) -> None:
    """Finish the renames of a save that was committed, this process's or one that was killed."""
    committed = os.path.join(folder, COMMITTED)
    if not os.path.isdir(committed):
        return
    for name in sorted(os.listdir(committed)):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            os.replace(os.path.join(committed, name), os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(committed)


def _drop_stale(folder: str) -> None:
    """Remove what killed saves have left behind."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):  # another process is at it as well
            if name.startswith(_STAGING) and time.time() - os.path.getmtime(path) > _STALE_SECONDS:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def places(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Where to look for a file of ``folder``, the newest save first."""
    committed = os.path.join(folder, COMMITTED)
    if os.path.isdir(committed):
        yield committed
    yield os.fspath(folder)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` in one step."""
    write_atomically(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
