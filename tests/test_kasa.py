"""Tests only for KaSA, against HF PEFT: the truncated base, its loss, refusals."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.tiny import assert_same, make, snapshot
from tests.variants import CASES, models

CASE = CASES["kasa"]


def test_the_base_weight_is_cut_and_the_update_is_one_operation():
    ours, _ = models(CASE, torch.float32)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.linalg.matrix_rank(layer.base_layer.weight) == 12  # 16 less 4
    assert all(row.fused and "KaSA: one operation" in row.reason for row in peftkern.explain(ours))


def test_loss(doubled):
    ours, theirs = models(CASE, init_lora_weights=False, kasa_config={"beta": 0.3, "gamma": 0.2})
    losses = [m._get_kasa_loss() for m in (ours, theirs)]
    assert_same_number(*losses)
    for loss in losses:
        loss.backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same_number(parameter.grad, want[name].grad, name)
    assert ours._get_kasa_loss("default").item() == losses[0].item()
    assert ours._get_kasa_loss(["other"]) == 0.0
    plain = peftkern.get_peft_model(make("llama"), CASE.config(peftkern, kasa_config=None))
    assert plain._get_kasa_loss() == 0.0


@pytest.mark.parametrize("merge", [False, True])
def test_a_base_that_comes_after_the_adapter(merge):
    """The base weight is on the meta device when the adapter is added, and is loaded later."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 6)).double()
    settings = CASE.config(peftkern, target_modules=["0"], init_lora_weights=False)
    want = peftkern.inject_adapter_in_model(settings, copy.deepcopy(base))
    model = peftkern.inject_adapter_in_model(settings, copy.deepcopy(base).to("meta"))
    x = torch.randn(3, 8, dtype=torch.float64)
    for call in (lambda: model(x), model[0].merge):
        with pytest.raises(RuntimeError, match="still on the meta device"):
            call()
    for store in ("lora_A", "lora_B"):
        getattr(model[0], store)["default"] = getattr(want[0], store)["default"]
    model[0].lora_diag["default"] = want[0].lora_diag["default"]
    model[0].base_layer.load_state_dict(base[0].state_dict(), assign=True)
    if merge:
        model[0].merge()
    for _ in range(2):
        assert_same_number(model(x), want(x))
    assert differ(model[0].base_layer.weight, want[0].base_layer.weight) is merge


def test_a_rank_that_leaves_nothing_leaves_the_model():
    with pytest.raises(ValueError, match="KaSA requires `r` .16. to be smaller"):
        peft.get_peft_model(make("llama"), CASE.config(peft, r=16))
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="KaSA requires `r` .16. to be smaller"):
        peftkern.get_peft_model(model, CASE.config(peftkern, r=16))
    assert_same(model, before)


def test_a_failure_after_the_truncation_takes_it_back(monkeypatch):
    from peftkern.tuners.lora import kasa

    model, calls = make("llama"), []
    before = copy.deepcopy(model.state_dict())

    def failing(weight, r, whole=kasa.split):
        calls.append(weight)
        if len(calls) == 4:
            raise RuntimeError("no convergence")
        return whole(weight, r)

    monkeypatch.setattr(kasa, "split", failing)
    with pytest.raises(RuntimeError, match="no convergence"):
        peftkern.get_peft_model(model, CASE.config(peftkern))
    assert list(before) == list(model.state_dict())
    restored, exact = {}, {}
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            restored[name], exact[name] = value, before[name].double()
    assert len(restored) <= 4
    # the sum of a weight's parts, as torch's own is
    sums = {}
    for name in restored:
        u, s, vh = torch.linalg.svd(before[name], full_matrices=False)
        sums[name] = (u * s) @ vh
    assert_as_good_as_torch(restored, sums, exact)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")
def test_more_refusals():
    for library in (peftkern, peft):
        for one, two in ((None, {}), ({}, None)):
            model = library.get_peft_model(make("llama"), CASE.config(library, kasa_config=one))
            with pytest.raises(ValueError, match="KaSA cannot be combined with adapters that"):
                model.add_adapter("second", CASE.config(library, kasa_config=two))
        with pytest.raises(ValueError, match="KaSA does not support `fan_in_fan_out=True`"):
            library.get_peft_model(make("gpt2"), CASE.config(library, target_modules=["c_attn"]))
