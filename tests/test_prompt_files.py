"""Checkpoints of prompts: files from and for HF PEFT, several adapters, files that do not fit."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.plain_reference import peft_is_right
from tests.prompts import KINDS, PREFIXES, config_of, prompt_model, prompt_pair
from tests.tiny import assert_same, first, inputs, make, snapshot

TASKS = [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
WEIGHTS = "adapter_model.safetensors"


NETWORKS = ("mlp", "lstm", "projection")  # a file holds what they make, rounded to fp32


def trained(library, kind, family="llama", task="CAUSAL_LM", **more):
    """A model in fp32, as files are, with values that no initialisation gives, heads included."""
    model = prompt_model(library, kind, family, task, **{"dtype": torch.float32, **more})
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            if value.requires_grad:
                value += torch.randn(value.shape, generator=g) * 0.1
    return model.eval()


def run(model, family, task):
    """The model's numbers computed in float64, in which others' are the same."""
    with torch.no_grad():
        return first(copy.deepcopy(model).double()(**inputs(family, task)))


def peft_runs(kind, task):
    head = "prefix of a head" if task == "SEQ_CLS" else "prefix"
    return peft_is_right(head if kind in PREFIXES else "prompt")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "task"), TASKS)
def test_each_library_reads_the_others_files(kind, family, task, tmp_path):
    ours, theirs = trained(peftkern, kind, family, task), trained(peft, kind, family, task)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    mine, other = (load_file(tmp_path / n / WEIGHTS) for n in ("ours", "theirs"))
    assert mine.keys() == other.keys() and "prompt_embeddings" in mine
    for model, tensors in ((ours, mine), (theirs, other)):
        tokens = copy.deepcopy(model).double().get_prompt_embedding_to_save("default")
        assert_as_good_as_torch(tensors["prompt_embeddings"], other["prompt_embeddings"], tokens)
    assert all(torch.equal(mine[k], v) for k, v in other.items() if k != "prompt_embeddings")
    configs = []
    for name in ("ours", "theirs"):
        values = json.loads((tmp_path / name / "adapter_config.json").read_text())
        values["modules_to_save"] = set(values["modules_to_save"] or ())
        configs.append(values)
    assert configs[0] == configs[1] and configs[0]["inference_mode"] is True
    for name, model in (("ours", ours), ("theirs", theirs)):
        found = []
        for library in (peftkern, peft):
            base = make(family, task)
            again = library.PeftModel.from_pretrained(base, tmp_path / name, torch_device="cpu")
            if library is peftkern or peft_runs(kind, task):
                found.append(run(again, family, task))
                assert_same_number(found[-1], found[0])
            assert not again.training
            if library is peftkern:
                assert again.peft_config["default"].inference_mode
                assert not any(p.requires_grad for p in again.parameters())
                assert type(again) is type(ours)
                again.save_pretrained(tmp_path / "again")
                repeated = load_file(tmp_path / "again" / WEIGHTS)
                source = mine if name == "ours" else other
                assert all(torch.equal(repeated[k], v) for k, v in source.items())
        if kind not in NETWORKS and (model is ours or peft_runs(kind, task)):
            assert_same_number(found[0], run(model, family, task))
    assert (tmp_path / "ours" / "README.md").read_text().count("library_name: peft") == 1


def test_shapes_in_files(tmp_path):
    for kind, shape in (
        ("prompt", (10, 16)),  # two submodules of 5 tokens
        ("mlp", (10, 16)),
        ("prefix", (5, 2 * 2 * 16)),
        ("projection", (5, 2 * 2 * 16)),
    ):
        trained(peftkern, kind, "t5", "SEQ_2_SEQ_LM").save_pretrained(tmp_path / kind)
        weights = load_file(tmp_path / kind / WEIGHTS)
        assert {k: tuple(v.shape) for k, v in weights.items()} == {"prompt_embeddings": shape}


@pytest.mark.parametrize("kind", ["prompt", "sample", "prefix"])
def test_training_on(kind, tmp_path):
    """Training goes on from a file, as it has the prompt's parameters; HF PEFT refuses that."""
    ours = trained(peftkern, kind, "bert", "SEQ_CLS")
    ours.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(make("bert", "SEQ_CLS"), tmp_path, is_trainable=True)
    flags = {n: p.requires_grad for n, p in ours.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == flags
    assert again.training and not again.peft_config["default"].inference_mode
    again(**inputs("bert", "SEQ_CLS")).loss.backward()
    assert again.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    ours.load_adapter(tmp_path, "more", is_trainable=True)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, f in flags.items() if f
    }
    ours.set_adapter("more")
    assert ours.prompt_encoder["more"].embedding.weight.requires_grad


