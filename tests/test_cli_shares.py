"""Which examples each process computes, and what the processes of a command say to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peftkern.cli import ranks
from peftkern.cli.encode import collator
from peftkern.cli.errors import RunError, UserError
from peftkern.cli.prepare import fingerprint
from peftkern.cli.settings import TrainSettings, first_difference
from peftkern.cli.shares import IDLE, Examples, Shares, marking
from peftkern.cli.train import _refuse_unlike_weights, train

LAUNCHED = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


def of_all(length: int, size: int, count: int, epoch: int = 0) -> list[list[list[int]]]:
    """[batch][process] -> indices."""
    shares = [Shares(length, size, rank, count, seed=7) for rank in range(count)]
    for share in shares:
        share.epoch = epoch
    each = [list(share) for share in shares]
    assert {len(share) for share in shares} == {len(batches) for batches in each}
    return [list(batch) for batch in zip(*each, strict=True)]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_the_processes_see_what_one_process_sees(length: int, size: int, count: int) -> None:
    alone = Shares(length, size * count, 0, 1, seed=7)
    batches = of_all(length, size, count)
    assert len(batches) == len(alone)
    for together, parts in zip(alone, batches, strict=True):
        assert sorted(i for part in parts for i in part if i >= 0) == sorted(together)
        assert all(1 <= len(part) <= size for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        # who has none computes one that does not count
        assert all(part == [~together[0]] for part in parts if part[0] < 0)


def test_each_epoch_has_its_order() -> None:
    first, again, second = (of_all(40, 2, 2, epoch) for epoch in (0, 0, 1))
    assert first == again != second


def test_an_example_that_does_not_count_is_marked() -> None:
    examples: list[dict[str, Any]] = [{"input_ids": [i], "labels": [i]} for i in range(3)]
    data, collate = Examples(examples), marking(collator(0))
    assert len(data) == 3
    assert IDLE not in collate([data[1], data[2]])
    idle = collate([data[~2]])
    assert idle[IDLE] and idle["input_ids"].tolist() == [[2]]
    assert IDLE not in examples[2]


def test_the_launchers_variables() -> None:
    assert ranks.started({}) == ranks.started({"WORLD_SIZE": "1", "RANK": "0"}) == ranks.ALONE
    assert ranks.started(LAUNCHED) == ranks.Ranks(index=3, count=4, local=1)
    with pytest.raises(UserError, match="WORLD_SIZE is 4, and LOCAL_RANK, MASTER_PORT not set"):
        ranks.started({**LAUNCHED, "LOCAL_RANK": "", "MASTER_PORT": ""})
    with pytest.raises(UserError, match="WORLD_SIZE is 'many'; it must be a number"):
        ranks.started({"WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP, which"),
        (
            "ACCELERATE_USE_DEEPSPEED",
            "True",
            "asks for DeepSpeed, which",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "asks for torch.compile .inductor."),
    ],
)
def test_what_the_launcher_asks_for_is_refused(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        ranks.join(cpu=True)


def test_precision_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, bf16 in (("no", True), ("no", False), ("bf16", True)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        ranks.refuse_other_precision(bf16)
    for asked, bf16 in (("fp16", True), ("fp16", False), ("bf16", False)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        with pytest.raises(UserError, match=f"asks for mixed precision {asked}"):
            ranks.refuse_other_precision(bf16)


@pytest.mark.parametrize("command", [["demo"], ["tune", "--model", "x"]])
def test_other_commands_run_in_one_process(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftkern.cli.app import run

    for name, value in {**LAUNCHED, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run(command) == 2
    assert f"{command[0]} runs in one process" in capsys.readouterr().err


class Seen(ranks.Ranks):
    """The first of two processes, with what the other one says."""

    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_an_error_of_one_process_is_an_error_of_all() -> None:
    both = Seen(0, 2)
    assert both.together(lambda: 3) == 3

    def fails() -> None:
        raise OSError("no space")

    with pytest.raises(RunError, match="^in process 0 of 2: cannot read or write: no space") as own:
        both.together(fails)
    assert own.value.everywhere
    Seen.other = (UserError, "bad file")
    with pytest.raises(UserError, match="^in process 1 of 2: bad file$"):
        both.together(lambda: 3)
    Seen.other = None


def test_weights_that_differ_are_refused() -> None:
    models = [nn.Linear(3, 2).double() for _ in range(2)]
    prints = [fingerprint(model) for model in models]
    assert prints[0] != prints[1] and fingerprint(models[0]) == prints[0]
    for values in (torch.zeros(2, 2, dtype=torch.uint8), torch.ones(()), torch.empty(0)):
        holder = nn.ParameterList([nn.Parameter(values, requires_grad=False)])
        assert fingerprint(holder)
    both = Seen(0, 2)
    Seen.other = prints[0]
    _refuse_unlike_weights(both, models[0], "there")
    with pytest.raises(UserError, match="--model there: process 1 has read other weights than"):
        _refuse_unlike_weights(both, models[1], "there")
    Seen.other = None


@pytest.mark.parametrize(
    "content, more, said",
    [
        (None, {}, "none.json: no such file"),
        ("{'a': 1}", {}, "not valid JSON: Expecting property name .* at line 1, column 2"),
        ("[1]", {}, "must hold a JSON object"),
        (b"\xff\xfe{", {}, "not valid JSON"),
        ("{}", {"fsdp": True}, "--deepspeed does not go with --fsdp"),
        ("{}", {"load_in": "4bit"}, "--deepspeed does not go with --load-in 4bit"),
        ("{}", {"lacks": "deepspeed"}, "--deepspeed needs the package 'deepspeed': pip install"),
        ("{}", {}, "--deepspeed divides the model among several processes, and this is one"),
    ],
)
def test_configurations_of_deepspeed_that_are_refused(
    content: Any, more: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "none.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    lacks, more = more.get("lacks"), {k: v for k, v in more.items() if k != "lacks"}
    monkeypatch.setattr(
        "peftkern.cli.checks.find_spec", lambda name: None if name == lacks else name
    )
    settings = TrainSettings("model", "data", str(tmp_path / "out"), deepspeed=str(file), **more)
    with pytest.raises(UserError, match=said):
        train(settings)
    assert not (tmp_path / "out").exists()


def test_a_changed_configuration_of_deepspeed_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    settings = TrainSettings("model", "data", "out", deepspeed=str(file))
    file.write_text('{"zero_optimization": {"stage": 2}}')
    before = settings.identity("sha", 2)
    file.write_text('{ "zero_optimization": {"stage": 2} }')
    assert settings.identity("sha", 2) == before
    file.write_text('{"zero_optimization": {"stage": 3}}')
    said = first_difference(before, settings.identity("sha", 2))
    assert said == "the content of --deepspeed has changed since"
    settings.deepspeed = None
    assert "--deepspeed was" in str(first_difference(before, settings.identity("sha", 2)))
