"""A wrap or load that fails leaves earlier adapters, and everything else, as they were."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.tuners.lora.linear import Linear
from tests.field import KINDS, WEIGHTS, base_of, quietly, randomize, trained
from tests.tiny import assert_same, first, inputs, make, snapshot


def spoilt(folder, kind="lora"):
    """An adapter whose file lacks a tensor, which shows after its layers were made."""
    quietly(trained(kind).save_pretrained, folder)
    weights = load_file(folder / WEIGHTS)
    # biases of the base model may be missing, as in files of older releases
    del weights[sorted(key for key in weights if "lora_" in key or "prompt" in key)[-1]]
    save_file(weights, folder / WEIGHTS)
    return folder


def state(model):
    """Parts that a snapshot does not cover: hooks, settings of layers, and adapters in use."""
    found = {}
    for name, module in model.named_modules():
        found[name] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key in ("_active_adapter", "scaling", "r", "lora_alpha", "active_adapter")
            or "hook" in key
        }
    return found


class Raises(Linear):
    def __init__(self, *args, **kwargs) -> None:
        if len(Raises.made) == 1:
            raise ValueError("no such layer")
        Raises.made.append(1)
        super().__init__(*args, **kwargs)

    made: list[int] = []


def late(**settings):
    """A configuration that fails when some layers have been replaced."""
    settings = {"target_modules": ["q_proj", "k_proj"], **settings}
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", **settings)
    config._register_custom_module({torch.nn.Linear: Raises})
    Raises.made.clear()
    return config


# -------------------------------------------------------------------- a PeftModel as the base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_peft_model_is_no_base_for_another_file_of_lora(kind, name, tmp_path) -> None:
    trained("lora").save_pretrained(tmp_path)
    model = trained(kind)
    before, more = snapshot(model), state(model)
    with pytest.raises(ValueError, match=r"already, with the adapters \['default'\].*load_adapter"):
        peftkern.PeftModel.from_pretrained(model, tmp_path, name)
    assert_same(model, before)
    assert state(model) == more


def test_load_adapter_is_the_way(tmp_path) -> None:
    source = trained("lora")
    source.save_pretrained(tmp_path)
    model = trained("dora")
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    batch = inputs("llama")
    with torch.no_grad():
        assert torch.equal(first(model.eval()(**batch)), first(source.eval()(**batch)))


def test_a_prompt_goes_on_top_or_leaves_all_as_it_was(tmp_path) -> None:
    trained("prompt").save_pretrained(tmp_path / "good")
    spoilt(tmp_path / "bad", "prompt")
    model = trained("lora")
    before, more = snapshot(model), state(model)
    with pytest.raises(ValueError, match="missing keys"):
        peftkern.PeftModel.from_pretrained(model, tmp_path / "bad", "prompt")
    assert_same(model, before)
    assert state(model) == more
    on_top = peftkern.PeftModel.from_pretrained(model, tmp_path / "good", "prompt")
    assert on_top.base_model is model


# -------------------------------------------------------------------- a model with adapters in it


@pytest.mark.parametrize("name", ["default", "second", "new"])
@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "tokens", "kasa"])
def test_a_failed_load_into_an_adapted_model(name, kind, tmp_path) -> None:
    spoilt(tmp_path, kind)
    model = trained(kind)
    more = {"kasa_config": {}} if kind == "kasa" else {}
    quietly(model.add_adapter, "second", peftkern.LoraConfig(r=2, task_type="CAUSAL_LM", **more))
    model.set_adapter("second")
    randomize(model)
    base = model.base_model.model
    before, more = snapshot(model), state(model)
    for low in (False, True):
        with pytest.raises(ValueError, match="missing keys"):
            quietly(peftkern.PeftModel.from_pretrained, base, tmp_path, name, low_cpu_mem_usage=low)
        assert_same(model, before)
        assert state(model) == more
        with pytest.raises(ValueError, match="missing keys|unexpected keys"):
            quietly(model.load_adapter, tmp_path, name, low_cpu_mem_usage=low)
        assert_same(model, before)
        assert state(model) == more


@pytest.mark.parametrize("name", ["default", "new"])
@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "tokens", "prompt"])
def test_a_failed_wrap_of_an_adapted_model(name, kind) -> None:
    model = trained(kind)
    before, more = snapshot(model), state(model)
    for config, says in [
        (peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules=["nowhere"]), "not found"),
        (late(), "no such layer"),
        (late(modules_to_save=["lm_head"]), "no such layer"),
    ]:
        Raises.made.clear()
        with pytest.raises(ValueError, match=says):
            quietly(peftkern.get_peft_model, model, config, name)
        assert_same(model, before)
        assert state(model) == more
        if kind == "prompt":
            continue
        Raises.made.clear()
        with pytest.raises(ValueError, match=says):
            quietly(peftkern.inject_adapter_in_model, config, model.base_model.model, name)
        assert_same(model, before)
        assert state(model) == more
        Raises.made.clear()
        with pytest.raises(ValueError, match=f"{says}|already exists"):
            quietly(model.add_adapter, name, config)
        assert_same(model, before)
        assert state(model) == more


def test_a_prompt_that_fails_on_an_adapted_model() -> None:
    model = trained("lora")
    before, more = snapshot(model), state(model)
    for settings, says in [
        ({"num_virtual_tokens": 3, "token_dim": 5}, "token_dim"),
        ({"num_virtual_tokens": 3, "modules_to_save": ["layers"]}, "modules_to_save"),
    ]:
        config = peftkern.PromptTuningConfig(task_type="CAUSAL_LM", **settings)
        with pytest.raises((ValueError, TypeError), match=says):
            peftkern.get_peft_model(model, config, "prompt")
        assert_same(model, before)
        assert state(model) == more


# -------------------------------------------------------------------- a fresh model


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_load_leaves_no_hook_and_no_setting(kind, tmp_path) -> None:
    spoilt(tmp_path, kind)
    base = base_of(kind)
    base.gradient_checkpointing_enable()
    base.config.pretraining_tp = 2
    before, more, config = snapshot(base), state(base), base.config.to_dict()
    with pytest.raises(ValueError, match="missing keys"):
        quietly(peftkern.PeftModel.from_pretrained, base, tmp_path)
    assert_same(base, before)
    assert state(base) == more
    assert base.config.to_dict() == config
    assert not hasattr(base, "peft_config")


def test_a_failed_load_into_stacked_layers(tmp_path) -> None:
    settings = {"task_type": "CAUSAL_LM", "layer_replication": [[0, 1], [0, 2]]}
    quietly(
        peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(**settings)).save_pretrained,
        tmp_path,
    )
    weights = load_file(tmp_path / WEIGHTS)
    del weights[sorted(weights)[-1]]
    save_file(weights, tmp_path / WEIGHTS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_replication"]
    for checkpointing in (False, True):
        base = make("llama")
        if checkpointing:
            base.gradient_checkpointing_enable()
        before, config = snapshot(base), base.config.to_dict()
        with pytest.raises(ValueError, match="missing keys"):
            quietly(peftkern.PeftModel.from_pretrained, base, tmp_path)
        assert_same(base, before)
        assert base.config.to_dict() == config
