"""``peftkern train``: a finished run that is extended, and what a run tells at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkern.cli import resume
from peftkern.cli.app import run
from peftkern.cli.arguments import training_arguments
from peftkern.cli.encode import token_count
from peftkern.cli.errors import UserError
from peftkern.cli.packing import packed_collator
from peftkern.cli.ranks import ALONE
from peftkern.cli.train import train
from tests.closeness import assert_same_number
from tests.command import assert_equal_runs, command, make_folder, settings

CONSTANT = {"scheduler": "constant_with_warmup", "save_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("longer"), ("llama",))


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of eight steps."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, train(settings(folder, out, steps=8, **CONSTANT))


@pytest.mark.long
def test_a_finished_run_goes_on(
    folder: Path, tmp_path: Path, reference: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(settings(folder, out, steps=4, **CONSTANT))
    capsys.readouterr()
    # killed before it ends, it goes on from where it was
    with monkeypatch.context() as m:
        m.setattr(resume, "rotate", stop_at("checkpoint-6"))
        with pytest.raises(KeyboardInterrupt):
            train(settings(folder, out, steps=8, **CONSTANT))
    assert "going on from checkpoint-4, with the learning rates of the" in capsys.readouterr().out
    assert (out / resume.FINISHED).exists()
    record = train(settings(folder, out, steps=8, **CONSTANT))
    assert record["steps_of_this_call"] == 2
    assert_equal_runs(out, record, reference)
    assert "steps: 8\n" in (out / resume.CONFIG).read_text()
    assert run(command(folder, out, steps=8, **CONSTANT)) == 0
    assert "Already trained" in capsys.readouterr().out
    # a shorter one, and a longer one with another setting, are other runs
    assert run(command(folder, out, steps=7, **CONSTANT)) == 2
    assert "--steps was 8 there and is 7 now" in capsys.readouterr().err
    assert run(command(folder, out, steps=9, lr=0.5, **CONSTANT)) == 2
    assert "--lr was 0.01 there and is 0.5 now" in capsys.readouterr().err
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / resume.MANIFEST).unlink()
    assert run(command(folder, out, steps=9, **CONSTANT)) == 2
    assert "no checkpoint from which it could go on; --fresh" in capsys.readouterr().err


def stop_at(name: str) -> Any:
    def rotate(out: Path, keep: int) -> None:
        if (out / name).exists():
            raise KeyboardInterrupt

    return rotate


@pytest.mark.long
def test_the_schedule_is_that_of_the_longer_run(folder: Path, tmp_path: Path) -> None:
    rates = []
    for name, lengths in (("at once", [6]), ("in two", [3, 6])):
        out = tmp_path / name
        for steps in lengths:
            train(settings(folder, out, steps=steps, scheduler="linear", warmup_steps=0))
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        rates.append([e["learning_rate"] for e in state["log_history"] if "loss" in e])
    assert_same_number(rates[0][3:], rates[1][3:])
    assert rates[1][2] < rates[1][3]  # the shorter one had come to its end


def test_epochs_grow_too() -> None:
    was = {"epochs": 1.0, "lr": 1.0}
    assert resume.is_longer({"epochs": 2.0, "lr": 1.0}, was, 10)
    assert not resume.is_longer({"epochs": 2.0, "lr": 2.0}, was, 10)
    assert not resume.is_longer({"epochs": 1.0, "lr": 1.0}, was, 10)
    assert resume.is_longer({"steps": 11, "lr": 1.0}, was, 10)
    assert not resume.is_longer({"steps": 10, "lr": 1.0}, was, 10)
    assert not resume.is_longer({**was, "epochs": 2.0, "order": 2}, {**was, "order": 1}, 10)


def test_a_checkpoint_of_another_order_is_refused(
    folder: Path, tmp_path: Path, reference: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-6").mkdir(parents=True)
    for file in (reference[0] / "checkpoint-6").iterdir():
        (out / "checkpoint-6" / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((out / "checkpoint-6" / resume.MANIFEST).read_text())
    del manifest["identity"]["order"]
    (out / "checkpoint-6" / resume.MANIFEST).write_text(json.dumps(manifest))
    assert run(command(folder, out, steps=8, **CONSTANT)) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6 was made with other settings: it saw the examples in the order of" in error


def test_the_end_tells_speed_memory_and_what_ran(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    record = train(settings(folder, out, steps=3, report=True))
    printed = " ".join(capsys.readouterr().out.split())
    assert " tokens/s, " in printed and " MiB above the model; 14 adapted layers: " in printed
    assert record["runs_as"].startswith("14 adapted layers: ") and record["peak_mib"] > 0
    # all of an optimizer step are counted: 2 examples in each of 2 passes, of 6 to 9 tokens
    speed = record["speed"]
    assert 6 <= speed["tokens_per_second"] / speed["examples_per_second"] <= 9
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert all(e["tokens_per_second"] > 0 for e in state["log_history"] if "loss" in e)
    page = (out / resume.REPORT).read_text()
    assert page.count("data:image/svg+xml;base64,") == 1 and "14 adapted layers" in page
    for words in ("held-out loss", "tokens a second", "peak memory", "lora_r"):
        assert words in page


def test_padding_is_not_counted() -> None:
    rows = [
        {"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1), "position_ids": list(range(n))}
        for n in (3, 7)
    ]
    assert token_count(packed_collator(0)(rows)) == 10
    assert token_count({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == 5


def test_a_report_without_matplotlib_has_no_plots(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkern.cli.figures.find_spec", lambda name: None)
    train(settings(folder, tmp_path / "out", steps=1, report=True))
    assert "report.html has no plots without 'matplotlib': pip" in capsys.readouterr().out
    page = (tmp_path / "out" / resume.REPORT).read_text()
    assert "<img" not in page and "The training" not in page and "lora_r" in page


def test_reports_to_what_is_not_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told in ("x", "wandb,x", ","):
        with pytest.raises(UserError, match="^--report-to is .*one or several of none, tensorb"):
            settings(folder, tmp_path, report_to=told).validate()
    monkeypatch.setattr("peftkern.cli.checks.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(UserError, match=f"--report-to {name} needs the package '{name}': pip"):
            train(settings(folder, tmp_path / "out", report_to=name))
    assert not (tmp_path / "out").exists()


def test_the_log_goes_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    for told, wanted in (("tensorboard,wandb", ["tensorboard", "wandb"]), ("none", [])):
        made = training_arguments(settings(folder, tmp_path, report_to=told), ALONE)
        assert made.report_to == wanted
