"""HF PEFT's wrappers of experts' parameters under ``peftkern.fuse``; and compiled models."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import peftkern
from peftkern.tuners.lora.hf_layer import FusedParamWrapper
from tests import moe_models
from tests.closeness import assert_same_number
from tests.field import quietly
from tests.moe_models import FLAGS, adapt, both, ids, numbers, tiny, tiny_pair


def hf_wrappers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper)]


def rows(model: Any) -> list[bool]:
    return [row.fused for row in peftkern.explain(model)]


@pytest.mark.parametrize("kind", FLAGS)
def test_hf_pefts_wrappers_are_fused(kind: str) -> None:
    _, theirs = tiny_pair(kind, names=("default", "other"))
    want, keys = numbers(theirs), theirs.state_dict().keys()
    assert not any(rows(theirs))
    fused = peftkern.fuse(copy.deepcopy(theirs))
    assert all(rows(fused)), str(peftkern.explain(fused))
    assert all(type(w) is FusedParamWrapper for w in hf_wrappers(fused))
    assert fused.state_dict().keys() == keys
    assert_same_number(numbers(fused), want)
    for active in ("other", ["default", "other"]):
        for model in (fused, theirs):
            model.base_model.set_adapter(active)
        assert_same_number(numbers(fused), numbers(theirs))


def test_a_fused_model_goes_on_as_hf_pefts() -> None:
    _, theirs = tiny_pair(names=("default", "other"))
    fused = peftkern.fuse(copy.deepcopy(theirs))
    with torch.no_grad():
        base = tiny()(ids())
        with fused.disable_adapter():
            assert_same_number(fused(ids()), base)
        want = theirs(ids())
        fused.merge_adapter()
        assert not any(rows(fused))
        assert_same_number(fused(ids()), want)
        fused.unmerge_adapter()
        hf_wrappers(fused)[1].merge()
        assert rows(fused) == [True, False]
        assert_same_number(fused(ids()), want)
        hf_wrappers(fused)[1].unmerge()
        handle = hf_wrappers(fused)[0].get_base_layer().register_forward_hook(lambda *a: None)
        assert not any(rows(fused))
        assert "the experts have hooks" in peftkern.explain(fused)[0].reason
        assert_same_number(fused(ids()), want)
        handle.remove()
        other = copy.deepcopy(fused)
        assert all(rows(other))
        assert_same_number(other(ids()), want)
    quietly(fused.delete_adapter, "default")
    theirs.base_model.set_adapter("other")
    assert_same_number(numbers(fused)["output"], numbers(theirs)["output"])
    again = peftkern.unfuse(fused)
    assert all(type(w) is peft.tuners.lora.layer.ParamWrapper for w in hf_wrappers(again))
    assert_same_number(numbers(again)["output"], numbers(theirs)["output"])


@torch.no_grad()
def test_a_fused_model_takes_names_for_rows() -> None:
    names = ["b", "__base__", "a", "b"]
    settings = {"target_parameters": both("plain")}
    theirs = adapt(peft, tiny(), ("a", "b"), **settings)
    ours = adapt(peftkern, tiny(), ("a", "b"), **settings)
    with pytest.raises(ValueError, match="does not support mixed"):
        theirs(ids(4, 3), adapter_names=names)
    fused = peftkern.fuse(theirs)
    want = ours(ids(4, 3), adapter_names=names)
    assert_same_number(fused(ids(4, 3), adapter_names=names), want)
    moe_hook = hf_wrappers(fused)[1].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="does not support mixed"):
        fused(ids(4, 3), adapter_names=names)
    moe_hook.remove()
    assert_same_number(fused(ids(4, 3), adapter_names=names), want)


def test_a_weight_of_two_dimensions_is_fused_too() -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Embedding(moe_models.VOCAB, 6), torch.nn.Linear(6, 10))
    theirs = adapt(peft, base.double(), target_parameters=["1.weight"])
    want = numbers(theirs)
    fused = peftkern.fuse(theirs)
    assert all(rows(fused))
    assert_same_number(numbers(fused), want)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph(backend: str) -> None:
    model = adapt(peftkern, tiny(), target_parameters=both("plain"))
    want = numbers(model)
    assert {row.compiled for row in peftkern.explain(model)} == {"operators"}
    got = numbers(torch.compile(model, fullgraph=True, backend=backend))
    assert_same_number({k.removeprefix("_orig_mod."): v for k, v in got.items()}, want)
    model.base_model.set_adapter([])
    with torch.no_grad():
        assert_same_number(torch.compile(model, backend="eager")(ids()), tiny()(ids()))


@torch.no_grad()
def test_a_compiled_mixed_batch() -> None:
    names = ["b", "__base__", "a", "b"]
    model = adapt(peftkern, tiny(), ("a", "b"), target_parameters=both("plain"))
    want = model(ids(4, 3), adapter_names=names)
    got = torch.compile(model, backend="eager")(ids(4, 3), adapter_names=names)
    assert_same_number(got, want)
