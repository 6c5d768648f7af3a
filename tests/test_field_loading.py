"""Loading a file writes only the adapter that its configuration describes."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.checkpoint.hotswap import hotswap_adapter
from peftkern.checkpoint.slots import adapter_slots
from tests.field import KINDS, WEIGHTS, assert_equal, base_of, quietly, randomize, trained
from tests.tiny import assert_same, make, snapshot

PREFIX = "base_model.model."


def rewrite(folder, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def named(weights, name="default"):
    """Names as in the model, as a state dict that was saved by hand has them."""
    found = {}
    for key, value in weights.items():
        if key.endswith(("lora_magnitude_vector", "trainable_tokens_delta")) or "embedding_" in key:
            new = f"{key}.{name}" + (".weight" if "magnitude" in key else "")
        elif ".lora_" in key and ".lora_diag" not in key:
            head, _, last = key.rpartition(".")
            new = f"{head}.{name}.{last}"
        else:
            new = key
        found[new] = value
    return found


def state_of(model):
    return quietly(peftkern.get_peft_model_state_dict, model)


# -------------------------------------------------------------------- names of adapters


@pytest.mark.parametrize(
    "kind", ["lora", "dora", "lora_bias", "embedding", "tokens", "blocks", "bias_all"]
)
def test_names_that_hold_the_adapters_name(kind, tmp_path) -> None:
    model = trained(kind)
    quietly(model.save_pretrained, tmp_path)
    rewrite(tmp_path, named)
    assert any(".default" in key for key in load_file(tmp_path / WEIGHTS))
    again = quietly(peftkern.PeftModel.from_pretrained, base_of(kind), tmp_path)
    light = quietly(
        peftkern.PeftModel.from_pretrained, base_of(kind), tmp_path, low_cpu_mem_usage=True
    )
    quietly(again.load_adapter, tmp_path, "default")  # over itself
    for other in (again, light):
        assert_equal(state_of(other), state_of(model))
    with pytest.raises(ValueError, match="missing keys"):  # it is of an adapter of another name
        quietly(peftkern.PeftModel.from_pretrained, base_of(kind), tmp_path, "other")


def test_hf_peft_loads_them_as_well(tmp_path) -> None:
    model = trained("lora")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, named)
    theirs = peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    state = peft.get_peft_model_state_dict(theirs)
    assert all(
        torch.equal(v, state[k]) for k, v in peftkern.get_peft_model_state_dict(model).items()
    )


def test_two_names_for_one_place_are_one_too_many(tmp_path) -> None:
    model = trained("lora")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights | {k: v + 1 for k, v in named(weights).items()})
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="unexpected keys: .*lora_A"):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)


# -------------------------------------------------------------------- what is never written


def crowded():
    """A model with modules trained in full, tokens, and another adapter of every tensor."""
    settings = {"task_type": "CAUSAL_LM", "modules_to_save": ["norm"]}
    model = make("llama")
    model = quietly(peftkern.get_peft_model, model, peftkern.LoraConfig(**settings))
    other = {**settings, "target_modules": ["q_proj", "k_proj"], "use_dora": True}
    quietly(model.add_adapter, "other", peftkern.LoraConfig(**other))
    for name in ("default", "other"):
        model.set_adapter(name)
        randomize(model)
    model.set_adapter("default")
    return model


def test_nothing_but_the_adapter_is_written_whatever_the_name() -> None:
    model = crowded()
    weights = peftkern.get_peft_model_state_dict(model)
    own = {k for slot in adapter_slots(model, "default") for k in (slot.key, slot.model_key)}
    before = snapshot(model)
    tried = 0
    for key, value in model.state_dict().items():
        if key in own or key.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        short = key.removeprefix(PREFIX)
        plain = short.replace(".base_layer", "").replace(".original_module", "")
        for name in {key, short, PREFIX + plain, f"_orig_mod.{key}", key.replace(".other", "")}:
            if name in own or name.removeprefix("_orig_mod.") in own or name in weights:
                continue
            tried += 1
            evil = {**weights, name: value + 1}
            result = peftkern.set_peft_model_state_dict(model, evil)
            assert len(result.unexpected_keys) == 1, name
            assert_same(model, before)
    assert tried > 100


STRANGE = [
    "base_model.model.model.norm.weight",
    "model.norm.weight",
    "base_model.model.model.norm.original_module.weight",
    "base_model.model.model.norm.modules_to_save.other.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight",
    "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.up_proj.weight",
    "",
    ".",
    "base_model.model.",
]


@pytest.mark.parametrize("key", STRANGE)
def test_files_with_a_strange_name_are_refused_by_every_way_in(key, tmp_path) -> None:
    source = trained("lora")
    source.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: w | {key: torch.full((16,), 7.0)})
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="unexpected keys"):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)
    model = crowded() if "norm" not in key else trained("lora")
    before = snapshot(model)
    for name in ("default", "new"):
        with pytest.raises(ValueError, match="missing keys|unexpected keys"):
            model.load_adapter(tmp_path, name)
        assert_same(model, before)
    with pytest.raises((RuntimeError, ValueError), match="unexpected keys"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert_same(model, before)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bias_all"])
def test_a_base_weight_in_any_kind_of_file_is_refused(kind, tmp_path) -> None:
    model = trained(kind)
    quietly(model.save_pretrained, tmp_path)
    base = base_of(kind)
    before = snapshot(base)
    key, value = next(
        (k, v) for k, v in base.state_dict().items() if any(n in k for n in ("norm", "ln_", "mlp"))
    )
    rewrite(tmp_path, lambda w: w | {PREFIX + key: value + 1} if PREFIX + key not in w else w)
    with pytest.raises(ValueError, match="unexpected keys"):
        quietly(peftkern.PeftModel.from_pretrained, base, tmp_path)
    assert_same(base, before)


def test_biases_are_written_only_where_the_configuration_trains_them(tmp_path) -> None:
    folders = {}
    for bias in ("none", "lora_only", "all"):
        config = peftkern.LoraConfig(task_type="CAUSAL_LM", bias=bias)
        model = quietly(peftkern.get_peft_model, make("gpt2"), config)
        randomize(model)
        folders[bias] = tmp_path / bias
        model.save_pretrained(folders[bias])
    for bias, other, fits in [
        ("none", "lora_only", False),
        ("none", "all", False),
        ("lora_only", "all", False),
        ("all", "all", True),
    ]:
        folder = tmp_path / f"{bias}-{other}"
        folder.mkdir()
        config = json.loads((folders[bias] / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / WEIGHTS).write_bytes((folders[other] / WEIGHTS).read_bytes())
        base = make("gpt2")
        before = snapshot(base)
        if fits:
            quietly(peftkern.PeftModel.from_pretrained, base, folder)
            continue
        with pytest.raises(ValueError, match="unexpected keys"):
            quietly(peftkern.PeftModel.from_pretrained, base, folder)
        assert_same(base, before)


def test_bias_of_the_original_of_a_module_trained_in_full_stays(tmp_path) -> None:
    """bias="all" has it in the file, in HF PEFT's as well, and it never trains."""
    for library in (peftkern, peft):
        config = library.LoraConfig(task_type="SEQ_CLS", bias="all")
        model = quietly(library.get_peft_model, make("bert", "SEQ_CLS"), config)
        randomize(model)
        model.save_pretrained(tmp_path)
        key = f"{PREFIX}classifier.original_module.bias"
        rewrite(tmp_path, lambda w, key=key: {k: v + 1 if k == key else v for k, v in w.items()})
        base = make("bert", "SEQ_CLS")
        original = base.classifier.bias.detach().clone()
        again = peftkern.PeftModel.from_pretrained(base, tmp_path)
        wrapper = again.base_model.model.classifier
        assert torch.equal(wrapper.original_module.bias, original)
        theirs = model.base_model.model.classifier.modules_to_save["default"].bias
        assert torch.equal(wrapper.modules_to_save["default"].bias, theirs)