@pytest.mark.parametrize("kind", ["mlp", "lstm", "projection"])
def test_networks_are_not_in_files(kind, tmp_path):
    ours = trained(peftkern, kind)
    ours.save_pretrained(tmp_path)
    tokens = load_file(tmp_path / WEIGHTS)["prompt_embeddings"]
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peftkern.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_same(base, before)
    other = prompt_model(peftkern, kind, seed=8, dtype=torch.float32).eval()
    before = snapshot(other)
    for call in (
        lambda: other.load_adapter(tmp_path, "b", is_trainable=True),
        lambda: other.load_adapter(tmp_path, "default", is_trainable=True),
        lambda: peftkern.set_peft_model_state_dict(other, load_file(tmp_path / WEIGHTS)),
    ):
        with pytest.raises(ValueError, match="is_trainable=False|network cannot be told"):
            call()
        assert_same(other, before)
    # the same adapter, frozen as its tokens: what Trainer asks for with load_best_model_at_end
    with pytest.warns(UserWarning, match="'default' is frozen"):
        other.load_adapter(tmp_path, "default")
    again = peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(other.get_prompt_embedding_to_save("default"), tokens)
    assert_same_number(run(other, "llama", "CAUSAL_LM"), run(again, "llama", "CAUSAL_LM"))
    assert not any(p.requires_grad for p in other.parameters())
    assert other.peft_config["default"].inference_mode
    encoder = other.prompt_encoder["default"]
    with pytest.raises(ValueError, match="shape"):
        encoder.load_prompt_embeddings(torch.zeros(2, 2))
    encoder.load_prompt_embeddings(tokens + 1)
    assert torch.equal(encoder.embedding.weight, tokens + 1)
    with pytest.raises(ValueError, match="network"):
        ours.prompt_encoder["default"].load_prompt_embeddings(tokens)


@pytest.mark.parametrize("kind", ["mlp", "prefix"])
def test_several_adapters_in_one_folder(kind, tmp_path):
    family, task = "bert", "SEQ_CLS"
    ours = trained(peftkern, kind, family, task)
    ours.add_adapter("b", config_of(peftkern, kind, task, P=3))
    ours.set_adapter("b")
    wanted = {"other": run(ours, family, task)}
    ours.set_adapter("default")
    wanted["default"] = run(ours, family, task)
    ours.save_pretrained(tmp_path)
    found = []
    for library in (peftkern, peft):
        if library is peft and not peft_runs(kind, task):
            continue
        again = library.PeftModel.from_pretrained(make(family, task), tmp_path)
        again.load_adapter(tmp_path / "b", "other")
        found.append({})
        for name in ("default", "other"):
            again.set_adapter(name)
            found[-1][name] = run(again, family, task)
        assert_same_number(found[-1], found[0])
    assert differ(found[0]["other"], found[0]["default"])
    if kind not in NETWORKS:
        assert_same_number(found[0], wanted)
    ours.save_pretrained(tmp_path / "some", selected_adapters=["b"])
    assert not (tmp_path / "some" / WEIGHTS).exists()
    assert (tmp_path / "some" / "b" / WEIGHTS).exists()
    with pytest.raises(ValueError, match="nobody"):
        ours.save_pretrained(tmp_path / "none", selected_adapters=["nobody"])


