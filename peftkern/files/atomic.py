"""Atomic writing of files: a reader sees the old content or the new, never a part of either."""

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
_STAGING = ".saving-"  # the beginning of the names of files that are not complete yet
_STALE_SECONDS = 3600.0  # such a file of this age belongs to no running process


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write(temporary_name)`` in the folder of ``path``, then rename the file to ``path``.

    The temporary file is flushed to disk before the rename and removed when ``write`` raises.
    """
    path = Path(path)
    tmp = os.fspath(path.parent / f"{_STAGING}{path.name}.{uuid.uuid4().hex}.tmp")
    # not mkstemp, which makes files with private modes; this file gets the mode of the umask (which
    # can be read only by setting it for all threads)
    fd = os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    os.close(fd)
    try:
        write(tmp)
        os.chmod(tmp, mode)  # `write` may have replaced the file
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        if os.path.exists(tmp):
            os.unlink(tmp)
        raise


# Files that belong together are all written to this folder before the first one is moved to its
# place. While it exists, readers prefer its files, which are the newer ones.
COMMITTED = ".peftkern-save"
_GONE = ".without-"  # a file with this prefix and a name means that the file of that name must go
_COMMIT = threading.Lock()  # for threads; processes find each other's committed folder


@contextlib.contextmanager
def replaced_together(folder: str | os.PathLike[str], without: Sequence[str] = ()) -> Iterator[str]:
    """A context that gives a temporary folder; its files replace those of ``folder`` at the end.

    The files named ``without`` are removed then. One rename decides all of this: a process killed
    before it leaves the old files. Killed after it, it leaves the new files, which :func:`places`
    finds and the next save moves to their places. After an error nothing is replaced.
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
                except OSError:  # another process has committed meanwhile: finish its save first
                    if attempt == 99 or not os.path.isdir(staged):
                        raise
            _put_in_place(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_in_place(folder: str) -> None:
    """Finish the renames of a committed save, of this process or of a killed one."""
    committed = os.path.join(folder, COMMITTED)
    try:
        names = sorted(os.listdir(committed))
    except FileNotFoundError:
        return
    for name in names:  # removals are sorted before all other names
        path = os.path.join(committed, name)
        with contextlib.suppress(FileNotFoundError):  # another process has moved it already
            if name.startswith(_GONE):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name.removeprefix(_GONE)))
                os.unlink(path)
            else:
                os.replace(path, os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(committed)


def _drop_stale(folder: str) -> None:
    """Remove the temporary files of killed saves."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):  # another process may remove it too
            if name.startswith(_STAGING) and time.time() - os.path.getmtime(path) > _STALE_SECONDS:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def places(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The folders in which to look for a file of ``folder``, the newest save first."""
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
    """``read(find())``, or None when nothing is found; read again if a save replaced the file.

    It reads again (up to 20 times) even when ``read`` did not raise an error.
    """
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
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    write_atomically(path, lambda tmp: Path(tmp).write_text(text, encoding="utf-8"))
