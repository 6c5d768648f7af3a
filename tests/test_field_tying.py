"""Tied embeddings in families with unusual names, found by the storage that they share."""

from __future__ import annotations

import copy
import functools
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern.utils.tied import embedding_group
from tests import models
from tests.closeness import assert_same_number, differ
from tests.field import WEIGHTS, assert_equal, quietly, randomize
from tests.models import VOCAB, WIDTH
from tests.tiny import fill

F64 = torch.float64
# family: (names of its embeddings, the first as get_input_embeddings; the output's)
NAMES = {
    "gpt2": (["transformer.wte"], "lm_head"),
    "gemma": (["model.embed_tokens"], "lm_head"),
    "bloom": (["transformer.word_embeddings"], "lm_head"),
    "opt": (["model.decoder.embed_tokens"], "lm_head"),
    "masked bert": (["bert.embeddings.word_embeddings"], "cls.predictions.decoder"),
    "t5": (["shared", "encoder.embed_tokens", "decoder.embed_tokens"], "lm_head"),
    "bart": (
        ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"],
        "lm_head",
    ),
}
SEQ2SEQ = ("t5", "bart")
IDS = torch.arange(3, 17).view(2, 7)


@functools.cache
def original(family):
    if family == "masked bert":
        torch.manual_seed(0)
        return tf.BertForMaskedLM(models.config("bert")).eval().to(F64)
    return models.build(family).to(F64)


def base(family):
    return copy.deepcopy(original(family))


def logits(model, family):
    more = {"decoder_input_ids": IDS.flip(0)} if family in SEQ2SEQ else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def adapted(family, library=peftkern, **settings):
    config = library.LoraConfig(r=4, **settings)
    return quietly(library.get_peft_model, base(family), config, autocast_adapter_dtype=False)


def said(function, *args, **kwargs):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, " ".join(str(w.message) for w in seen)


def last(name):
    return name.rpartition(".")[2]


@pytest.mark.parametrize("family", NAMES)
def test_the_group_is_told_by_storage(family) -> None:
    inputs, output = NAMES[family]
    model = base(family)
    group = embedding_group(model)
    assert [name for name, _ in group] == [*inputs, output]
    assert all(m.weight is model.get_input_embeddings().weight for _, m in group)
    # with adapters around them
    for settings in (
        {"target_modules": [inputs[0], output]},
        {"target_modules": "all-linear", "modules_to_save": [inputs[0]]},
        {"target_modules": "all-linear", "trainable_token_indices": {last(inputs[0]): [3]}},
    ):
        names = [name for name, _ in embedding_group(adapted(family, **settings))]
        assert sorted(names) == sorted([*inputs, output])
        assert names[0] == inputs[0]
    # a head of its own is not tied, whatever the configuration says
    head = model.get_submodule(output)
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert [name for name, _ in embedding_group(model)] == inputs
    # a view of the same memory is
    head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().view(VOCAB, WIDTH))
    assert output in [name for name, _ in embedding_group(model)]


@pytest.mark.parametrize("family", NAMES)
def test_offloaded_weights_are_told_by_the_class(family) -> None:
    """On the meta device there is no storage, and each module may have a tensor of its own."""
    model = base(family).to("meta")
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight))
    inputs, output = NAMES[family]
    found = [name for name, _ in embedding_group(model)]
    assert found[0] == inputs[0] and output in found


