"""The adapted modules are the same as with HF PEFT, for every way of naming targets."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from tests import models
from tests.tiny import assert_same, make, pair, snapshot


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4), "kq": nn.Linear(4, 4)})
        self.mlp = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class Odd(nn.Module):
    """No transformers model; names that overlap, numbers in two places, indices past nine."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.tower = nn.ModuleDict({"h": nn.ModuleList(Block() for _ in range(2))})
        self.mlp = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4))


WAYS = {
    "suffix": {"target_modules": ["q"]},
    "whole_name": {"target_modules": ["layers.1.attn.q"]},
    "two_parts": {"target_modules": ["attn.q"]},
    "no_part_of_a_word": {"target_modules": ["q", "lp", "mlp"]},
    "dots_are_dots": {"target_modules": ["layers.1.mlp", "head.0"]},
    "embedding": {"target_modules": ["head.2", "kq"]},
    "regex": {"target_modules": r"layers\.\d\.attn\.k?q"},
    "regex_full_match": {"target_modules": r".*mlp"},
    "regex_alternatives": {"target_modules": r"head\.0|tower\..*\.mlp"},
    "all_linear": {"target_modules": "all-linear"},
    "ALL_LINEAR": {"target_modules": "All-Linear"},
    "layers_int": {"target_modules": ["q"], "layers_to_transform": 1},
    "layers_list": {"target_modules": ["q", "mlp"], "layers_to_transform": [0, 11, 3]},
    "layers_exact_name": {
        "target_modules": ["model.layers.5.mlp", "q"],
        "layers_to_transform": [1],
    },
    "layers_empty": {"target_modules": ["q"], "layers_to_transform": []},
    "pattern": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "pattern_list": {
        "target_modules": ["q"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers", "h"],
    },
    "pattern_other": {
        "target_modules": ["mlp"],
        "layers_to_transform": [0],
        "layers_pattern": ["h"],
    },
    "exclude_suffix": {"target_modules": ["q", "kq"], "exclude_modules": ["kq"]},
    "exclude_name": {"target_modules": ["mlp"], "exclude_modules": ["layers.1.mlp", "h.0.mlp"]},
    "exclude_regex": {"target_modules": ["q", "mlp"], "exclude_modules": r"layers\..*"},
    "exclude_from_all": {"target_modules": "all-linear", "exclude_modules": ["q", "experts.0"]},
    "saved_is_not_adapted": {"target_modules": ["q", "mlp", "head.0"], "modules_to_save": ["head"]},
    "saved_by_suffix": {
        "target_modules": ["q", "mlp"],
        "modules_to_save": ["layers.1.mlp", "norm"],
    },
    "rank_patterns": {
        "target_modules": ["q", "mlp"],
        "rank_pattern": {"layers.1.mlp": 3, "^mlp": 5, "h.0.attn.q": 2},
    },
    "alpha_patterns": {
        "target_modules": ["q", "kq"],
        "alpha_pattern": {"q": 3, r"layers\.\d+\.attn\.kq": 5},
    },
}


def built(library, model, config):
    """{name: (rank, alpha, scaling)} of adapted modules, and the names of those trained in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, library.LoraConfig(**config))
    layers = {
        n: (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
        for n, m in model.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "base_layer") and "default" in m.r
    }
    return layers, {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_name_targets(way):
    model = Odd()
    if way in ("layers_int", "layers_list", "layers_exact_name"):
        # at the root HF PEFT does not find them, see test_field_names.py
        model = nn.ModuleDict({"model": model})
    layers, trained = built(peftkern, copy.deepcopy(model), WAYS[way])
    assert (layers, trained) == built(peft, model, WAYS[way])
    assert layers


def test_defaults_are_pefts():
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k: sorted(v) for k, v in DEFAULTS.items()} == {k: sorted(v) for k, v in theirs.items()}


MORE_MODELS = """opt mistral phi gpt_neox bloom falcon gptj roberta deberta-v2 bart""".split()


@pytest.mark.parametrize("name", MORE_MODELS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_default_targets_of_more_models(name, targets):
    if targets is None:
        assert name in DEFAULTS
    found, wanted = (
        built(library, models.build(name, None), {"target_modules": targets})
        for library in (peftkern, peft)
    )
    assert found == wanted and found[0]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
def test_all_linear_leaves_the_classification_head(family):
    ours, theirs = pair(family, "SEQ_CLS", target_modules="all-linear")
    assert set(ours.base_model.targeted_module_names) == set(
        theirs.base_model.targeted_module_names
    )


@pytest.mark.parametrize(
    ("task", "head"), [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")]
)
def test_all_linear_leaves_heads_that_peft_fails_on(task, head):
    """HF PEFT adapts these heads, then refuses to train them in full. Here they train in full."""
    config = peftkern.LoraConfig(task_type=task, target_modules="all-linear")
    model = peftkern.get_peft_model(make("bert", task), config)
    assert isinstance(getattr(model.get_base_model(), head), peftkern.ModulesToSaveWrapper)
    assert not any(head in name for name in model.base_model.targeted_module_names)


def test_the_config_of_the_caller_gets_the_targets():
    """As in PEFT: what was matched by default is written into the config, and so into the file."""
    config = peftkern.LoraConfig()
    peftkern.get_peft_model(make("llama"), config)
    assert config.target_modules == {"q_proj", "v_proj"}


NOTHING = {
    "no_such_name": ({"target_modules": ["nothing_here"]}, r"nothing_here.*not found"),
    "no_such_regex": ({"target_modules": r"x\.y"}, r"x\\\\\.y.*not found|x\\\.y.*not found"),
    "no_such_layer": (
        {"target_modules": ["q_proj"], "layers_to_transform": [99]},
        r"layers_to_transform.*99",
    ),
    "no_such_pattern": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
        r"blocks",
    ),
    "all_excluded": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        r"exclude_modules",
    ),
    "empty_list": ({"target_modules": []}, r"target_modules"),
    "unsupported_class": ({"target_modules": ["norm"]}, r"LlamaRMSNorm.*nn\.Linear"),
    "one_of_two_unsupported": ({"target_modules": ["q_proj", "mlp"]}, r"LlamaMLP"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_targets_that_match_nothing_or_cannot_be_adapted(name):
    """One error that names them; the model, or the adapters it has, are as before."""
    config, says = NOTHING[name]
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=says):
        peftkern.get_peft_model(model, peftkern.LoraConfig(**config))
    assert_same(model, before)
    with pytest.raises(ValueError):  # what HF PEFT refuses, no more
        peft.get_peft_model(make("llama"), peft.LoraConfig(**config))
    adapted = peftkern.get_peft_model(
        model, peftkern.LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"])
    )
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=says):
        adapted.add_adapter("second", peftkern.LoraConfig(**config))
    assert_same(adapted, before)


def test_models_without_defaults_ask_for_targets():
    class Config:
        model_type = "quark"

        def to_dict(self):
            return {"model_type": "quark"}

    model = Odd()
    for _ in range(2):
        with pytest.raises(ValueError, match="target_modules"):
            peftkern.get_peft_model(model, peftkern.LoraConfig())
        model.config = Config()
    with pytest.raises(ValueError, match="quark"):
        peftkern.get_peft_model(model, peftkern.LoraConfig())


def test_tensor_modules_that_hold_several_are_not_saved_in_full():
    model = Odd()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"modules_to_save.*ModuleList"):
        peftkern.get_peft_model(
            model, peftkern.LoraConfig(target_modules=["q"], modules_to_save=["experts"])
        )
    assert_same(model, before)


def test_unused_patterns_are_named():
    config = peftkern.LoraConfig(
        target_modules=["q"], rank_pattern={"zebra": 2}, alpha_pattern={"yak": 2}
    )
    with pytest.warns(RuntimeWarning) as seen:
        peftkern.get_peft_model(Odd(), config)
    said = " ".join(str(w.message) for w in seen)
    assert re.search(r"rank_pattern.*zebra", said) and re.search(r"alpha_pattern.*yak", said)


@pytest.mark.parametrize(("family", "flag"), [("llama", True), ("gpt2", False)])
def test_fan_in_fan_out_is_put_right(family, flag):
    config = peftkern.LoraConfig(fan_in_fan_out=flag)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peftkern.get_peft_model(make(family), config)
    assert config.fan_in_fan_out is not flag
    assert all(
        m.fan_in_fan_out is not flag for m in model.modules() if hasattr(m, "fan_in_fan_out")
    )


def test_a_single_layer_is_no_model():
    """The module itself has no name to match and no parent to be replaced in."""
    with pytest.raises(ValueError, match="target"):
        peftkern.get_peft_model(nn.Linear(2, 2), peftkern.LoraConfig(target_modules=["linear"]))


def test_inject_into_a_plain_module():
    model, other = Odd(), Odd()
    other.load_state_dict(model.state_dict())
    config = {"target_modules": ["q"], "r": 2}
    same = peftkern.inject_adapter_in_model(peftkern.LoraConfig(**config), model, "mine")
    peft.inject_adapter_in_model(peft.LoraConfig(**config), other, "mine")
    assert same is model and list(model.state_dict()) == list(other.state_dict())
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in other.parameters()
    ]
    assert model.layers[0].attn["q"](torch.ones(1, 4)).shape == (1, 4)
