"""Reading of a user's data: files -> records, each with the file and line that it came from.

=============  ====================================================================================
task           fields of a line of a .jsonl file (other fields are ignored)
=============  ====================================================================================
causal_lm      ``{"text": str}``, or ``{"prompt": str, "completion": str}`` (loss on the completion)
seq_2_seq_lm   ``{"prompt": str, "completion": str}``
seq_cls        ``{"text": str, "label": str or int}``
token_cls      ``{"tokens": [str, ...], "labels": [str or int, ...]}``, one label for each token
=============  ====================================================================================

A .txt file is one text (causal_lm only). A folder means all .jsonl and .txt files below it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

SUFFIXES = (".jsonl", ".txt")


@dataclass
class Record:
    """One example as the user wrote it. ``origin`` is ``file:line`` (a .txt file: ``file``)."""

    origin: str
    text: str = ""
    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    tokens: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass
class Dataset:
    """All records, the labels in the order of their ids, and the sha256 of the files' bytes."""

    records: list[Record]
    label_names: list[str]
    sha256: str
    empty: int  # number of records left out because their text was empty


def read_data(path: str, task: str) -> Dataset:
    """Read a file or a folder; the first error raises a UserError that names file and line."""
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
        records += (
            _read_txt(file, raw, task) if file.suffix == ".txt" else _read_jsonl(file, raw, task)
        )
    filled = [r for r in records if _has_content(r)]
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


def data_files(path: str) -> list[Path]:
    """The .jsonl and .txt files of ``--data path``, sorted by path, without hidden ones."""
    root = Path(path)
    if not root.exists():
        raise UserError(f"--data {path}: no such file or folder")
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise UserError(f"--data {path}: the file must end in {' or '.join(SUFFIXES)}")
        return [root]
    found = sorted(
        file
        for file in root.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not found:
        raise UserError(f"--data {path}: the folder holds no {' or '.join(SUFFIXES)} file")
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


def _decode(file: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not valid UTF-8 (byte 0x{raw[error.start]:02x})") from None


def _read_txt(file: Path, raw: bytes, task: str) -> list[Record]:
    if task != "causal_lm":
        raise UserError(
            f"{file}: a .txt file has no labels or completions; --task {task} needs .jsonl"
        )
    return [Record(str(file), text=_decode(file, raw))]


def _read_jsonl(file: Path, raw: bytes, task: str) -> list[Record]:
    records = []
    # only \n ends a line: str.splitlines would also split at U+2028, which JSON strings may contain
    for number, line in enumerate(_decode(file, raw).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deeply"
            )
            raise UserError(f"{where}: not valid JSON: {reason}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{where}: a line must be a JSON object, not {_kind(fields)}")
        records.append(_record(where, fields, task))
    return records


def _record(where: str, fields: dict[str, Any], task: str) -> Record:
    pair = "prompt" in fields or "completion" in fields
    if task == "seq_2_seq_lm" or (task == "causal_lm" and pair):
        if task == "causal_lm" and "text" in fields:
            raise UserError(
                f"{where}: has both 'text' and 'prompt'/'completion'; give one of the two forms"
            )
        prompt, completion = _string(where, fields, "prompt"), _string(where, fields, "completion")
        return Record(where, prompt=prompt, completion=completion)
    if task == "causal_lm":
        if "text" not in fields:
            raise UserError(f"{where}: missing field 'text' (or 'prompt' and 'completion')")
        return Record(where, text=_string(where, fields, "text"))
    if task == "seq_cls":
        text = _string(where, fields, "text")
        return Record(
            where, text=text, label=_label(where, _field(where, fields, "label"), "label")
        )
    tokens, labels = _field(where, fields, "tokens"), _field(where, fields, "labels")
    for name, value in (("tokens", tokens), ("labels", labels)):
        if not isinstance(value, list):
            raise UserError(f"{where}: field {name!r} must be a list, not {_kind(value)}")
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}: field 'tokens' must hold strings only")
    if len(tokens) != len(labels):
        raise UserError(f"{where}: {len(tokens)} tokens but {len(labels)} labels")
    return Record(where, tokens=tokens, labels=[_label(where, x, "labels") for x in labels])


def _field(where: str, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise UserError(f"{where}: missing field {name!r}")
    return fields[name]


def _string(where: str, fields: dict[str, Any], name: str) -> str:
    value = _field(where, fields, name)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be a string, not {_kind(value)}")
    return value


def _label(where: str, value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: a label in {name!r} must be a non-empty string or an integer")
    return str(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _has_content(record: Record) -> bool:
    if record.completion is not None:
        return bool(record.completion.strip())
    return bool(record.text.strip() or record.tokens)


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