# -------------------------------------------------------------------- warnings


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_adapting_one_of_several_is_warned_of(family, field) -> None:
    inputs, output = NAMES[family]
    for name in [*inputs, output]:
        settings = {"target_modules": ["dense", "q_proj", "c_attn", "q"], field: [name]}
        if field == "target_modules":
            settings = {field: [name]}
        config = peftkern.LoraConfig(**settings)
        try:
            _, text = said(peftkern.get_peft_model, base(family), config)
        except ValueError:  # no such layers in this family
            settings["target_modules"] = "all-linear"
            config = peftkern.LoraConfig(**settings)
            _, text = said(peftkern.get_peft_model, base(family), config)
        assert "`ensure_weight_tying` is not set to True" in text, name
        dead = family in SEQ2SEQ and name == inputs[0]
        assert ("never calls it" in text) is dead, name
    for settings in ({"target_modules": "all-linear"}, {"target_modules": [inputs[0] + "x"]}):
        try:
            _, text = said(peftkern.get_peft_model, base(family), peftkern.LoraConfig(**settings))
        except ValueError:
            continue
        assert "ensure_weight_tying" not in text


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_what_is_never_called_trains_nothing(family) -> None:
    """This is the reason for the warning."""
    inputs, _ = NAMES[family]
    model = adapted(family, target_modules=[inputs[0]])
    randomize(model)
    assert torch.equal(logits(model, family), logits(base(family), family))
    tied = adapted(family, target_modules=[inputs[0]], ensure_weight_tying=True)
    randomize(tied)
    assert differ(logits(tied, family), logits(base(family), family))


# -------------------------------------------------------------------- merging


@pytest.mark.parametrize("family", NAMES)
def test_merged_outputs_are_the_adapters(family, tmp_path) -> None:
    inputs, output = NAMES[family]
    for number, names in enumerate([[n] for n in (*inputs, output)] + [[inputs[-1], output]]):
        model = adapted(family, target_modules=names)
        fill(model)
        before = logits(model, family)
        merged, text = said(model.merge_and_unload)
        assert "no longer tied after merging" in text, names
        assert_same_number(logits(merged, family), before, str(names))
        merged.save_pretrained(tmp_path / str(number))
        again = quietly(type(merged).from_pretrained, tmp_path / str(number), dtype=F64)
        assert_same_number(logits(again.eval(), family), before, f"{names} reloaded")


@pytest.mark.parametrize("family", NAMES)
def test_merging_in_place_is_warned_of(family) -> None:
    inputs, output = NAMES[family]
    for name in (inputs[-1], output):
        model = adapted(family, target_modules=[name])
        fill(model)
        _, text = said(model.merge_adapter)
        assert "The weight is shared" in text and name in text
    _, text = said(adapted(family, target_modules="all-linear").merge_adapter)
    assert "shared" not in text


@pytest.mark.parametrize("family", NAMES)
def test_modules_trained_in_full_are_merged_saved_and_reloaded(family, tmp_path) -> None:
    inputs, output = NAMES[family]
    for number, names in enumerate([[inputs[0], output], [output], [inputs[-1]]]):
        model = adapted(family, target_modules="all-linear", modules_to_save=names)
        randomize(model)
        before = logits(model, family)
        merged = quietly(model.merge_and_unload)
        assert_same_number(logits(merged, family), before, str(names))
        merged.save_pretrained(tmp_path / str(number))
        again = quietly(type(merged).from_pretrained, tmp_path / str(number), dtype=F64)
        assert_same_number(logits(again.eval(), family), before, f"{names} reloaded")


def test_a_merge_that_fails_leaves_the_weights_tied(monkeypatch) -> None:
    from peftkern.tuners.lora.linear import Linear

    model = adapted("gpt2", target_modules=["wte", "lm_head", "c_attn"])
    fill(model)
    weight = model.get_base_model().lm_head.base_layer.weight
    kept = weight.detach().clone()
    real = Linear._merge

    def fails(self, *args, **kwargs):
        if self is model.get_base_model().lm_head:
            raise MemoryError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "_merge", fails)
    with pytest.raises(MemoryError):
        quietly(model.merge_and_unload)
    base_model = model.get_base_model()
    assert base_model.lm_head.base_layer.weight is weight
    assert base_model.transformer.wte.base_layer.weight is weight
    assert torch.equal(weight, kept)
    assert base_model.config.tie_word_embeddings


