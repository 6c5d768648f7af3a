"""Tests of every variant of LoRA, against HF PEFT.

They cover starts, results, gradients, several adapters, merging, files in both directions, and
refusals. Tests of a single variant are in its own file.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.tuners.lora.variant import SETTINGS
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import assert_same, fill, first, gradients, make, snapshot, step
from tests.variants import BATCH, CASES, IDS, models

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
every = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
# one of each setting
SOME = {case.setting: case for case in CASES.values()}
each = pytest.mark.parametrize("case", SOME.values(), ids=list(SOME))


def base_weights(model):
    return {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}


def outputs(model, **call):
    with torch.no_grad():
        return first(model.eval()(input_ids=IDS, **call))


def test_every_variant_of_the_package_has_a_case():
    # one routes among other adapters, one is for GPTQ's layers: test_arrow.py, test_qalora.py
    elsewhere = {"arrow_config", "use_qalora"}
    assert {case.setting for case in CASES.values()} | elsewhere == {
        name for name, cls in SETTINGS.items() if cls and cls.__module__.startswith("peftkern.")
    }


@every
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_starts_as_in_peft(case, dtype, init):
    ours, theirs = models(case, dtype, init_lora_weights=init)
    want = dict(theirs.named_parameters())
    assert want.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        if "magnitude" not in name:  # a norm, which is compared in float64 below
            assert torch.equal(parameter, want[name]), name
        assert parameter.requires_grad == want[name].requires_grad, name
    have, want = (peft.get_peft_model_state_dict(m) for m in (ours, theirs))
    assert have.keys() == want.keys() == peftkern.get_peft_model_state_dict(ours).keys()
    assert any(case.stored in name for name in have)


@every
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.usefixtures("in_double")
def test_numbers_and_gradients(case, p):
    pair = models(case, lora_dropout=p)
    assert_same_number(*(dict(m.named_parameters()) for m in pair))
    fill(pair[0]), fill(pair[1])
    for _ in range(2):  # the second sees what the first has left
        found = [gradients(m.train(), BATCH) for m in pair]
        assert_same_number(*found)
    assert_same_number(*(outputs(m) for m in pair))


@each
def test_fp32_errs_no_more_than_peft(case):
    ours, theirs = models(case, torch.float32)
    fill(ours), fill(theirs)
    three = ours, theirs, copy.deepcopy(theirs).double()
    assert_as_good_as_torch(*(step(m.train(), BATCH) for m in three))


@each
@pytest.mark.usefixtures("in_double")
def test_several_adapters_and_rows_that_name_them(case):
    pair = models(case, init_lora_weights=False)
    for model, library in zip(pair, (peftkern, peft), strict=True):
        torch.manual_seed(1)
        model.add_adapter("b", case.config(library, r=6, init_lora_weights=False))
        if not case.alone:
            model.add_adapter("plain", library.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        fill(model)
        model.base_model.set_adapter(["b", "default"])
    assert_same_number(*(gradients(m.train(), BATCH) for m in pair))
    assert not any(row.fused for row in peftkern.explain(pair[0]))
    rows = ["b", "__base__" if case.alone else "plain", "default"]
    if case.mixes:
        assert_same_number(*(outputs(m, adapter_names=rows) for m in pair))
    else:
        for model in pair:
            with pytest.raises(ValueError, match="Cannot pass `adapter_names` when"):
                outputs(model, adapter_names=rows)
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted"):
        pair[0].set_adapter("b")
        pair[0].delete_adapter("b")
    assert not any(".b." in key or key.endswith(".b") for key in pair[0].state_dict())
    layers = [m for m in pair[0].modules() if isinstance(m, peftkern.tuners.lora.LoraLayer)]
    assert not any("b" in layer._all_available_adapter_names() for layer in layers)


@each
def test_explain_says_what_runs(case):
    ours, _ = models(case)
    for mode, fused in zip((True, False), case.fused, strict=True):
        rows = [r for r in peftkern.explain(ours.train(mode)) if r.name.endswith("q_proj")]
        assert [row.fused for row in rows] == [fused] * len(rows)
        assert all(case.name in row.reason for row in rows)


@each
@pytest.mark.usefixtures("in_double")
def test_merging(case):
    pair = models(case)
    fill(pair[0]), fill(pair[1])
    ours, theirs = pair
    assert ours.supports_lora_conversion() is case.converts
    if not case.merges:
        for model in pair:
            with pytest.raises(NotImplementedError, match=f"{case.name} does not support merging"):
                model.merge_adapter()
        return
    before, want = base_weights(ours), outputs(ours)
    for safe in (False, True):
        ours.merge_adapter(safe_merge=safe), theirs.merge_adapter(safe_merge=safe)
        merged = base_weights(theirs)
        assert_same_number(base_weights(ours), merged)
        assert not any(
            torch.equal(merged[n], old) for n, old in before.items() if n.endswith("weight")
        )
        assert_same_number(outputs(ours), want)
        ours.unmerge_adapter(), theirs.unmerge_adapter()
        assert all(torch.equal(ours.get_parameter(n), old) for n, old in before.items())
    assert_same_number(outputs(ours.merge_and_unload()), want)


@every
@pytest.mark.usefixtures("in_double")
def test_files_go_both_ways(case, tmp_path):
    pair = models(case)
    for name, model in zip(("ours", "theirs"), pair, strict=True):
        fill(model)
        model.train()(**BATCH)  # which makes VeLoRA's vectors
        model.save_pretrained(tmp_path / name)
    want, tensors = outputs(pair[1]), peft.get_peft_model_state_dict(pair[1])
    for library, name in ((peft, "ours"), (peftkern, "theirs"), (peftkern, "ours")):
        for low in (False, True) if library is peftkern or case.low_in_peft else (False,):
            base = make("llama", dtype=torch.float64)
            model = library.PeftModel.from_pretrained(
                base, tmp_path / name, low_cpu_mem_usage=low, is_trainable=True
            )
            have = library.get_peft_model_state_dict(model)
            assert_same_number(have, tensors)
            for _ in range(2):  # KaSA cuts what was not there yet in the first
                assert_same_number(outputs(model), want)
            assert not any(p.is_meta for p in model.parameters())
            asked = getattr(model.peft_config["default"], case.setting)
            assert asked == getattr(case.config(library), case.setting)
            gradients(model.train(), BATCH)
    if case.merges:
        merged = peftkern.PeftModel.from_pretrained(
            make("llama", dtype=torch.float64), tmp_path / "theirs", low_cpu_mem_usage=True
        ).merge_and_unload()
        assert_same_number(outputs(merged), want)


@each
@pytest.mark.usefixtures("in_double")
def test_a_start_that_changed_the_base_weights_is_subtracted(case, tmp_path):
    ours, _ = models(case, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    config = ours.peft_config["default"]
    config.init_lora_weights = True
    ours.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    fill(ours)
    how = {"path_initial_model_for_weight_conversion": tmp_path / "start"}
    if not case.stacks:
        with pytest.raises(ValueError, match=f"not supported with `{case.setting}"):
            ours.save_pretrained(tmp_path / "plain", **how)
        assert not (tmp_path / "plain").exists()
        return
    ours.save_pretrained(tmp_path / "plain", **how)
    again = peftkern.PeftModel.from_pretrained(
        make("llama", dtype=torch.float64), tmp_path / "plain"
    )
    assert_same_number(outputs(again), outputs(ours))
    assert getattr(again.peft_config["default"], case.setting) is None


REFUSED = {
    "mica": (lambda: nn.Linear(8, 8), {"init_lora_weights": "mica"}),
    "dora": (lambda: nn.Linear(8, 8), {"use_dora": True}),
    "alora": (lambda: nn.Linear(8, 8), {"alora_invocation_tokens": [1]}),
    "conv": (lambda: nn.Conv2d(8, 8, 1), {}),
    "embedding": (lambda: nn.Embedding(8, 8), {}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {}),
}


@pytest.mark.parametrize("what", REFUSED)
@each
def test_refused_as_hf_peft_refuses(case, what):
    make_layer, more = REFUSED[what]
    alone = case.setting in more or case.name == "DoRA" and what in ("conv", "embedding")
    if alone:
        pytest.skip("that is what it is for")
    pair = [nn.Sequential(nn.Linear(8, 8), make_layer()) for _ in range(2)]
    before, said = snapshot(pair[0]), []
    for library, model in zip((peftkern, peft), pair, strict=True):
        with pytest.raises(ValueError) as error:
            library.get_peft_model(model, case.config(library, target_modules=["1"], **more))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert_same(pair[0], before)


@each
def test_refused_for_parameters(case):
    if case.name == "DoRA":
        pytest.skip("works on parameters here: test_parameter_dora.py")
    said, model = [], make("llama")
    before = snapshot(model)
    for library, base in ((peftkern, model), (peft, make("llama"))):
        own = case.config(library, target_modules=[], target_parameters=["q_proj.weight"])
        with pytest.raises(ValueError) as error:
            library.get_peft_model(base, own)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert_same(model, before)


@each
def test_options_are_a_dict_or_theirs(case):
    if not case.options:
        pytest.skip("its setting has none")
    own = getattr(peftkern, case.options)(**case.settings[case.setting])
    config = peftkern.LoraConfig(**case.settings)
    assert getattr(config, case.setting) == own
    with pytest.raises(TypeError, match=f"must be a `{case.options}`, a dict, or None"):
        peftkern.LoraConfig(**{case.setting: 3})


BAD = {
    "VeloraConfig": [{"num_groups": 0}, {"scale": 0.0}, {"init_type": "mean"}],
    "MontecloraConfig": [{"num_samples": 0}, {"dirichlet_prior": 0}, {"buffer_size": 0}],
    "KasaConfig": [{"beta": -1.0}],
}


@pytest.mark.parametrize(("options", "bad"), [(k, v) for k, some in BAD.items() for v in some])
def test_bad_options_are_refused_in_their_words(options, bad):
    said = []
    for library in (peftkern, peft):
        with pytest.raises(ValueError) as error:
            getattr(library, options)(**bad)
        said.append(str(error.value))
    assert said[0] == said[1]
