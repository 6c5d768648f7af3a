"""``peftkern train --trainer sft`` and ``dpo``: TRL's own trainers, which resume and save alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from peftkern.cli import modelio, resume
from peftkern.cli.app import run
from peftkern.cli.checks import refuse_trl
from peftkern.cli.data import read_data
from peftkern.cli.errors import UserError
from peftkern.cli.ranks import Ranks
from peftkern.cli.train import train
from tests.closeness import assert_same_number
from tests.command import command, losses, make_folder, settings

PLAIN = (
    "{%- for m in messages %}{{ 'w57 ' if m.role == 'user' else 'w58 ' }}{{ m.content }} w59 "
    "{% endfor %}{%- if add_generation_prompt %}w58 {% endif %}"
)
USER, GOOD, BAD = (
    {"role": role, "content": said}
    for role, said in (("user", "w1 w2"), ("assistant", "w3"), ("assistant", "w4"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("trl"), ("llama",))
    (root / "plain.jinja").write_text(PLAIN)
    texts, chats = [], []
    for i in range(15):
        answers = {"chosen": f" w{i + 20} w8", "rejected": f" w{i + 9}"}
        texts.append({"prompt": f"w{i} w5", **answers})
        turns = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
        chats.append({"prompt": [{"role": "user", "content": f"w{i}"}], **turns})
    for name, rows in (("texts", texts), ("chats", chats)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


@pytest.mark.long
def test_sft_is_the_same_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "peftkern.cli.prepare.load_model", lambda *args: modelio.load_model(*args).double()
    )
    changes = {"steps": 3, "lora_dropout": 0.0, "packing": True, "save_every": 3}
    runs = [
        train(settings(folder, tmp_path / name, trainer=name, **changes))
        for name in ("transformers", "sft")
    ]
    assert_same_number(*map(losses, runs))
    assert_same_number(runs[0]["after"], runs[1]["after"])
    names = [{p.name for p in (tmp_path / r).iterdir()} for r in ("transformers", "sft")]
    assert names[0] == names[1]
    files = [{p.name for p in (tmp_path / r / "checkpoint-3").iterdir()}
             for r in ("transformers", "sft")]  # fmt: skip
    assert files[0] == files[1]
    assert runs[1]["speed"]["tokens_per_second"] > 0
    assert yaml.safe_load((tmp_path / "sft" / "run.yaml").read_text())["trainer"] == "sft"


@pytest.mark.long
@pytest.mark.parametrize("data", ["texts", "chats"])
def test_dpo_learns_what_is_preferred_and_goes_on(
    folder: Path, tmp_path: Path, capsys: Any, data: str
) -> None:
    out = tmp_path / "out"
    changes = {"data": str(folder / f"{data}.jsonl"), "trainer": "dpo", "beta": 0.5, "steps": 6}
    if data == "chats":
        args = command(folder, out, **changes)
        assert run(args) == 2
        error = capsys.readouterr().err
        assert "chats.jsonl:1: turns need a chat template" in error and not out.exists()
        changes["chat_template"] = str(folder / "plain.jinja")
    wanted = settings(folder, out, scheduler="constant", warmup_steps=0, **changes)
    record = train(wanted)
    # nothing is preferred at first: the loss is log 2
    assert_same_number(round(record["before"]["loss"], 4), 0.6931)
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["after"]["accuracy"] > 0.5
    state = load_file(out / "adapter_model.safetensors")
    assert len(state) == 28 and not (out / "ref").exists()
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert written["beta"] == 0.5 and written["trainer"] == "dpo"
    if data == "chats":
        return
    (out / resume.FINISHED).unlink()
    for step in (4, 6):
        (out / f"checkpoint-{step}" / resume.MANIFEST).unlink()
    again = train(wanted)
    assert again["steps_of_this_call"] == 4 and again["losses"] == record["losses"]
    assert all((load_file(out / "adapter_model.safetensors")[n] == v).all()
               for n, v in state.items())  # fmt: skip


BAD_PAIRS = [
    ({"chosen": "a", "rejected": "b"}, "missing field 'prompt' before the texts"),
    ({"prompt": "p", "chosen": "a"}, "missing field 'rejected' of preference (chosen, rejected)"),
    ({"prompt": "p", "chosen": "a", "rejected": " "}, "field 'rejected' is empty"),
    ({"text": "a"}, "missing field 'chosen' of preference (chosen, rejected)" ),
    ({"prompt": "p", "chosen": [GOOD], "rejected": "b"}, "must be a list of turns, not a string"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "begin unlike, and there is no 'prompt'"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "no turn of 'chosen' after the"),
]  # fmt: skip


@pytest.mark.parametrize("row, said", BAD_PAIRS)
def test_bad_pairs_name_file_and_line(tmp_path: Path, row: Any, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError) as error:
        read_data(str(path), "dpo")
    assert str(error.value).startswith(f"{path}:1: ") and said in str(error.value)


def test_the_prompt_of_two_chats_is_what_they_share(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chosen": [USER, GOOD], "rejected": [USER, BAD]}))
    record = read_data(str(path), "dpo").records[0]
    assert record.turns == [USER] and record.answers == ([GOOD], [BAD])


@pytest.mark.parametrize(
    "given, said",
    [
        ("--trainer ppo", "--trainer is ppo; it must be one of transformers, sft, dpo"),
        ("--beta 0.1", "--beta is for --trainer dpo, and the trainer is transformers"),
        ("--trainer dpo --beta 0", "--beta is 0.0; it must be a number above 0"),
        ("--trainer sft --task seq_cls", "--task seq_cls does not go with --trainer sft: causal_l"),
        ("--trainer dpo --packing", "--packing does not go with --trainer dpo"),
        ("--trainer sft --liger", "--liger does not go with --trainer sft"),
        ("--trainer sft --fsdp", "--fsdp does not go with --trainer sft"),
        ("--trainer dpo --method prefix", "--method prefix does not go with --trainer dpo: lora, "),
        ("--trainer sft", "--trainer sft needs the package 'trl': pip install trl"),
    ],
)
def test_what_does_not_go_with_trl_is_refused_by_name(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, given: str, said: str
) -> None:
    monkeypatch.setattr("peftkern.cli.checks.find_spec", lambda name: None)
    out = tmp_path / "out"
    places = ["--model", str(folder / "llama"), "--data", str(folder / "lm.jsonl")]
    assert run(["train", *places, "--out", str(out), "--cpu", *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"peftkern: {said}") and error.count("\n") == 1
    assert not out.exists()


def test_trl_runs_in_one_process(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--trainer sft runs in one process; --trainer transform"):
        refuse_trl(settings(folder, tmp_path, trainer="sft"), Ranks(0, 2))
