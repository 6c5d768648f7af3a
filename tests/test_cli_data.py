"""``peftkern train``: reading data, refusing bad data and options, making token ids from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peftkern.cli.app import run
from peftkern.cli.data import read_data, split_records
from peftkern.cli.encode import collator, encode, pad_id, target_count
from peftkern.cli.errors import UserError
from peftkern.cli.forms import Record
from peftkern.cli.modelio import locate_model
from peftkern.cli.settings import TrainSettings, first_difference


def jsonl(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words a0 .. a19 have the ids 3 .. 22; nothing is added to a text."""
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, **{f"a{i}": i + 3 for i in range(20)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


BAD_LINES = [
    ("causal_lm", "{", "not valid JSON"),
    ("causal_lm", "[1, 2]", "must be a JSON object, not a list"),
    ("causal_lm", {"txt": "x"}, "the fields are 'txt'; --task causal_lm takes text (text) | "),
    ("causal_lm", {"text": 3}, "field 'text' must be a string, not a number"),
    ("causal_lm", {"text": None}, "must be a string, not null"),
    ("causal_lm", {"prompt": "x"}, "missing field 'completion'"),
    ("causal_lm", {"prompt": "x", "completion": "y", "text": "z"}, "has both"),
    ("seq_2_seq_lm", {"prompt": "x"}, "missing field 'completion'"),
    ("seq_cls", {"text": "x"}, "missing field 'label'"),
    ("seq_cls", {"text": "x", "label": True}, "must be a non-empty string or an integer"),
    ("seq_cls", {"text": "x", "label": 1.5}, "must be a non-empty string or an integer"),
    ("seq_cls", {"text": "x", "label": ""}, "must be a non-empty string or an integer"),
    ("token_cls", {"tokens": "x y", "labels": ["A"]}, "'tokens' must be a list"),
    ("token_cls", {"tokens": ["x", 1], "labels": ["A", "B"]}, "strings only"),
    ("token_cls", {"tokens": ["x", "y"], "labels": ["A"]}, "2 tokens but 1 labels"),
]
GOOD = {
    "causal_lm": {"text": "fine"},
    "seq_2_seq_lm": {"prompt": "p", "completion": "c"},
    "seq_cls": {"text": "fine", "label": "A"},
    "token_cls": {"tokens": ["fine"], "labels": ["A"]},
}


@pytest.mark.parametrize("task, line, message", BAD_LINES)
def test_bad_line_names_file_and_line(tmp_path: Path, task: str, line: Any, message: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", GOOD[task], "", line)  # the blank line counts
    with pytest.raises(UserError) as error:
        read_data(path, task)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)


def test_whole_file_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"one\ntwo \xff\n")
    (tmp_path / "x.md").write_text("a,b")
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "none").mkdir()
    blank = jsonl(tmp_path / "blank.jsonl", {"text": "  "}, {"text": ""})
    same = jsonl(tmp_path / "same.jsonl", *[{"text": "x", "label": "A"}] * 3)
    for path, task, message in (
        (tmp_path / "missing", "causal_lm", "no such file or folder"),
        (tmp_path / "empty.jsonl", "causal_lm", "is empty"),
        (tmp_path / "none", "causal_lm", "holds no .jsonl, .json, .csv, .parquet or .txt file"),
        (tmp_path / "x.md", "causal_lm", "must end in .jsonl, .json, .csv, .parquet or .txt"),
        (tmp_path / "bytes.txt", "causal_lm", "bytes.txt:2: not valid UTF-8 (byte 0xff)"),
        (tmp_path / "bytes.txt", "seq_cls", "not valid UTF-8"),
        (tmp_path / "fine.txt", "seq_cls", "missing field 'label' of labelled (text, label)"),
        (blank, "causal_lm", "has 2 examples, and the text of each is empty"),
        (same, "seq_cls", "every example has the label 'A'"),
    ):
        with pytest.raises(UserError) as error:
            read_data(str(path), task)
        assert message in str(error.value)


def test_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    jsonl(tmp_path / "b" / "1.jsonl", {"text": "second"}, {"text": " "})
    jsonl(tmp_path / "c.jsonl", {"prompt": "third", "completion": "!"})
    jsonl(tmp_path / ".hidden" / "x.jsonl", "broken")
    (tmp_path / "a.txt").write_text("\ufefffirst\nstill first", encoding="utf-8")
    data = read_data(str(tmp_path), "causal_lm")
    assert [r.text or r.prompt for r in data.records] == ["first\nstill first", "second", "third"]
    assert data.records[1].origin.endswith("1.jsonl:1")
    assert data.empty == 1
    before = data.sha256
    (tmp_path / "a.txt").write_text("other")
    assert read_data(str(tmp_path), "causal_lm").sha256 != before


def test_line_separator_inside_a_string_is_not_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_data(str(path), "causal_lm").records[0].text == "a\u2028b"


def test_labels_are_sorted_as_numbers_or_as_text(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (10, 9, "2")]
    assert read_data(jsonl(tmp_path / "a.jsonl", *rows), "seq_cls").label_names == ["2", "9", "10"]
    rows[0]["label"] = "ten"
    assert read_data(jsonl(tmp_path / "b.jsonl", *rows), "seq_cls").label_names == ["2", "9", "ten"]


def test_split_is_deterministic_and_disjoint() -> None:
    records = [Record(str(i), text=str(i)) for i in range(50)]
    first, second = split_records(records, 0.2, 1), split_records(records, 0.2, 1)
    assert first == second
    training, held = first
    assert (len(training), len(held)) == (40, 10)
    assert sorted(int(r.text) for r in training + held) == list(range(50))
    assert split_records(records, 0.2, 2) != first
    assert split_records(records, 0.0, 1) == (records, [])
    with pytest.raises(UserError, match="leaves none to train on"):
        split_records(records[:1], 0.9, 0)


