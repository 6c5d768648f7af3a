"""Reading of a user's data: files -> records, each with the file and line that it came from.

``readers.py`` tells what the files hold, ``forms.py`` what the examples in them are. A folder means
all files of these kinds below it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .forms import Form, Record, form_of
from .readers import READERS, rows

SUFFIXES = tuple(READERS)
_ALLOWED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


@dataclass
class Dataset:
    """All records, the labels in the order of their ids, and the sha256 of the files' bytes."""

    records: list[Record]
    label_names: list[str]
    sha256: str
    empty: int  # number of records left out because their text was empty


def read_data(path: str, task: str, named: str = "auto") -> Dataset:
    """Read a file or a folder; the first error raises a UserError that names file and line.

    ``named`` is the form of its examples, "auto" to tell it by their fields.
    """
    files = data_files(path)
    digest = hashlib.sha256()
    records: list[Record] = []
    for file in files:
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        digest.update(f"{file.name}\0{len(raw)}\0".encode())
        digest.update(raw)
        records += _records(file, raw, task, named)
    filled = [r for r in records if r.has_content()]
    if not filled:
        what = (
            "is empty"
            if not records
            else f"has {len(records)} examples, and the text of each is empty"
        )
        raise UserError(f"--data {path} {what}: there is nothing to train on")
    return Dataset(
        filled, _label_names(filled, task, path), digest.hexdigest(), len(records) - len(filled)
    )


def _records(file: Path, raw: bytes, task: str, named: str) -> list[Record]:
    records: list[Record] = []
    first: tuple[Form, str] | None = None
    for where, fields in rows(file, raw):
        form = form_of(where, fields, task, named)
        first = first or (form, where)
        if form is not first[0]:
            raise UserError(
                f"{where}: is of the form {form.said()}, and {first[1]} of {first[0].said()}; a "
                "file holds one form"
            )
        records.append(form.read(where, fields))
    return records


def data_files(path: str) -> list[Path]:
    """The files of ``--data path``, sorted by path, without hidden ones."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"--data {path}: no such file or folder")
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise UserError(f"--data {path}: the file must end in {_ALLOWED}")
        return [root]
    found = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not found:
        raise UserError(f"--data {path}: the folder holds no {_ALLOWED} file")
    return found


def split_records(
    records: list[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records, in their order; ``fraction`` of them is held out at random.

    The same ``seed`` gives the same split.
    """
    count = round(len(records) * fraction)
    if count >= len(records):
        raise UserError(
            f"--eval-split {fraction} of {len(records)} examples leaves none to train on; "
            "give more data or a smaller share"
        )
    held = set(random.Random(seed).sample(range(len(records)), count))
    return (
        [r for i, r in enumerate(records) if i not in held],
        [r for i, r in enumerate(records) if i in held],
    )


def _label_names(records: Sequence[Record], task: str, path: str) -> list[str]:
    """The distinct labels, sorted as integers if all of them are integers, else as text."""
    if task not in ("seq_cls", "token_cls"):
        return []
    names = {r.label for r in records if r.label is not None} | {
        x for r in records for x in r.labels
    }
    if len(names) < 2:
        raise UserError(
            f"--data {path}: every example has the label {next(iter(names))!r}; "
            "classification needs at least two different labels"
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)
