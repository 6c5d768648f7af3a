"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3 train as one does, in one operation a layer.

DeepSpeed comes with ``make test-distributed``.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peftkern
from tests import models, ranks, sharded
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.ranks import NEEDS_GLOO

HERE = importlib.util.find_spec("deepspeed") is not None

pytestmark = [
    NEEDS_GLOO,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`lora_bias=True`:UserWarning"),
    pytest.mark.skipif(not HERE, reason="deepspeed is not installed: make test-distributed"),
]

if HERE:
    from tests import zero
    from tests.zero import CASES, SAVED, STARTS, Case
else:
    CASES, SAVED, STARTS = [], (), {}

alone = functools.cache(sharded.alone)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ranks.results("tests.zero", tmp_path_factory.mktemp("zero"), sharded.RANKS, "table")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("files")
    found = ranks.results("tests.zero", folder, sharded.RANKS, "files")
    return [{**of_rank, "folder": folder} for of_rank in found]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_two_processes_are_as_one(case: Case, table: list[Any]) -> None:
    exact = alone(case.method)
    for of_rank in table:
        here = of_rank[tuple(case)]
        assert isinstance(here, dict), here
        ours = {name: value for name, value in here["peftkern"].items() if name in exact}
        assert ours.keys() == exact.keys()
        if case.narrow:
            assert_as_good_as_torch(ours, {name: here["peft"][name] for name in ours}, exact)
        else:
            # DeepSpeed steps in float32: gradients that cancel out show its rounding after a step
            names = [name for name in exact if not name.endswith(".grad 1")]
            want = {name: exact[name] for name in names}
            assert_same_number({name: ours[name].double() for name in names}, want)
    first, second = (of_rank[tuple(case)]["peftkern"] for of_rank in table)
    assert all(torch.equal(first[name], second[name]) for name in exact)


@pytest.mark.parametrize("case", [c for c in CASES if c.method in ("lora", "dora")], ids=", ".join)
def test_layers_run_as_one_operation_and_keep_no_weight(case: Case, table: list[Any]) -> None:
    for of_rank in table:
        here = of_rank[tuple(case)]
        assert len(here["explained"]) == 14 and all(fused for fused, _ in here["explained"])
        if case.stage == 2 or "persistent" in case.way:
            continue
        assert here["read"] and not here["held"], here
        if case.method != "lora":
            continue
        for _, reason in here["explained"]:
            assert "its weights are shards between forwards" in reason
        reasons = " ".join(reason for _, reason in here["explained"])
        assert reasons.count("trains as one operation with its MLP") == 6
        assert reasons.count("DeepSpeed gathers each by itself") == 6


@pytest.mark.parametrize("start", STARTS)
def test_starts_from_a_base_that_is_divided_already(start: str, files: list[Any]) -> None:
    base = models.build("llama").float()
    want = zero.started(base, start)
    for of_rank in files:
        assert of_rank[start].keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(of_rank[start][name], value)


@pytest.mark.parametrize("method", SAVED)
@pytest.mark.parametrize("stage", [2, 3])
def test_files_are_those_of_one_process(method: str, stage: int, files: list[Any]) -> None:
    state = peftkern.get_peft_model_state_dict(sharded.adapted(method))
    for how in ("gathered", "given")[: stage - 1]:
        folder = files[0]["folder"] / f"{method} {stage} {how}"
        found = load_file(folder / "adapter_model.safetensors")
        assert_same_number(found, {name: value.contiguous() for name, value in state.items()})
    if stage == 3:
        for of_rank in files:
            assert "deepspeed.zero.GatheredParameters" in of_rank[f"{method} 3"]
            assert not (files[0]["folder"] / f"{method} 3 never").exists()


def test_ranks_that_differ_all_raise_before_weights_are_gathered(files: list[Any]) -> None:
    first, second = (of_rank["unlike"] for of_rank in files)
    assert first == second
    assert first.startswith("ZeRO-3 over 2 ranks") and "`lora_alpha` of 'default': 8 on" in first
