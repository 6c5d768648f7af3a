"""``peftkern train``: the forms of data, in each kind of file, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkern.cli.data import read_data
from peftkern.cli.errors import UserError

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ROWS = {
    "text": {"text": "q"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": SHARED},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the kind that its suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            cells = [
                {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                for row in rows
            ]
            writer.writerows(cells)
    else:
        whole = json.dumps(rows, indent=1)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(whole if path.suffix == ".json" else lines)
    return str(path)


def message(path: Path | str, task: str = "causal_lm", named: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        read_data(str(path), task, named)
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("form", ROWS)
def test_every_form_in_every_kind_of_file(tmp_path: Path, form: str, suffix: str) -> None:
    # a path that is no pattern
    path = tmp_path / f"a[1]{suffix}"
    data = read_data(write(path, [ROWS[form], ROWS[form]]), "causal_lm")
    assert len(data.records) == 2
    record = data.records[1]
    assert str(path) in record.origin and record.origin != data.records[0].origin
    if form in ("messages", "sharegpt", "alpaca"):
        assert record.turns == CHAT
    assert record.text == ("q" if form == "text" else "")
    if form == "alpaca":
        assert str(record.prompt).endswith("### Instruction:\nq\n\n### Response:\n")
    if form in ("prompt-completion", "alpaca"):
        assert record.completion == "a"


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"two\nlines",a\n\nq,a\nq\n')
    assert message(table) == f"{table}:6: 1 cells, and the header names 2 columns"
    whole = tmp_path / "a.json"
    whole.write_text('[\n {"text": "a"},\n\n {"text":\n 3}\n]')
    assert message(whole) == f"{whole}:4: field 'text' must be a string, not a number"
    whole.write_text('[\n {"text": "a"}\n {"text": "b"}]')
    assert message(whole) == f"{whole}:3: not valid JSON: ',' or ']' expected"
    whole.write_text('{"text": "a"}\n{"text": 1}')
    assert message(whole).startswith(f"{whole}:2: field 'text' must be a string")


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": "x" * 200_000}])
    assert len(read_data(path, "causal_lm").records[0].text) == 200_000


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "a.csv"
    table.write_text("text,text\na,b\n")
    assert message(table) == f"{table}:1: the column 'text' is named twice"
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n{"text": "a", "text": "b"}\n')
    assert message(lines) == f"{lines}:2: the field 'text' is named twice"
    column = pyarrow.array(["a"])
    pack = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), pack)
    assert message(pack) == f"{pack}: the column 'text' is named twice"
    pack.write_bytes(b"none")
    assert message(pack).startswith(f"{pack}: not a parquet file: ")


def test_parquet_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [ROWS["text"]])
    monkeypatch.setattr("peftkern.cli.readers.find_spec", lambda name: None)
    assert message(path) == f"{path}: .parquet needs the package 'datasets': pip install datasets"


def test_a_file_holds_one_form(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS["messages"], ROWS["sharegpt"]])
    assert message(path) == (
        f"{path}:2: is of the form sharegpt (conversations), and {path}:1 of messages (messages); "
        "a file holds one form"
    )
    both = write(tmp_path / "b.jsonl", [{**ROWS["text"], **ROWS["alpaca"]}])
    assert message(both) == (
        f"{both}:1: has both text (text) and alpaca (instruction, output); name one with "
        "--data-format"
    )
    assert read_data(both, "causal_lm", "alpaca").records[0].turns == CHAT
    assert "--data-format messages: --task seq_cls takes labelled" in message(
        both, "seq_cls", "messages"
    )


USER, SAID = CHAT
BAD_TURNS = [
    ("hello", "field 'messages' must be a list of turns, not a string"),
    ([], "field 'messages' holds no turn"),
    ([USER, "hello"], "turn 2 of 'messages' must be an object, not a string"),
    ([{"role": "user"}], "turn 1 of 'messages' has the fields 'role'; it needs role, content or"),
    ([{"role": "bot", "content": "x"}], "turn 1 of 'messages' has the role 'bot'; allowed: system"),
    ([{"role": ["user"], "content": "x"}], "has the role ['user']; allowed: "),
    ([USER, {**SAID, "content": " \n"}], "turn 2 of 'messages' (assistant) is empty"),
    ([USER, {**SAID, "content": 3}], "has a content that must be a string, not a number"),
    ([USER, {**SAID, "content": None}], "has a content that must be a string, not null"),
    ([USER], "no turn of 'messages' is the assistant's: it has nothing to learn"),
]


@pytest.mark.parametrize("turns, said", BAD_TURNS)
def test_bad_turns_name_file_line_and_turn(tmp_path: Path, turns: Any, said: str) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS["messages"], {"messages": turns}])
    assert message(path).startswith(f"{path}:2: ") and said in message(path)


def test_turns_with_more_than_text(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"messages": [USER, asks], "tools": [call], "system": "s"}]
    record = read_data(write(tmp_path / "a.jsonl", rows), "causal_lm").records[0]
    assert record.turns[0] == {"role": "system", "content": "s"}
    assert record.turns[2] == {**asks, "content": ""} and record.tools == [call]
    rows = [{"prompt": [USER, SAID, USER], "completion": [SAID]}]
    record = read_data(write(tmp_path / "b.jsonl", rows), "causal_lm").records[0]
    assert record.turns == [USER, SAID, USER, SAID] and record.from_turn == 3