# -------------------------------------------------------------------- embeddings


def test_embeddings_come_back_and_never_under_another_adapter(tmp_path) -> None:
    model = trained("lora")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = peftkern.PeftModel.from_pretrained(make("llama"), tmp_path)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    again.load_adapter(tmp_path, "second")  # the same embeddings: nothing changes
    other = trained("lora")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"embedding .*embed_tokens.weight.*\['default'\]"):
        other.load_adapter(tmp_path, "second")
    assert_same(other, before)
    other.load_adapter(tmp_path, "default")
    assert torch.equal(other.get_input_embeddings().weight, embedding)


def test_one_embedding_alone_is_not_what_saving_embeddings_writes(tmp_path) -> None:
    """It is a head that another configuration trains in full."""
    trained("modules_to_save").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if ".norm." not in k})
    model = trained("lora")
    before = snapshot(model)
    with pytest.raises(ValueError, match="unexpected keys: base_model.model.lm_head.weight"):
        model.load_adapter(tmp_path, "default")
    assert_same(model, before)


def test_embeddings_saved_plain_come_back_under_other_adapters_layers(tmp_path) -> None:
    model = trained("lora")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    other = trained("embedding", "other")
    other.load_adapter(tmp_path, "plain")
    assert "plain" in other.peft_config


def test_tied_embeddings_stay_one_tensor_when_tensors_are_put_in_place(tmp_path) -> None:
    config = peftkern.LoraConfig(task_type="CAUSAL_LM")
    model = quietly(peftkern.get_peft_model, make("gpt2"), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = quietly(
        peftkern.PeftModel.from_pretrained, make("gpt2"), tmp_path, low_cpu_mem_usage=True
    )
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


# -------------------------------------------------------------------- hot swaps


def test_a_file_with_the_adapters_name_in_it_is_swapped_in(tmp_path) -> None:
    for kind in ("lora", "dora"):
        source = trained(kind)
        folder = tmp_path / kind
        source.save_pretrained(folder)
        rewrite(folder, named)
        model = trained(kind)
        randomize(model, seed=8)
        key, weight = next(iter(state_of(source).items()))
        assert not torch.equal(state_of(model)[key], weight)
        hotswap_adapter(model, folder, "default", torch_device="cpu")
        assert_equal(state_of(model), state_of(source))


def test_a_copy_of_the_model_is_not_needed_to_match() -> None:
    """The dict that is loaded is left alone, and so is the model when shapes differ."""
    model = trained("lora")
    weights = named(peftkern.get_peft_model_state_dict(model))
    key = next(iter(weights))
    weights[key] = torch.zeros(3, 3)
    kept, before = copy.copy(weights), snapshot(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peftkern.set_peft_model_state_dict(model, weights)
    assert weights == kept
    assert_same(model, before)
