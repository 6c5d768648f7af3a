"""Saving state dicts that training scripts have changed: no file lacks trained tensors."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import peftkern
from tests.field import KINDS, WEIGHTS, assert_equal, base_of, quietly, trained
from tests.tiny import fill, first, inputs, make

PROMPTS = ("prefix", "prompt", "p_tuning")


def saved(model, folder, **how):
    quietly(model.save_pretrained, folder, **how)
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_is_saved_whatever_the_state_dict(kind, tmp_path) -> None:
    model = trained(kind)
    expected = saved(model, tmp_path / "plain")
    assert expected and not any(".default" in key for key in expected)
    stripped = quietly(peftkern.get_peft_model_state_dict, model)
    full = dict(model.state_dict())
    assert_equal(saved(model, tmp_path / "stripped", state_dict=stripped), expected)
    assert_equal(saved(model, tmp_path / "full", state_dict=full), expected)
    # an old habit of training scripts, with the names of a file and with none at all
    for state in (stripped, {}):
        model.state_dict = lambda *_, state=state, **__: state
        assert_equal(saved(model, tmp_path / f"own{len(state)}", safe_serialization=True), expected)
    again = quietly(peftkern.PeftModel.from_pretrained, base_of(kind), tmp_path / "own0")
    batch = inputs("llama")
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(first(again(**batch)), first(model(**batch)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_of_the_callers_that_lacks_a_tensor_is_refused(kind, tmp_path) -> None:
    model = trained(kind)
    stripped = quietly(peftkern.get_peft_model_state_dict, model, save_embedding_layers=False)
    for key in stripped:
        less = {k: v for k, v in stripped.items() if k != key}
        with pytest.raises(ValueError, match="`state_dict` lacks tensors of 'default'"):
            model.save_pretrained(tmp_path / "less", state_dict=less, save_embedding_layers=False)
    assert not (tmp_path / "less").exists()


def test_old_habit_beside_hf_peft(tmp_path) -> None:
    for library in (peftkern, peft):
        config = library.LoraConfig(task_type="CAUSAL_LM")
        model = library.get_peft_model(make("llama"), config)
        old = model.state_dict
        model.state_dict = lambda *_, library=library, model=model, old=old, **__: (
            library.get_peft_model_state_dict(model, old())
        )
        assert len(saved(model, tmp_path / library.__name__)) == 8


def test_names_without_an_adapter_among_several(tmp_path) -> None:
    model = trained("lora")
    model.add_adapter("other", peftkern.LoraConfig(r=2, task_type="CAUSAL_LM"))
    state = peftkern.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="cannot be told which of.*selected_adapters"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict=state, selected_adapters=["default"])
    assert_equal(load_file(tmp_path / WEIGHTS), state)
    # the model's own: what belongs to one adapter never goes into the file of another
    other = peftkern.get_peft_model_state_dict(model, adapter_name="other")
    model.state_dict = lambda *_, **__: state
    assert_equal(peftkern.get_peft_model_state_dict(model, adapter_name="other"), other)


@pytest.mark.parametrize(
    "kind, given",
    # an encoder that was emptied makes no prompt
    [(kind, given) for kind in KINDS for given in (True, False) if given or kind not in PROMPTS],
)
def test_empty_tensors_are_refused_by_name(kind, given, tmp_path) -> None:
    """ZeRO-3 leaves such empty tensors in place of parameters that were not gathered."""
    model = trained(kind)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    state = {k: v.new_empty(0) if k in names else v for k, v in model.state_dict().items()}
    if given:
        if kind in PROMPTS:
            whole = peftkern.get_peft_model_state_dict(model)
            state = {key: value.new_empty(0) for key, value in whole.items()}
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.new_empty(0)
    with pytest.raises(ValueError, match=r"only parts of 'default': .*\(0,\).*Nothing was written"):
        quietly(model.save_pretrained, tmp_path / "x", state_dict=state if given else None)
    assert not (tmp_path / "x").exists()


def test_flat_shards_in_a_state_dict_are_refused(tmp_path) -> None:
    model = trained("lora")
    state = {k: v.flatten() if "lora_" in k else v for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`state_dict` holds only parts.*lora_A.weight \(64,\)"):
        model.save_pretrained(tmp_path / "x", state_dict=state)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_a_module_that_is_empty_by_its_nature_is_saved(tmp_path) -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(0, 4))
    config = peftkern.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    assert saved(peftkern.get_peft_model(base, config), tmp_path)["base_model.model.1.weight"].shape


def test_biases_of_lora_are_no_shards(tmp_path, recwarn) -> None:
    model = trained("lora_bias")
    recwarn.clear()
    model.save_pretrained(tmp_path)
    assert not [str(w.message) for w in recwarn if "shape" in str(w.message)]


def test_other_processes_write_nothing_and_need_nothing(tmp_path) -> None:
    """The other processes have an empty state dict when shards are gathered on the first one."""
    model = trained("lora")
    asked = []
    model.save_pretrained(tmp_path / "x", is_main_process=False, state_dict={})
    model.state_dict = lambda *_, **__: asked.append(1) or {}
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert asked and not (tmp_path / "x").exists()


def test_a_prompt_on_lora_is_saved_whole_or_not_at_all(tmp_path) -> None:
    config = peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = quietly(peftkern.get_peft_model, trained("lora"), config, "prompt")
    state = model.state_dict()
    model.save_pretrained(tmp_path / "a", state_dict=state)
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 8
    assert len(load_file(tmp_path / "a" / "prompt" / WEIGHTS)) == 1
    for name in ("base_model.base_model.model.model.layers.0.self_attn.q_proj", "prompt_encoder"):
        less = {k: v for k, v in state.items() if not k.startswith(name)}
        assert len(less) < len(state)
        with pytest.raises(ValueError, match="`state_dict` lacks tensors"):
            model.save_pretrained(tmp_path / "b", state_dict=less)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", ["unload", "merge_and_unload", "peftkern.fuse"])
def test_an_adapter_that_is_not_there_is_no_empty_file(how, tmp_path) -> None:
    """HF PEFT writes an empty file in both cases, as peftkern did for a model of HF PEFT."""
    library = peft if how == "peftkern.fuse" else peftkern
    model = library.get_peft_model(make("llama"), library.LoraConfig(task_type="CAUSAL_LM"))
    weights = library.get_peft_model_state_dict(model)
    if library is peft:
        peftkern.fuse(model)
    else:
        getattr(model, how)()
        with pytest.raises(ValueError, match="holds no tensors of the adapter 'default'"):
            model.save_pretrained(tmp_path / "empty")
        assert not (tmp_path / "empty").exists()
    with pytest.raises(ValueError, match="holds no tensors of the adapter 'default'"):
        peftkern.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="holds no tensors of the adapter 'default'"):
        peftkern.set_peft_model_state_dict(model, weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_an_embedding_with_its_adapter_merged_is_saved_without(
    family, dora, given, tmp_path
) -> None:
    """HF PEFT saves it as it is: an adapter that is loaded with it counts twice."""
    name = {"llama": "embed_tokens", "gpt2": "wte"}[family]
    base = make(family, dtype=torch.float64)
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules=[name], use_dora=dora)
    model = quietly(peftkern.get_peft_model, base, config)
    fill(model)
    expected = saved(model, tmp_path / "before")
    for _ in range(2):
        quietly(model.merge_adapter)
        how = {"state_dict": dict(model.state_dict())} if given else {}
        assert_equal(saved(model, tmp_path / "merged", **how), expected)
        everything = saved(model, tmp_path / "all", save_embedding_layers=True, **how)
        model.unmerge_adapter()
        assert_equal(saved(model, tmp_path / "all", save_embedding_layers=True), everything)