def test_text_longer_than_the_limit_becomes_windows(tokenizer: Any) -> None:
    record = Record("f", text=" ".join(f"a{i}" for i in range(8)))  # 8 words and the end: 9 ids
    coded = encode([record], tokenizer, "causal_lm", 4, [])
    # the ninth id would stand alone, with nothing to predict
    assert [e["input_ids"] for e in coded.examples] == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert all(e["labels"] == e["input_ids"] for e in coded.examples)


def test_loss_is_on_the_completion_only(tokenizer: Any) -> None:
    records = [
        Record("1", prompt="a0 a1", completion="a2 a3"),
        Record("2", prompt="a0 a1 a2 a3 a4 a5", completion="a6"),  # no room for the completion
        Record("3", prompt="a0 a1 a2", completion="a3 a4 a5"),  # room for a part of it
    ]
    coded = encode(records, tokenizer, "causal_lm", 5, [])
    assert coded.examples == [
        {"input_ids": [3, 4, 5, 6, 2], "labels": [-100, -100, 5, 6, 2]},
        {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, -100, 6, 7]},
    ]
    assert (coded.cut, coded.unusable) == (2, 1)


def test_token_labels_and_batches(tokenizer: Any) -> None:
    records = [
        Record("1", tokens=["a0", "a1"], labels=["B", "A"]),
        Record("2", tokens=["a2"], labels=["A"]),
    ]
    coded = encode(records, tokenizer, "token_cls", 8, ["A", "B"])
    batch = collator(pad_id(tokenizer))(coded.examples)
    assert batch["input_ids"].tolist() == [[3, 4], [5, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[1, 0], [0, -100]]
    assert target_count(batch["labels"], "token_cls") == 3
    assert (
        target_count(batch["labels"], "causal_lm") == 1
    )  # the first place of a row predicts nothing
    rows = [Record("1", text="a0 a1 a2", label="B"), Record("2", text="a3", label="A")]
    coded = encode(rows, tokenizer, "seq_cls", 2, ["A", "B"])
    assert coded.cut == 1
    assert torch.equal(collator(1)(coded.examples)["labels"], torch.tensor([1, 0]))


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("lora_r", 0, "at least 1"),
        ("lora_dropout", 1.0, "in [0, 1)"),
        ("eval_split", -0.1, "in [0, 1)"),
        ("lr", float("nan"), "above 0"),
        ("steps", 0, "at least 1"),
        ("max_length", 1, "at least 2"),
        ("task", "lm", "one of causal_lm, seq_cls"),
        ("scheduler", "x", "one of linear"),
        ("target_modules", " , ", "all-linear, or names"),
    ],
)
def test_options_out_of_range(field: str, value: Any, allowed: str) -> None:
    settings = TrainSettings(**{"model": "m", "data": "d", "out": "o", field: value})
    with pytest.raises(UserError) as error:
        settings.validate()
    assert str(error.value).startswith(f"--{field.replace('_', '-')} is {value}; it must be ")
    assert allowed in str(error.value)


def test_identity_ignores_what_does_not_change_the_weights() -> None:
    base = TrainSettings(model="m", data="d", out="o", steps=5)
    other = TrainSettings(model="m", data="e", out="p", steps=5, save_every=7, keep=9, epochs=8.0)
    assert first_difference(base.identity("s"), other.identity("s")) is None
    assert first_difference(base.identity("s"), base.identity("t")) == (
        "the content of --data has changed since"
    )
    # a checkpoint of a version that recorded neither the order nor settings that came later
    old = {k: v for k, v in base.identity("s").items() if k not in ("order", "packing")}
    assert first_difference(old, base.identity("s")) == (
        "it saw the examples in the order of version 1, and peftkern's is version 2 now"
    )
    assert first_difference({**old, "order": 2}, base.identity("s")) is None
    other.lr = 1.0
    assert first_difference(base.identity("s"), other.identity("s")) == (
        "--lr was 0.0002 there and is 1.0 now"
    )


def test_locating_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        locate_model(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="neither config.json nor a .gguf file"):
        locate_model(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"")
    assert locate_model(str(tmp_path)) == (str(tmp_path), "a.gguf")
    assert locate_model(str(tmp_path / "a.gguf")) == (str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"several GGUF files.*: a.gguf, b.gguf"):
        locate_model(str(tmp_path))
    assert locate_model(str(tmp_path), "b.gguf") == (str(tmp_path), "b.gguf")
    with pytest.raises(UserError, match="no such file"):
        locate_model(str(tmp_path), "c.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == (str(tmp_path), None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": "/no/such/model"}, "--model /no/such/model: no such folder"),
        ({"--data": "nowhere.jsonl"}, "--data nowhere.jsonl: no such file or folder"),
        ({"--lora-r": "0"}, "--lora-r is 0; it must be at least 1"),
        ({"--lora-r": "many"}, "Invalid value for '--lora-r'"),
        ({"--nonsense": "1"}, "--nonsense"),
        ({"--out": None}, "--out"),
    ],
)
def test_command_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: Any, capsys: Any, change: dict[str, str | None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "d.jsonl", {"text": "x"})
    options = {"--model": str(tmp_path), "--data": "d.jsonl", "--out": "out", **change}
    (tmp_path / "config.json").write_text("not json")
    args = [x for name, value in options.items() if value is not None for x in (name, value)]
    assert run(["train", *args]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not (tmp_path / "out").exists()
