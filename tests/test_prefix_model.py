"""Prefix tuning from ``get_peft_model`` to attention, compared with keys and values in a cache."""

from functools import partial

import pytest
import torch

import peftkern
from tests.closeness import assert_same_number, differ
from tests.plain_reference import peft_is_right, recomputed
from tests.prompts import plain, prompt_model, prompt_pair, virtual_tokens
from tests.tiny import inputs, loss_of, make

CASES = [
    *((f, "CAUSAL_LM") for f in ("llama", "qwen2", "gemma", "gpt2")),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("llama", "SEQ_CLS"),
    ("t5", "SEQ_2_SEQ_LM"),
]


def prompt_of(model):
    return [p for n, p in model.named_parameters() if "prompt_encoder" in n and p.requires_grad]


def widen(*models):
    """Prefixes large enough to show in the loss, the same in all."""
    for model in models:
        with torch.no_grad():
            for p in prompt_of(model):
                p.mul_(3.0)


def training_step(model, batch):
    """Loss and gradients of the virtual tokens' parameters."""
    model.zero_grad()
    loss = loss_of(model(**batch))
    loss.backward()
    return {"loss": loss.detach(), "gradients": [p.grad.clone() for p in prompt_of(model)]}


@pytest.mark.parametrize("kind", ["prefix", "projection"])
@pytest.mark.parametrize("family, task", CASES)
def test_loss_and_gradients(family, task, kind):
    """Are the plain reference's, and HF PEFT's where it is right."""
    ours, theirs = prompt_pair(kind, family, task)
    widen(ours, theirs)
    ours.eval(), theirs.eval()
    batch = inputs(family, task)
    found = training_step(ours, batch)
    assert found["gradients"] and any(g.any() for g in found["gradients"])
    tokens = virtual_tokens(ours)
    expected = loss_of(plain(kind, ours, tokens)(make(family, task, torch.float64))(**batch))
    assert_same_number(found["loss"], expected.detach())
    if kind == "prefix":
        expected.backward()
        assert_same_number(found["gradients"], [tokens.grad])
    if peft_is_right("prefix of a head" if task.endswith("CLS") else "prefix"):
        assert_same_number(found, training_step(theirs, batch))
    with ours.disable_adapter():  # the prefix matters
        assert differ(loss_of(ours(**batch)), found["loss"])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation(family, beams):
    ours, theirs = prompt_pair("prefix", family)
    widen(ours, theirs)
    ids = torch.tensor([[0, 0, 7, 9], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    run = plain("prefix", ours, virtual_tokens(ours).detach())
    generators = [recomputed(make(family, dtype=torch.float64), run).generate]
    if peft_is_right("prefix generate"):
        generators.append(theirs.eval().generate)
    generators.append(partial(ours.eval().generate, use_cache=False))  # HF PEFT cannot
    mine = ours.generate(input_ids=ids, attention_mask=mask, **settings)
    for generate in generators:
        assert torch.equal(mine, generate(input_ids=ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_which_hf_peft_refuses(reentrant):
    model, batch = prompt_model(peftkern, "prefix"), inputs("llama", "CAUSAL_LM")
    model.train()
    expected = training_step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_number(training_step(model, batch), expected)


def test_explain_has_a_row_for_each_attention_with_a_prefix():
    model = prompt_model(peftkern, "prefix", "llama")
    rows = peftkern.explain(model)
    assert [r.name for r in rows] == [f"base_model.model.layers.{i}.self_attn" for i in (0, 1)]
    assert {(r.kind, r.ranks["default"], r.shape[0]) for r in rows} == {("LlamaAttention", 5, 5)}
    assert all("vendor's attention" in r.reason and not r.fused for r in rows)
    model.base_model.model.layers[1].self_attn.attention_dropout = 0.2
    assert "in training on concatenated keys: dropout" in peftkern.explain(model)[1].reason
    t5 = peftkern.explain(prompt_model(peftkern, "prefix", "t5", "SEQ_2_SEQ_LM"))
    assert {(r.backend, r.reason) for r in t5} == {("concatenated keys", "an attention bias")}
    assert not peftkern.explain(prompt_model(peftkern, "prompt"))