# -------------------------------------------------------------------- ensure_weight_tying


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_tied_adapters_own_file_loads(family, side, tmp_path) -> None:
    inputs, output = NAMES[family]
    name = last(inputs[-1]) if side == "input" else output
    if family == "masked bert" and side == "output":
        name = "predictions.decoder"
    for number, settings in enumerate(
        ({"target_modules": [name]}, {"target_modules": "all-linear", "modules_to_save": [name]})
    ):
        settings["ensure_weight_tying"] = True
        folder = tmp_path / str(number)
        model, text = said(adapted, family, **settings)
        assert "no tied modules" not in text
        randomize(model)
        quietly(model.save_pretrained, folder)
        again = base(family)
        kept = {k: v.clone() for k, v in again.state_dict().items()}
        for low in (False, True):
            loaded = quietly(
                peftkern.PeftModel.from_pretrained,
                copy.deepcopy(again),
                folder,
                low_cpu_mem_usage=low,
                autocast_adapter_dtype=False,
            )
            assert_equal(
                quietly(peftkern.get_peft_model_state_dict, loaded),
                quietly(peftkern.get_peft_model_state_dict, model),
            )
            assert_same_number(logits(loaded, family), logits(model, family))
            if "modules_to_save" not in settings:
                assert_equal(dict(quietly(loaded.unload).state_dict()), kept)


def test_hf_pefts_file_loads(tmp_path) -> None:
    """HF PEFT's own way there ends 2.4 off: it finds "no tied modules" in what it saved."""
    theirs = adapted("gpt2", peft, target_modules=["c_attn", "lm_head"], ensure_weight_tying=True)
    fill(theirs)
    quietly(theirs.save_pretrained, tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / WEIGHTS))
    ours = quietly(
        peftkern.PeftModel.from_pretrained, base("gpt2"), tmp_path, autocast_adapter_dtype=False
    )
    assert_same_number(logits(ours, "gpt2"), logits(theirs, "gpt2"))


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["wte"], "target_modules": ["c_attn"]},
        {"target_modules": ["wte", "c_attn"]},
    ],
    ids=["in full", "lora"],
)
def test_hf_pefts_file_that_it_did_not_tie_says_how_to_load_it(settings, tmp_path) -> None:
    theirs = adapted("gpt2", peft, ensure_weight_tying=True, **settings)
    fill(theirs)
    quietly(theirs.save_pretrained, tmp_path)
    load = peftkern.PeftModel.from_pretrained
    how = {"autocast_adapter_dtype": False}
    with pytest.raises(ValueError, match=r"missing keys: base_model\.model\.lm_head.* to False"):
        quietly(load, base("gpt2"), tmp_path, **how)
    config = peftkern.PeftConfig.from_pretrained(tmp_path)
    config.ensure_weight_tying = False
    ours = quietly(load, base("gpt2"), tmp_path, config=config, **how)
    assert_same_number(logits(ours, "gpt2"), logits(theirs, "gpt2"))


@pytest.mark.parametrize("family", ["gpt2", "gemma", "bloom", "opt"])
def test_a_tied_adapter_is_merged_once_and_the_weights_stay_tied(family) -> None:
    _, output = NAMES[family]
    model = adapted(family, target_modules=[output], ensure_weight_tying=True)
    randomize(model)
    before = logits(model, family)
    merged = quietly(model.merge_and_unload)
    assert_same_number(logits(merged, family), before)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_weighted_sums_of_tied_adapters_are_tied(family) -> None:
    _, output = NAMES[family]
    model = adapted(family, target_modules=[output], ensure_weight_tying=True)
    config = peftkern.LoraConfig(r=2, target_modules=[output], ensure_weight_tying=True)
    quietly(model.add_adapter, "b", config, autocast_adapter_dtype=False)
    for name in ("default", "b"):
        model.set_adapter(name)
        randomize(model)
    head = model.get_base_model().lm_head
    wanted = 0.5 * head.get_delta_weight("default") + 2 * head.get_delta_weight("b")
    quietly(model.add_weighted_adapter, ["default", "b"], [0.5, 2.0], "both", "cat")
    assert_same_number(head.get_delta_weight("both"), wanted)
    A = model.get_base_model().get_input_embeddings().lora_embedding_A["both"]
    assert head.lora_B["both"].weight.data_ptr() == A.data_ptr()


def test_an_untied_head_is_not_tied_whatever_the_configuration_says() -> None:
    model = base("gpt2")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert model.config.tie_word_embeddings
    config = peftkern.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)
    found, text = said(peftkern.get_peft_model, model, config)
    assert "no tied modules were found" in text
    assert isinstance(found.get_input_embeddings(), nn.Embedding)
