"""Files of data -> rows: a dict of fields each, with the file and line that it came from.

=========  =======================================================================================
suffix     what it holds
=========  =======================================================================================
.jsonl     a JSON object in each line
.json      an array of JSON objects (or one in each line)
.csv       a header, then rows; lists (``messages``, ``tokens``, ...) are written in JSON
.parquet   a table, read through ``datasets``; the number after the file's name counts its rows
.txt       one text: the field ``text``
=========  =======================================================================================

All but parquet are read here, because no reader of tables tells in which line a row began, and most
rename a column that is named twice.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UserError, first_line

Row = tuple[str, dict[str, Any]]  # ("file:line", fields)
# fields that hold lists; a cell of a .csv file is text, so it holds them in JSON
LISTS = ("messages", "conversations", "tokens", "labels", "tools")


def rows(file: Path, raw: bytes) -> Iterator[Row]:
    """The rows of a file with the content ``raw``; UserError at the first that is malformed."""
    return READERS[file.suffix](file, raw)


def kind_of(value: Any) -> str:
    """A value's kind in the words of JSON, with an article."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def _decode(file: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line}: not valid UTF-8 (byte 0x{raw[error.start]:02x})") from None


def _txt(file: Path, raw: bytes) -> Iterator[Row]:
    yield str(file), {"text": _decode(file, raw)}


def _jsonl(file: Path, raw: bytes) -> Iterator[Row]:
    # only \n ends a line: str.splitlines would also split at U+2028, which JSON strings may contain
    for number, line in enumerate(_decode(file, raw).split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            yield where, _object(where, _parsed(where, line, 0, whole=True)[0])


def _json(file: Path, raw: bytes) -> Iterator[Row]:
    text = _decode(file, raw)
    at = _blank(text, 0)
    if text[at : at + 1] != "[":
        yield from _jsonl(file, raw)
        return
    at, line, counted = _blank(text, at + 1), 1, 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        where = f"{file}:{line}"
        value, at = _parsed(where, text, at)
        yield where, _object(where, value)
        at = _blank(text, at)
        if text[at : at + 1] == ",":
            at = _blank(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise UserError(f"{file}:{line}: not valid JSON: ',' or ']' expected")
    if text[at + 1 :].strip():
        raise UserError(f"{file}: not valid JSON: there is text after the array")


def _blank(text: str, at: int) -> int:
    """The first place from ``at`` on that is no white space of JSON."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; json would keep the last of several values of a name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _parsed(where: str, text: str, at: int, whole: bool = False) -> tuple[Any, int]:
    """(the JSON value of ``text`` at ``at``, where it ends); ``whole``: and nothing else is."""
    try:
        if whole:
            return _DECODER.decode(text), len(text)
        return _DECODER.raw_decode(text, at)
    except _Twice as twice:
        raise UserError(f"{where}: the field {str(twice)!r} is named twice") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: an example must be a JSON object, not {kind_of(value)}")
    return value


def _csv(file: Path, raw: bytes) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_decode(file, raw), newline=""), strict=True)
    names: list[str] | None = None
    limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters is less than a long text
    try:
        while True:
            where = f"{file}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{where}: not valid CSV: {error}") from None
            if cells is None:
                return
            if not cells:
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                _refuse_twice(where, names)
            elif len(cells) != len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells, and the header names {len(names)} columns"
                )
            else:
                yield where, {n: _cell(where, n, c) for n, c in zip(names, cells, strict=True)}
    finally:
        csv.field_size_limit(limit)


def _refuse_twice(where: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: the column {name!r} is named twice")


def _cell(where: str, name: str, cell: str) -> Any:
    if name not in LISTS:
        return cell
    return _parsed(f"{where}: column {name!r}", cell, 0, whole=True)[0]


def _parquet(file: Path, raw: bytes) -> Iterator[Row]:
    if find_spec("datasets") is None:
        raise UserError(f"{file}: .parquet needs the package 'datasets': pip install datasets")
    import pyarrow  # datasets needs it
    from pyarrow import parquet

    try:
        _refuse_twice(str(file), parquet.read_schema(io.BytesIO(raw)).names)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a parquet file: {first_line(error)}") from None
    from datasets import load_dataset

    # as a stream, for which nothing is written into the cache; the path is taken for a pattern
    path = glob.escape(str(file.resolve()))
    table = load_dataset("parquet", data_files=[path], split="train", streaming=True)
    for number, fields in enumerate(table, 1):
        yield f"{file}:{number}", dict(fields)


READERS: dict[str, Callable[[Path, bytes], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
