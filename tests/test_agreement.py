"""Ranks with different adapters: one error on every rank, and no collective that waits for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import peftkern
from peftkern.tuners.agreement import of_model
from tests import agreement, dying
from tests.ranks import NEEDS_GLOO, results


class Ran(NamedTuple):
    ranks: list[Any]  # {(way, what differs): error} of each
    dead: dict[str, Any]  # {when a rank died: (the other's error, the numbers in the folder)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("agreement")
    ranks = results("tests.agreement", folder, agreement.RANKS)
    return Ran(ranks, torch.load(folder / "dying.pt"))


@pytest.fixture
def found(ran: Ran) -> list[Any]:
    return ran.ranks


@pytest.fixture
def dead(ran: Ran) -> dict[str, Any]:
    return ran.dead


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.parametrize("what", agreement.DIFFERENT)
def test_ranks_that_differ_all_raise_one_error(what: str, found: list[Any]) -> None:
    words = agreement.DIFFERENT[what][2]
    ways = [way for way, case in agreement.CASES if case == what]
    for way in ways:
        named = {"ddp": "DistributedDataParallel over 2 ranks", "check_ranks": way}
        first, second = (of_rank[way, what] for of_rank in found)
        assert first == second
        place = named.get(way, "FSDP over 2 ranks")
        assert first.startswith(f"ValueError: {place}: ranks 0 and 1 have different"), first
        assert words in first


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.parametrize("way", agreement.SHOWN)
def test_ranks_that_agree_train_and_are_asked_once(way: str, found: list[Any]) -> None:
    assert [of_rank[way, "same"] for of_rank in found] == ["", ""]


# {what differs: what both ranks say; or the first, of what the second has refused}
PARALLEL = {
    "scale": "`lora_alpha` of 'default': 8 on rank 0, 16 on rank 1",
    "name": "the adapters: ['of 0'] on rank 0, ['of 1'] on rank 1",
    "prompt": "`num_virtual_tokens` of 'default': 2 on rank 0, 3 on rank 1",
    "added": "`lora_alpha` of 'other': 8 on rank 0, 16 on rank 1",
    "edited": "`lora_alpha` of 'default': 8 on rank 0, 9 on rank 1",
    "refused": "rank 1 has failed: NoMatchingPeftModuleError: Target modules {'nothing'} not",
    "unknown": "rank 1 has failed: ValueError: You passed an invalid `selected_adapters`",
}


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.skipif(not agreement.TRIED, reason="this transformers was not tried")
@pytest.mark.parametrize("what", PARALLEL)
def test_tensor_parallel_ranks_that_differ_all_raise(what: str, found: list[Any]) -> None:
    first, second = (of_rank["parallel", what] for of_rank in found)
    save = what in ("edited", "unknown")
    place = "`save_pretrained` of a model that" if save else "tensor parallelism over 2 ranks"
    assert first.startswith(f"ValueError: {place}") and PARALLEL[what] in first, first
    if " has failed: " in first:
        assert second and second in first + "." and "rank 1" not in second
    else:
        assert second == first
    assert [of_rank["parallel", "saved"] for of_rank in found] == ["", ""]


@NEEDS_GLOO
@pytest.mark.long
@pytest.mark.parametrize("when", dying.DYING)
def test_a_rank_that_dies_in_a_save_leaves_the_last_one(when: str, dead: dict[str, Any]) -> None:
    said, there = dead[when]
    assert said.startswith("RuntimeError: `save_pretrained` of a model that processes share out")
    assert dying.DYING[when][2] in said
    assert there == {1.0}
    assert dead[dying.NEXT] == ("", {3.0})


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
    peftkern.check_ranks(nn.Linear(2, 2))  # there is no group
    assert of_model(nn.Linear(2, 2)) == {"adapters": {"the adapters": "[]"}}
