"""``peftkern.as_peft()``: other libraries' own doors make peftkern's adapters.

Each process goes through several doors (tests/stood_in.py), as the call is for a whole process.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import peft
import pytest
import torch

import peftkern
from tests import children, stood_in
from tests.closeness import assert_same_number

pytest.importorskip("trl")
pytest.importorskip("sentence_transformers")

# of the names that the libraries import, those of other methods
OF_OTHER_METHODS = {
    "peft.LoHaConfig",
    "peft.LoKrConfig",
    "peft.tuners.loha.layer.LoHaLayer",
    "peft.tuners.lokr.layer.LoKrLayer",
    "peft.tuners.lokr.layer.factorization",
}


def run(folder: Any, *arguments: str) -> Any:
    # the folders that this process was given, for a checkout that is not installed
    path = os.pathsep.join([str(children.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = children.python("-m", "tests.stood_in", str(folder), *arguments, **env)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("found"))


def test_the_scan_sees_every_form():
    source = """
import peft
import peft.utils as u
from peft import a
def late():
    from peft.x.y import b as c
    return peft.d, u.e, other.f
"""
    names = stood_in.names_in(stood_in.ast.parse(source))
    assert names == {("peft", "a"), ("peft.x.y", "b"), ("peft", "d"), ("peft", "e")}


@pytest.mark.long
def test_each_name_that_the_libraries_import_is_there(found):
    owners = found["owners"]
    assert {"peft.LoraConfig", "peft.utils.other.AuxiliaryTrainingWrapper"} <= set(owners)
    assert len(owners) >= 20
    others = {name: of for name, of in owners.items() if of != "peftkern"}
    assert set(others) <= OF_OTHER_METHODS and set(others.values()) <= {"_hf_peft"}


@pytest.mark.long
@pytest.mark.parametrize("door", stood_in.DOORS)
def test_a_door_makes_peftkerns_adapters_with_hf_pefts_numbers(door, found, tmp_path):
    """HF PEFT's own run is made here, by the same function."""
    import datasets

    datasets.disable_progress_bars()
    mine = found[door]
    assert mine["made by"] == ["peftkern"]
    assert mine["fused"][0] == mine["fused"][1] > 10
    model, numbers = stood_in.DOORS[door](str(tmp_path))
    assert {type(m).__module__.split(".")[0] for m in stood_in.adapters(model)} == {"peft"}
    assert_same_number(mine["numbers"], numbers)


@pytest.mark.long
def test_other_methods_are_hf_pefts(found):
    others = found["others"]
    assert set(others["made by"]) == {"_hf_peft"}
    assert all(others["pass for"]) and others["passes for no LoRA"]
    assert others["keys"] == 9 and others["active"] == ["default"] and others["same"]


@pytest.mark.long
def test_without_hf_peft(tmp_path):
    found = run(tmp_path, "--alone")
    missing = {name for name, owner in found["owners"].items() if owner is None}
    assert missing <= OF_OTHER_METHODS
    assert found["fused"] == [(14, 14), (14, 14)] and found["unwrapped"]


def test_too_late_is_an_error():
    before = list(sys.meta_path)
    importlib.import_module("transformers.trainer_utils")
    match = r"before peft is imported: peft, .*transformers.trainer_utils.* have decided"
    with pytest.raises(RuntimeError, match=match):
        peftkern.as_peft()
    assert sys.meta_path == before and sys.modules["peft"] is peft
