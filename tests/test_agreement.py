"""Ranks with different adapters: one error on every rank, and no collective that waits for it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import peftkern
from peftkern.tuners.agreement import of_model
from tests import agreement
from tests.ranks import NEEDS_GLOO, results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("agreement")
    return results("tests.agreement", folder, agreement.RANKS)


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.parametrize("what", agreement.DIFFERENT)
def test_ranks_that_differ_all_raise_one_error(what: str, found: list[Any]) -> None:
    words = agreement.DIFFERENT[what][2]
    ways = [way for way, case in agreement.CASES if case == what]
    for way in ways:
        wrapper = "DistributedDataParallel" if way == "ddp" else "FSDP"
        first, second = (of_rank[way, what] for of_rank in found)
        assert first == second
        assert first.startswith(f"ValueError: {wrapper} over 2 ranks: ranks 0 and 1 have"), first
        assert words in first


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.parametrize("way", agreement.SHOWN)
def test_ranks_that_agree_train_and_are_asked_once(way: str, found: list[Any]) -> None:
    assert [of_rank[way, "same"] for of_rank in found] == ["", ""]


def test_a_note_has_the_same_words_in_every_process() -> None:
    def note(targets: Any) -> Any:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        settings: Any = {"r": 1, "target_modules": targets, "rank_pattern": {"a": 2}}
        adapted = peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
        found = of_model(adapted)
        del adapted
        return found

    one, other = note({"b", "a"}), note(["a", "b"])
    assert one == other and " at 0x" not in str(one)
    assert one["configurations"]["`target_modules` of 'default'"] == "['a', 'b']"
    assert of_model(nn.Linear(2, 2)) == {"adapters": {"the adapters": "[]"}}