@pytest.mark.parametrize("kind", ["lstm", "projection", "prompt"])
def test_saving_from_a_state_dict(kind, tmp_path):
    """As Trainer does under FSDP or DeepSpeed: the tensors given count, and not the model's."""
    ours = trained(peftkern, kind, dtype=torch.float64)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    wanted = ours.get_prompt_embedding_to_save("default")
    with torch.no_grad():
        for value in ours.prompt_encoder.parameters():
            value.zero_()
    found = peftkern.get_peft_model_state_dict(ours, state)
    assert_same_number(found["prompt_embeddings"], wanted)
    assert not torch.equal(ours.get_prompt_embedding_to_save("default"), wanted)
    state.pop("prompt_encoder.default.embedding.weight")
    with pytest.raises(ValueError, match="state_dict.*prompt_encoder.default.embedding.weight"):
        ours.save_pretrained(tmp_path, state_dict=state)


def test_embeddings_saved_beside_a_prompt(tmp_path):
    ours, theirs = prompt_pair("prompt")
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    mine, other = (load_file(tmp_path / n / WEIGHTS) for n in ("ours", "theirs"))
    assert {"base_model.model.embed_tokens.weight", "prompt_embeddings"} <= set(mine)
    assert {k for k in other if not k.startswith("word_embeddings")} == set(mine)


def edit(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def settings(**values):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


KEY = "prompt_embeddings"
DAMAGED = {
    "no_prompt": (edit(lambda w: w.pop(KEY)), "missing keys: prompt_embeddings"),
    "no_head": (edit(lambda w: w.pop("base_model.classifier.weight")), "missing.*classifier"),
    "more": (edit(lambda w: w.update(extra=torch.zeros(1))), "unexpected keys: extra"),
    "nan": (edit(lambda w: w[KEY].fill_(float("nan"))), "prompt_embeddings.*NaN"),
    "shape": (edit(lambda w: w.update({KEY: w[KEY][:, 1:].clone()})), "prompt_embeddings.*shape"),
    "shorter": (edit(lambda w: w.update({KEY: w[KEY][1:].clone()})), r"prompt_embeddings.*\(4,"),
    "length": (settings(num_virtual_tokens=6), r"prompt_embeddings.*\(6,"),
    "none": (settings(num_virtual_tokens=0), "adapter_config.json.*num_virtual_tokens.*0"),
    "width": (settings(token_dim=48, num_attention_heads=6), "48.*another base model|6.*another"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("kind", ["prompt", "projection"])
def test_files_that_do_not_fit(kind, name, tmp_path):
    damage, says = DAMAGED[name]
    trained(peftkern, kind, "bert", "SEQ_CLS").save_pretrained(tmp_path)
    damage(tmp_path)
    base = make("bert", "SEQ_CLS")
    before = snapshot(base)
    with pytest.raises((ValueError, RuntimeError), match=says):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)
    model = prompt_model(peftkern, kind, "bert", "SEQ_CLS")
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=says):
        model.load_adapter(tmp_path, "second")
    assert_same(model, before)
    if name not in ("none", "width", "length"):  # weights alone, into the adapter that is there
        with pytest.raises((ValueError, RuntimeError), match=says):
            model.load_adapter(tmp_path, "default")
        assert_same(model, before)


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_of_another_model(kind, tmp_path):
    trained(peftkern, kind, "gpt2").save_pretrained(tmp_path)
    base = make("gpt2")
    deeper = type(base)(type(base.config)(**base.config.to_dict() | {"n_layer": 3}))
    wider = type(base)(type(base.config)(**base.config.to_dict() | {"n_embd": 32, "n_head": 4}))
    for model, says in (
        (deeper, "num_layers.*2.*GPT2LMHeadModel needs 3.*another base model"),
        (wider, "num_attention_heads.*2.*4.*another base model"),
        (make("llama"), "prompt_embeddings.*shape|token_dim.*another base model"),
    ):
        before = snapshot(model)
        with pytest.raises((ValueError, RuntimeError), match=says):
            peftkern.PeftModel.from_pretrained(model, tmp_path)
        assert_same(model, before)


def test_another_method_in_the_file(tmp_path):
    trained(peftkern, "prompt").save_pretrained(tmp_path)
    model = prompt_model(peftkern, "prefix")
    before = snapshot(model)
    with pytest.raises(ValueError, match="different peft types.*PREFIX_TUNING.*PROMPT_TUNING"):
        model.load_adapter(tmp_path, "b")
    assert_same(model, before)
