"""One file with all results of a run, for machines that give back few files of plain names.

    python -m benchmarks.gpu.archive RESULTS.tar.gz        unpack into this checkout

Where $OUT is set, ``benchmarks.gpu`` keeps this archive there: written anew within seconds of every
row, under a temporary name and renamed, so that a machine that goes away leaves what was measured.
Its members have the paths that they are to have in a checkout: ``benchmarks/results/<gpu>/*.json``
and ``kernels/tuning/*.json``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from peftkern.kernels import tuning

from .store import ROOT

ENV = "OUT"
EVERY_S = 3.0
MEMBER = re.compile(r"(?:benchmarks/results/[\w.-]+|kernels/tuning)/[\w.=-]+\.json")


def path_for(gpu: str) -> Path | None:
    """The archive of a run on this GPU: in $OUT; None without the variable."""
    out = os.environ.get(ENV)
    return Path(out) / f"peftkern-{gpu}.tar.gz" if out else None


def files(folder: Path, gpu: str) -> dict[str, Path]:
    """{member: file} of the results in ``folder`` and of the tuning tables of this checkout."""
    found = {f"benchmarks/results/{gpu}/{p.name}": p for p in sorted(folder.glob("*.json"))}
    tables = sorted(tuning.FOLDER.glob("*.json"))
    return found | {f"kernels/tuning/{p.name}": p for p in tables}


def pack(members: dict[str, Path], archive: Path) -> None:
    """Write ``archive`` with these members; a file that has gone meanwhile is left out."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f".{archive.name}.tmp")
    with tarfile.open(temporary, "w:gz") as tar:
        for name, path in members.items():
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    temporary.replace(archive)


def unpack(archive: Path, root: Path = ROOT) -> list[Path]:
    """Write the members of ``archive`` into the checkout at ``root``; returns their paths.

    Raises:
        ValueError: it holds something that is no result or tuning table; nothing is written then.
        OSError, tarfile.TarError: it cannot be read.
    """
    contents: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = member.name
            parts = PurePosixPath(name).parts
            if not member.isfile() or ".." in parts or MEMBER.fullmatch(name) is None:
                raise ValueError(
                    f"{archive} holds {name!r}; allowed: files benchmarks/results/GPU/NAME.json "
                    "and kernels/tuning/NAME.json"
                )
            stream = tar.extractfile(member)
            assert stream is not None  # it is a file
            contents[name] = stream.read()
            try:
                json.loads(contents[name])
            except ValueError:
                raise ValueError(f"{archive}: {name} is no JSON") from None
    written = []
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(path)
        written.append(path)
    return written


class Keeper(threading.Thread):
    """Keeps an archive up to date while a run goes on, until :meth:`close`."""

    def __init__(self, archive: Path, members: Callable[[], dict[str, Path]]) -> None:
        super().__init__(name="results archive", daemon=True)
        self._archive, self._members = archive, members
        self._ended = threading.Event()
        self._seen: Any = None

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.update()

    def update(self) -> None:
        """Write the archive if a file has changed since it was written."""
        members = self._members()
        seen = {}
        for name, path in members.items():
            try:
                seen[name] = (path.stat().st_mtime_ns, path.stat().st_size)
            except FileNotFoundError:
                continue
        if seen != self._seen:
            pack(members, self._archive)
            self._seen = seen

    def close(self) -> None:
        self._ended.set()
        self.join()
        self.update()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path)
    args = parser.parse_args(argv)
    try:
        for path in unpack(args.archive):
            print(path)
    except (OSError, ValueError, tarfile.TarError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
