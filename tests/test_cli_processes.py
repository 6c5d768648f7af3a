"""``peftkern train`` in two processes: the losses of one, one writer, and kills of any of them.

One process runs all launches (:mod:`tests.launched`), as starting Python takes the most time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from peftkern.cli import resume
from peftkern.cli.train import train
from tests.closeness import assert_same_number, differ
from tests.command import assert_equal_runs, command, losses, make_folder, settings, weights
from tests.launched import launch
from tests.ranks import NEEDS_GLOO

pytestmark = [
    pytest.mark.long,
    NEEDS_GLOO,
]

# FSDP2 over gloo ends in a mismatch of collectives on torch 2.11; Trainer of transformers 5.17
# cannot load an optimizer in one of several processes on a CPU
NEWER = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13")
    or Version(transformers.__version__) < Version("5.23"),
    reason="an older torch or transformers cannot on a CPU",
)
# 25 training examples: the last batch of an epoch, in the fourth step, has one, and so a process
# none
EQUAL = {"steps": 4, "save_every": 8, "eval_split": 0.17, "lora_dropout": 0.0, "batch_size": 2}
CLASSES = {"task": "seq_cls", "eval_split": 0.3}
CHECKPOINTED = {**EQUAL, "gradient_checkpointing": True}
# what `--fsdp` divides besides float32 weights
DIVIDED = {
    "bf16": {"gradient_checkpointing": True},
    "fp8": {"load_in": "fp8"},
    "4bit": {"load_in": "4bit"},
}
KILLS = {
    "the other one in a pass": [1, "pass", 7],
    "the other one in a save": [1, "save", 2],
    "the writer in a save": [0, "seal", 2],
    "fsdp": [1, "pass", 7],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("processes"), ("llama",))


def classes(folder: Path) -> dict[str, Any]:
    return {**EQUAL, **CLASSES, "data": str(folder / "cls.jsonl")}


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, Any]:
    """What the processes of all launches printed; their outputs stand in ``folder``."""

    def of(name: str, **changes: Any) -> dict[str, Any]:
        return {"args": command(folder, folder / name, **{"steps": 6} | changes)}

    launches = {
        "lm": {**of("lm", **EQUAL), "double": True},
        "sharded": {**of("sharded", fsdp=True, **CHECKPOINTED), "double": True},
        "classes": {**of("classes", **classes(folder)), "double": True},
        "whole": of("whole"),
        "whole, fsdp": of("whole, fsdp", fsdp=True),
        "again": of("whole"),
        "fp8": of("fp8", load_in="fp8", steps=2),
        **{
            f"{way}, {n}": of(f"{way}, {n}", fsdp=way == "fsdp", bf16=True, steps=2, **more)
            for n, more in DIVIDED.items()
            for way in ("ddp", "fsdp")
        },
        "other settings": of("whole", lr=0.5),
        "no data": of("none", data="nowhere.jsonl"),
        "no rank": of("none", lora_r=0),
        "unlike": {
            **of("none"),
            "args_of": {"1": command(folder, folder / "none", steps=6, seed=5)},
        },
        "one without data": {
            **of("none"),
            "args_of": {"1": command(folder, folder / "none", data="nowhere.jsonl")},
        },
    }
    for name, kill in KILLS.items():
        changes = {"fsdp": True} if name == "fsdp" else {}
        # the first process ends by itself; the other one waits for it to say why
        launches[name] = {**of(name, **changes), "kill": kill, "patience": 60 * kill[0]}
        launches[f"{name}, again"] = of(name, **changes)
    return launch(folder, **launches)


def record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / resume.FINISHED).read_text())


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launched import _double

    monkeypatch.setattr("peftkern.cli.prepare.load_model", _double)


@pytest.mark.parametrize(
    "batch, name",
    [((4, 2), "lm"), ((2, 4), "lm"), pytest.param((4, 2), "sharded", marks=NEWER)],
)
def test_the_losses_of_one_process_with_as_large_a_batch(
    batch: tuple[int, int], name: str, folder: Path, ran: Any, tmp_path: Path, double: None
) -> None:
    assert [process["code"] for process in ran[name]] == [0, 0], ran[name]
    changes = {**EQUAL, "batch_size": batch[0], "grad_accumulation": batch[1]}
    alone = train(settings(folder, tmp_path / "out", **changes))
    both = record(folder, name)
    assert_same_number(losses(both), losses(alone))
    for when in ("before", "after"):
        assert_same_number(both[when]["loss"], alone[when]["loss"])
    assert differ(losses(both)[0], losses(both)[-1])
    assert_same_number(weights(folder / name), weights(tmp_path / "out"))


def test_a_classifier_of_two_processes_is_measured_as_in_one(
    folder: Path, ran: Any, tmp_path: Path, double: None
) -> None:
    assert [process["code"] for process in ran["classes"]] == [0, 0]
    alone = train(settings(folder, tmp_path / "out", **classes(folder) | {"batch_size": 4}))
    both = record(folder, "classes")
    assert_same_number(losses(both), losses(alone))
    for when in ("before", "after"):
        assert_same_number(both[when]["loss"], alone[when]["loss"])
        assert both[when]["accuracy"] == alone[when]["accuracy"]


def test_the_first_process_alone_prints_and_the_record_tells_how_to_repeat(
    folder: Path, ran: Any
) -> None:
    first, second = ran["whole"]
    assert "2 processes x 2 examples x 2 passes: 8 examples an optimizer step" in first["out"]
    assert "going on" not in first["out"] and "adapter saved in" in first["out"]
    assert second["out"] == "" and first["err"] == second["err"] == ""
    whole = record(folder, "whole")
    assert whole["processes"] == 2 and whole["examples_per_step"] == 8
    assert whole["identity"]["processes"] == 2
    files = {p.name for p in (folder / "whole" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", resume.MANIFEST} <= files
    assert "Already trained" in ran["again"][0]["out"]


@NEWER
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_ends_and_goes_on_to_the_same_weights(
    name: str, folder: Path, ran: Any
) -> None:
    killed = KILLS[name][0]
    codes = [process["code"] for process in ran[name]]
    assert codes[killed] == -9 and codes[1 - killed] not in (0, -9)
    if killed == 1:
        (line,) = ran[name][0]["err"].splitlines()
        assert line.startswith("peftkern: another process has ended, or does not answer (")
        assert line.endswith("; the same command goes on from the last checkpoint")
    again = ran[f"{name}, again"]
    assert [process["code"] for process in again] == [0, 0] and again[1]["out"] == ""
    assert "going on from checkpoint-2" in again[0]["out"]
    uninterrupted = "whole, fsdp" if name == "fsdp" else "whole"
    whole = folder / uninterrupted, record(folder, uninterrupted)
    assert_equal_runs(folder / name, record(folder, name), whole)
    assert not (folder / name / resume.PARTIAL).exists()


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("other settings", 2, "--lr was 0.01 there and is 0.5 now"),
        ("no data", 2, "--data nowhere.jsonl: no such file or folder"),
        ("no rank", 2, "--lora-r is 0; it must be at least 1"),
        ("unlike", 2, "--seed is 0 in process 0 and 5 in process 1; all processes must have"),
        ("one without data", 2, "in process 1 of 2: --data nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_said_once_and_ends_every_process(
    name: str, code: int, said: str, folder: Path, ran: Any
) -> None:
    first, second = ran[name]
    assert first["code"] == code and second["code"] in (code, -15)
    assert first["err"].count("\n") == 1 and said in first["err"]
    assert second["err"] == first["out"] == second["out"] == ""
    assert not (folder / "none").exists()


def test_a_base_in_fp8_is_not_sent_around(folder: Path, ran: Any) -> None:
    # gloo sends no fp8; DistributedDataParallel would send all that is frozen
    assert [process["code"] for process in ran["fp8"]] == [0, 0], ran["fp8"]
    assert len(losses(record(folder, "fp8"))) == 2


@NEWER
@pytest.mark.parametrize("name", DIVIDED)
def test_fsdp_divides_narrow_and_quantised_bases(name: str, folder: Path, ran: Any) -> None:
    found = []
    for run in (f"ddp, {name}", f"fsdp, {name}"):
        assert [process["code"] for process in ran[run]] == [0, 0], ran[run]
        found.append(losses(record(folder, run)))
    whole, divided = found
    # the first forward is that of the whole weights, bit for bit; gradients are summed otherwise
    assert divided[0] == whole[0] and len(divided) == 2 and divided[1] != divided[0]


def test_fsdp_in_one_process_is_refused(folder: Path, capsys: Any) -> None:
    from peftkern.cli.app import run

    assert run([*command(folder, folder / "none"), "--fsdp"]) == 2
    assert "--fsdp divides the model among several processes, and this is one" in (
        capsys.readouterr().err
    )
    assert not (folder / "none").exists()


def test_another_number_of_processes_is_refused(folder: Path, ran: Any, capsys: Any) -> None:
    from peftkern.cli.app import run

    assert run(command(folder, folder / "whole", steps=6)) == 2
    assert "it had 2 processes and there are 1 now" in capsys.readouterr().err
