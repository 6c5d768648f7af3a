"""Prompts that are impossible: one clear error each, and the model is unchanged."""

from __future__ import annotations

import copy
from functools import partial

import peft
import pytest
import torch

import peftkern
from peftkern.tuners.prefix_tuning import way
from peftkern.tuners.prompting import tuner as prompt_learning
from tests import models
from tests.prompts import config_of, prompt_model
from tests.tiny import assert_same, make, snapshot

BAD_CONFIGS = {
    "no_tokens": ("prefix", {"P": 0}, "num_virtual_tokens.*0"),
    "fewer_tokens": ("prompt", {"P": -3}, "num_virtual_tokens.*-3"),
    "half_a_token": ("mlp", {"P": 2.5}, "num_virtual_tokens.*2.5"),
    "dividing": ("prefix", {"token_dim": 10, "num_attention_heads": 4}, "token_dim.*10.*4"),
    "submodules": ("prompt", {"num_transformer_submodules": 3}, "num_transformer_submodules.*3"),
    "init": ("prompt", {"prompt_tuning_init": "POEM"}, "prompt_tuning_init.*POEM.*RANDOM"),
    "encoder": ("mlp", {"encoder_reparameterization_type": "GRU"}, "GRU.*MLP.*LSTM"),
    "hidden": ("projection", {"encoder_hidden_size": 0}, "encoder_hidden_size.*0"),
    "dropout": ("lstm", {"encoder_dropout": 1.5}, "encoder_dropout.*1.5"),
    "weights": ("prefix", {"init_weights": "ones"}, "init_weights.*ones"),
    "text": ("prompt", {"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path can't be None"),
    "kwargs": ("prompt", {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configurations(name):
    kind, settings, says = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=says):
        config_of(peftkern, kind, **settings)


BAD_MODELS = {
    "no_length": ("prefix", "llama", {"P": None}, "num_virtual_tokens.*None"),
    "no_task": ("prompt", "llama", {"task_type": None}, "task_type.*CAUSAL_LM"),
    "layers": ("prefix", "llama", {"num_layers": 4}, "num_layers.*4.*LlamaForCausalLM.*2"),
    "heads": ("prefix", "llama", {"num_attention_heads": 4}, "num_attention_heads.*4.*1 or 2"),
    "width": ("prefix", "gpt2", {"token_dim": 32}, "token_dim.*32.*16.*another base model"),
    "prompt_width": ("prompt", "gpt2", {"token_dim": 32}, "token_dim.*32.*16"),
    "too_long": ("prompt", "gpt2", {"P": 64}, "num_virtual_tokens.*64.*max_position_embeddings"),
    "prefix_too_long": ("prefix", "gpt2", {"P": 64}, "num_virtual_tokens.*64"),
    "container": ("prompt", "llama", {"modules_to_save": ["layers"]}, "layers.*no forward"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_what_does_not_fit_the_model_is_refused(name):
    kind, family, settings, says = BAD_MODELS[name]
    base = make(family)
    before = snapshot(base)
    config = config_of(peftkern, kind, **settings)
    kept = copy.deepcopy(config)
    with pytest.raises((ValueError, TypeError), match=says):
        peftkern.get_peft_model(base, config)
    assert_same(base, before)
    assert config == kept
    model = prompt_model(peftkern, kind, family)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError), match=says):
        model.add_adapter("second", config)
    assert_same(model, before)


def test_what_injection_refuses_changes_nothing(monkeypatch):
    def refuse(model, num_layers):
        raise ValueError("not this family")

    monkeypatch.setattr(way, "find", refuse)
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="not this family"):
        peftkern.get_peft_model(base, config_of(peftkern, "prefix"))
    assert_same(base, before)


def test_heads_that_cannot_be_made_leave_no_injection(monkeypatch):
    """As when memory runs out: the base model takes a prefix afterwards."""

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    base = make("llama")
    before = snapshot(base)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_learning, "wrap_modules_to_save", fail)
        with pytest.raises(MemoryError):
            peftkern.get_peft_model(base, config_of(peftkern, "prefix"))
    assert_same(base, before)
    peftkern.get_peft_model(base, config_of(peftkern, "prefix"))


@pytest.mark.parametrize("generates", [False, True])
def test_a_call_past_the_hooks_is_an_error(monkeypatch, generates):
    """A prefix that nothing could see is no answer."""
    model = prompt_model(peftkern, "prefix")
    stack = model.get_base_model().model
    monkeypatch.setattr(stack, "__class__", type("Past", (type(stack),), {}))
    monkeypatch.setattr(type(stack), "__call__", lambda self, *a, **k: self.forward(*a, **k))
    call = partial(model.generate, max_new_tokens=2) if generates else model
    with pytest.raises(RuntimeError, match="did not reach the Past"):
        call(input_ids=torch.full((1, 4), 7))


def test_models_that_cannot_have_prompts():
    config = peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="transformers model.*Linear"):
        peftkern.get_peft_model(torch.nn.Linear(2, 2), config)
    model = prompt_model(peftkern, "prompt")
    with pytest.raises(ValueError, match="add_adapter"):
        peftkern.get_peft_model(model, config)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("b", config_of(peftkern, "mlp"))
    assert model.prepare_model_for_gradient_checkpointing(model.base_model) is model.base_model
    assert model.word_embeddings(torch.tensor([3])).requires_grad
    with pytest.raises(TypeError, match="not supported for prompt learning"):
        model.set_requires_grad("default")
    with pytest.raises(AttributeError):
        model.unload()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_bad_calls(kind):
    ours = prompt_model(peftkern, kind, "gpt2").eval()
    ids = torch.full((2, 60), 5)
    for call in (ours, lambda *a, **k: ours.generate(*a, max_new_tokens=2, **k)):
        with pytest.raises(ValueError, match="num_virtual_tokens.*5.*60.*65.*GPT2LMHeadModel.*64"):
            call(ids)
        with pytest.raises(ValueError, match="adapter_names.*3 names for 2 rows"):
            call(ids[:, :4], adapter_names=["default"] * 3)
        with pytest.raises(ValueError, match="non-existing.*other"):
            call(ids[:, :4], adapter_names=["default", "other"])
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            call()
    if kind == "prompt":
        with pytest.raises(ValueError, match=r"attention_mask.*\(2, 1, 4, 4\)"):
            ours(ids[:, :4], attention_mask=torch.ones(2, 1, 4, 4))
        with pytest.warns(UserWarning, match="Position ids are not supported"):
            ours(ids[:, :4], position_ids=torch.arange(4)[None])
        with pytest.warns(UserWarning, match="Token type ids are not supported"):
            ours(ids[:, :4], token_type_ids=torch.zeros_like(ids[:, :4]))


def test_positions_behind_padding():
    """RoBERTa's first position is 2, so that a table of 16 has room for 14 tokens."""
    base = models.build("roberta", length=16, pad_token_id=1)
    ours = prompt_model(peftkern, "prompt", base=base, task="SEQ_CLS")
    ids = torch.full((1, 10), 5)
    ours(ids[:, :9])
    with pytest.raises(ValueError, match="15 positions.*14"):
        ours(ids)
    with pytest.raises((IndexError, RuntimeError)):  # what the error stands for
        prompt_model(peft, "prompt", base=base, task="SEQ_CLS")(ids)
