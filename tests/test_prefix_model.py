"""Prefix tuning from ``get_peft_model`` to attention, with the injection itself, beside HF PEFT."""

import pytest
import torch

import peftkern
from tests.prompts import prompt_model, prompt_pair
from tests.tiny import inputs, loss_of

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


def step(model, batch):
    model.zero_grad()
    loss = loss_of(model(**batch))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in prompt_of(model)]


@pytest.mark.parametrize("kind", ["prefix", "projection"])
@pytest.mark.parametrize("family, task", CASES)
def test_loss_and_gradients_are_hf_pefts(family, task, kind):
    ours, theirs = prompt_pair(kind, family, task)
    widen(ours, theirs)
    ours.eval(), theirs.eval()
    batch = inputs(family, task)
    (mine, grads), (other, wanted) = step(ours, batch), step(theirs, batch)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(wanted) > 0
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    assert any(g.any() for g in grads)
    with ours.disable_adapter():
        without = loss_of(ours(**batch)).detach()
    assert (without - mine).abs() > 1e-4  # the prefix matters


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_is_hf_pefts(family, beams):
    ours, theirs = prompt_pair("prefix", family)
    widen(ours, theirs)
    ids = torch.tensor([[0, 0, 7, 9], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    mine, other = (
        m.eval().generate(input_ids=ids, attention_mask=mask, **settings) for m in (ours, theirs)
    )
    assert torch.equal(mine, other)
    bare = ours.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(mine, bare)  # HF PEFT cannot


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_which_hf_peft_refuses(reentrant):
    model, batch = prompt_model(peftkern, "prefix"), inputs("llama", "CAUSAL_LM")
    model.train()
    loss, grads = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, same = step(model, batch)
    torch.testing.assert_close(loss, again)
    for a, b in zip(grads, same, strict=True):
        torch.testing.assert_close(a, b)


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
