"""Writing files so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_STAGING = ".saving-"  # how names of what is not complete yet begin
_STALE_SECONDS = 3600.0  # and when they are as old as this they are nobody's any more


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write(temporary_name)`` in the folder of ``path``, then rename the result onto
    ``path``.

    The temporary file is flushed to disk before the rename and removed when ``write`` raises.
    """
    path = Path(path)
    tmp = os.fspath(path.parent / f"{_STAGING}{path.name}.{uuid.uuid4().hex}.tmp")
    # not mkstemp, whose files are private: this has the mode that the umask gives, which cannot be
    # asked for without setting it for every thread
    fd = os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    os.close(fd)
    try:
        write(tmp)
        os.chmod(tmp, mode)  # in case it was replaced
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
_GONE = ".without-"  # a file of this name and another's, in there, says that the other is to go
_COMMIT = threading.Lock()  # threads commit one after the other; processes find each other's


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
    staged = os.path.join(folder, f"{_STAGING}{uuid.uuid4().hex}")
    os.mkdir(staged)
    committed = os.path.join(folder, COMMITTED)
    try:
        yield staged
        for name in without:
            Path(staged, _GONE + name).touch()
        with _COMMIT:
            for attempt in range(100):
                _put_in_place(folder)
                try:
                    os.rename(staged, committed)
                    break
                except OSError:  # another process has committed since; its save goes first
                    if attempt == 99 or not os.path.isdir(staged):
                        raise
            _put_in_place(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(folder: str) -> None:
    """Finish the renames of a save that was committed, this process's or one that was killed."""
    committed = os.path.join(folder, COMMITTED)
    try:
        names = sorted(os.listdir(committed))
    except FileNotFoundError:
        return
    for name in names:  # what is to go comes first
        path = os.path.join(committed, name)
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if name.startswith(_GONE):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name.removeprefix(_GONE)))
                os.unlink(path)
            else:
                os.replace(path, os.path.join(folder, name))
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


def _version(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_whole(find: Callable[[], str | None], read: Callable[[str], T]) -> T | None:
    """``read(find())``, or None when nothing is found; done again when a save moved or replaced the
    file meanwhile, be it that ``read`` noticed or not."""
    for last in (*[False] * 19, True):
        path = find()
        if path is None:
            return None
        before = _version(path)
        try:
            value = read(path)
        except (OSError, ValueError):
            if last or (before is not None and _version(path) == before):
                raise
            continue
        if last or _version(path) == before:
            return value
    raise AssertionError


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` in one step."""
    write_atomically(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
