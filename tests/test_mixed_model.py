"""``mixed=True``: several adapters active at a time, beside HF PEFT's PeftMixedModel."""

from __future__ import annotations

import peft
import pytest
import torch

import peftkern
from tests.closeness import assert_same_number, differ
from tests.tiny import assert_same, fill, first, gradients, inputs, make, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
BATCH = inputs("llama")
ADAPTERS = {
    "a": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "c": {"r": 3, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}


def both(dtype=torch.float64):
    found = []
    for library in (peftkern, peft):
        model = make("llama", dtype=dtype)
        config = library.LoraConfig(**ADAPTERS["a"])
        model = library.get_peft_model(model, config, adapter_name="a", mixed=True)
        for name in ("b", "c"):
            model.add_adapter(name, library.LoraConfig(**ADAPTERS[name]))
        fill(model)
        found.append(model)
    return found


def state(model):
    return [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()]


def test_it_is_hf_pefts_class_too():
    ours, theirs = both()
    assert type(ours) is peftkern.PeftMixedModel and isinstance(ours, peft.PeftMixedModel)
    assert not isinstance(ours, peft.PeftModel) and isinstance(ours, type(theirs))
    from transformers.trainer_utils import unwrap_peft_model

    assert unwrap_peft_model(ours) is ours.get_base_model()


@pytest.mark.parametrize("names", ["a", "b", ["a", "b"], ["b", "c"], ["c", "b", "a"]], ids=str)
def test_numbers_and_gradients_are_hf_pefts(names):
    pair = both()
    for model in pair:
        model.set_adapter(names)
    ours, theirs = pair
    assert state(ours) == state(theirs)
    assert ours.active_adapters == theirs.active_adapters
    assert_same_number(*(gradients(m.train(), BATCH) for m in pair))
    want = first(theirs.eval()(**BATCH))
    assert_same_number(first(ours.eval()(**BATCH)), want)
    ids = BATCH["input_ids"][:1]
    tokens = [m.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for m in pair]
    assert torch.equal(*tokens)
    with ours.disable_adapter(), theirs.disable_adapter():
        off = [first(m(**BATCH)) for m in pair]
    assert_same_number(*off)
    assert differ(off[0], want)
    assert_same_number(first(ours.merge_and_unload()(**BATCH)), want)


@pytest.mark.parametrize("names", ["b", ["a", "c"]], ids=str)
def test_deleting_is_hf_pefts(names):
    pair = both()
    for model in pair:
        model.set_adapter(["a", "b", "c"])
        model.delete_adapter(names)
    ours, theirs = pair
    assert set(ours.peft_config) == set(theirs.peft_config)
    assert set(ours.active_adapters) == set(theirs.active_adapters)
    assert {n for n, *_ in state(ours)} == {n for n, *_ in state(theirs)}
    assert_same_number(*(first(m.eval()(**BATCH)) for m in pair))


def test_dtypes_under_bfloat16_are_hf_pefts():
    ours, theirs = both(torch.bfloat16)
    assert state(ours) == state(theirs)


def test_files(tmp_path):
    ours, _ = both()
    ours.set_adapter(["a", "b"])
    ours.save_pretrained(tmp_path)
    models = []
    for library in (peftkern, peft):
        base = make("llama", dtype=torch.float64)
        model = library.PeftMixedModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
        model.load_adapter(tmp_path / "b", "b")
        model.set_adapter(["a", "b"], inference_mode=True)
        models.append(model)
    assert type(models[0]) is peftkern.PeftMixedModel
    assert not any(p.requires_grad for p in models[0].parameters())
    want = first(ours.eval()(**BATCH))
    for model in models:
        assert_same_number(first(model.eval()(**BATCH)), want)


def test_refusals():
    ours, theirs = both()
    before = snapshot(ours)
    prompt = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    for model, library in ((ours, peftkern), (theirs, peft)):
        for call, error, match in (
            (lambda m: m.set_adapter(["a", "x"]), ValueError, r"\['x'\] not found, available"),
            (lambda m: m.delete_adapter("x"), ValueError, r"\['x'\] not found, available"),
            (lambda m: m.add_weighted_adapter(["a", "b"], [1, 1], "d"), NotImplementedError,
             "Weighted adapters are not supported for .*MixedModel"),
            (lambda m: m.get_layer_status(), TypeError, "get_layer_status is not supported"),
            (lambda m: m.get_model_status(), TypeError, "get_model_status is not supported"),
            (lambda m, lib=library: m.add_adapter("d", lib.PrefixTuningConfig(**prompt)),
             ValueError, "'PREFIX_TUNING' is not compatible"),
            (lambda m, lib=library: lib.get_peft_model(
                make("llama"), lib.PromptTuningConfig(**prompt), mixed=True),
             ValueError, "'PROMPT_TUNING' is not compatible"),
        ):  # fmt: skip
            with pytest.raises(error, match=match):
                call(model)
    assert_same(ours, before)
