"""Two processes that share a model's weights train as one process does."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import peftkern
from tests import ranks, sharded
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.ranks import NEEDS_GLOO
from tests.sharded import Case

pytestmark = [NEEDS_GLOO, pytest.mark.filterwarnings("ignore:`lora_bias=True`:UserWarning")]

Found = list[dict[Any, Any]]  # {case: what was found} of each process


@pytest.fixture(scope="module")
def headline(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("sharded")
    found = ranks.results("tests.sharded", folder, sharded.RANKS)
    return [{**of_rank, "folder": folder} for of_rank in found]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("sharded")
    return ranks.results("tests.sharded", folder, sharded.RANKS, "all")


alone = functools.cache(sharded.alone)


def check(case: Case, found: Found) -> None:
    exact = alone(case.method)
    for of_rank in found:
        here = of_rank[tuple(case)]
        assert isinstance(here, dict), here
        ours = here["peftkern"]
        want = {key: exact[key] for key in ours}
        assert len(want) >= len(exact) / 2
        if case.narrow:
            assert_as_good_as_torch(ours, {key: here["peft"][key] for key in ours}, want)
        else:
            assert_same_number(ours, want)
    first, second = (of_rank[tuple(case)]["peftkern"] for of_rank in found)
    assert all(torch.equal(first[key], second[key]) for key in first)


# ways in which each linear layer with an adapter runs as one operation, and in which none does
FUSED = ("fsdp2, layers", "fsdp2, wrapped", "fsdp1, layers")
GENERAL = {
    "fsdp2, leaves": "lora_A is a FSDPLinear, not an nn.Linear, in the last forward",
    "fsdp1, our policy": "lora_A is a FullyShardedDataParallel, not an nn.Linear, in the last",
}


def check_explained(case: Case, here: dict[str, Any]) -> None:
    rows = here["explained"]
    assert len(rows) == 14
    if case.way in FUSED:
        assert all(fused for fused, _ in rows), rows
        if case.method == "lora":
            assert all("its weights are shards between forwards" in why for _, why in rows), rows
    else:
        reason = GENERAL[case.way]
        assert all(not fused and reason in why for fused, why in rows), rows


@pytest.mark.long
@pytest.mark.parametrize("case", sharded.HEADLINE, ids=", ".join)
def test_two_processes_are_as_one(case: Case, headline: Found) -> None:
    check(case, headline)
    if case.method in ("lora", "dora") and case.way in (*FUSED, *GENERAL):
        for of_rank in headline:
            check_explained(case, of_rank[tuple(case)])


@pytest.mark.long
@pytest.mark.parametrize("case", sharded.HEADLINE_REFUSED, ids=", ".join)
def test_parameters_apart_from_their_factors_are_refused(case: Case, headline: Found) -> None:
    check_refused(case, headline)


@pytest.mark.long
@pytest.mark.parametrize("case", sharded.SAVED, ids=", ".join)
@pytest.mark.parametrize("how", ["gathered", "given"])
def test_files_are_those_of_one_process(case: Case, how: str, headline: Found) -> None:
    folder = headline[0]["folder"] / f"{case} {how}"
    found = peftkern.utils.save_and_load.load_peft_weights(folder, device="cpu")
    want = peftkern.get_peft_model_state_dict(sharded.adapted(case.method))
    assert_same_number(found, {key: value.contiguous() for key, value in want.items()})


@pytest.mark.long
def test_parts_of_fsdp1_are_not_saved(headline: Found) -> None:
    for of_rank in headline:
        [said] = filter(None, of_rank["said"])
        assert "only a part of `prompt_encoder.default`" in said and "summon_full_params" in said
        assert not (of_rank["folder"] / "never").exists()


def check_refused(case: Case, found: Found) -> None:
    words = "by FSDP2 (fully_shard" if "fsdp1" in case.way else "give fully_shard the adapted"
    for of_rank in found:
        assert words in of_rank[tuple(case)].replace("\n", " "), of_rank[tuple(case)]


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.ALL, ids=", ".join)
def test_the_table(case: Case, table: Found) -> None:
    check(case, table)


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded.REFUSED, ids=", ".join)
def test_the_table_of_what_is_refused(case: Case, table: Found) -> None:
    check_refused(case, table)
