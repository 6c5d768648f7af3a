"""Training parity with HF PEFT: gradients, dropout, checkpointing, autocast, optimiser steps."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_parity import SETTINGS
from tests.tiny import CASES, fill, first, gradients, inputs, loss_of, make


def pair(family, task="CAUSAL_LM", dtype=torch.float64, **settings):
    return tiny.pair(family, task, dtype, **settings)


def assert_same_gradients(ours, theirs, batch, seed=5):
    """Equal losses and gradients, of the same parameters. Returns peftkern's."""
    loss, mine = gradients(ours, batch, seed)
    expected_loss, expected = gradients(theirs, batch, seed)
    assert_same_number(loss, expected_loss, "loss")
    # a comparison of zeros would prove nothing
    assert all(expected[n].abs().max() > 0 for n in expected if "lora_" in n)
    assert_same_number(mine, expected)
    return mine


@pytest.mark.parametrize(("family", "task"), CASES)
def test_gradients(family, task):
    ours, theirs = pair(family, task)
    mine = assert_same_gradients(ours.train(), theirs.train(), inputs(family, task))
    assert {n for n in mine if "lora_" in n}
    assert all(
        p.requires_grad == (n in mine) or "lora_" not in n for n, p in ours.named_parameters()
    )


@pytest.mark.parametrize(("family", "task"), CASES)
def test_float32_gradients_are_as_good_as_pefts(family, task):
    """With dropout the gradients of several draws are measured together.

    Gradients that sum to zero are left out, as the bias of a start or an end changes no softmax.
    """
    ours, theirs = pair(family, task, torch.float32, lora_dropout=0.25)
    exact, batch = copy.deepcopy(theirs).double(), inputs(family, task)
    found = [{}, {}, {}]
    for seed in range(2):
        for grads, model in zip(found, (ours, theirs, exact), strict=True):
            fill(model, seed=seed)
            grads.update(((seed, n), g) for n, g in gradients(model.train(), batch)[1].items())
    zeros = [key for key, grad in found[2].items() if grad.abs().max() < 1e-12]
    assert all(n.endswith("qa_outputs.modules_to_save.default.bias") for _, n in zeros)
    assert_as_good_as_torch(*({k: g for k, g in f.items() if k not in zeros} for f in found))


@pytest.mark.parametrize(
    "name", [n for n, (_, _, s) in SETTINGS.items() if "dtype" not in s and n != "inference_mode"]
)
def test_gradients_of_every_setting_with_dropout(name):
    family, task, settings = SETTINGS[name]
    ours, theirs = pair(family, task, lora_dropout=0.25, **settings)
    assert_same_gradients(ours.train(), theirs.train(), inputs(family, task))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_dropout_draws_the_mask_of_peft(family, task, p):
    """The same seed drops the same elements, in the first step and in the second."""
    ours, theirs = pair(family, task, lora_dropout=p)
    batch = inputs(family, task)
    out = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        out.append([first(model(**batch)) for _ in range(2)])
    assert_same_number(*out)
    assert (out[0][0] - out[0][1]).abs().max() > 1e-3
    # and none in evaluation mode, nor under no_grad with the model in training mode is one left out
    ours.eval(), theirs.eval()
    assert_same_number(first(ours(**batch)), first(theirs(**batch)))
    with torch.no_grad():
        ours.train(), theirs.train()
        torch.manual_seed(12)
        a = first(ours(**batch))
        torch.manual_seed(12)
        assert_same_number(a, first(theirs(**batch)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize(
    ("family", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("t5", "SEQ_2_SEQ_LM")],
)
def test_gradient_checkpointing(family, task, reentrant):
    ours, theirs = pair(family, task, lora_dropout=0.3)
    batch = inputs(family, task)
    plain = assert_same_gradients(ours.train(), theirs.train(), batch)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
    checkpointed = assert_same_gradients(ours, theirs, batch)
    assert_same_number(checkpointed, plain)


def test_a_model_that_checkpoints_already_gets_gradients():
    """Its embeddings' output must require a gradient: a reentrant block passes none otherwise."""
    base = make("llama", dtype=torch.float64)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ours, theirs = pair("llama", base=base)
    assert_same_gradients(ours.train(), theirs.train(), inputs("llama"))


def _under_autocast(model, batch):
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    loss_of(output).backward()
    return first(output).detach(), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast(family, dtype):
    """bfloat16 autocast over a float32 and a bfloat16 model, with float32 adapters in both."""
    ours, theirs = pair(family, dtype=dtype)
    batch = inputs(family, batch=6, length=12)
    found = [{}, {}, {}]
    for seed in range(4):
        for model in (ours.train(), theirs.train()):
            fill(model, seed=seed)
        _, exact = gradients(copy.deepcopy(theirs).double(), batch)
        (a, mine_grads), (b, other_grads) = (
            _under_autocast(ours, batch),
            _under_autocast(theirs, batch),
        )
        assert a.dtype == b.dtype
        assert mine_grads.keys() == other_grads.keys() == exact.keys()
        for grads, new in zip(found, (mine_grads, other_grads, exact), strict=True):
            grads.update(((seed, n), g) for n, g in new.items())
    assert all(g.dtype == torch.float32 for grads in found[:2] for g in grads.values())
    assert_as_good_as_torch(*found)


def test_autocast_draws_the_mask_of_peft():
    ours, theirs = pair("gpt2", dtype=torch.float32, lora_dropout=0.5)
    batch = inputs("gpt2")
    torch.manual_seed(3)
    exact = first(copy.deepcopy(theirs).double().train()(**batch))
    (a, _), (b, _) = (_under_autocast(m.train(), batch) for m in (ours, theirs))
    assert_as_good_as_torch(*({"logits": t.detach()} for t in (a, b, exact)))


def test_accumulated_gradients_and_optimiser_steps():
    """Ten AdamW steps of two micro-batches each, with dropout and clipping, stay on PEFT's path."""
    ours, theirs = pair("llama", lora_dropout=0.1, target_modules="all-linear")
    losses = []
    for model in (ours.train(), theirs.train()):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-2)
        torch.manual_seed(0)
        seen = []
        for _ in range(10):
            for _ in range(2):
                loss = loss_of(model(**inputs("llama"))) / 2
                loss.backward()
                seen.append(loss.item())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(seen)
    assert_same_number(*losses)
    assert losses[0][-1] < 0.95 * losses[0][0]


@pytest.mark.parametrize("wide", [True, False], ids=["fp32_adapters", "bf16_adapters"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_bf16_gradients_are_as_close_to_float64_as_pefts(family, wide):
    """All gradients of A and B over several draws; as in test_parity."""
    ours, theirs = pair(family, dtype=torch.bfloat16, autocast_adapter_dtype=wide)
    batch, found = inputs(family, batch=6, length=12), [{}, {}, {}]
    for seed in range(4):
        for model in (ours.train(), theirs.train()):
            fill(model, seed=seed)
        exact = copy.deepcopy(theirs).double()
        for grads, model in zip(found, (ours, theirs, exact), strict=True):
            grads.update(((seed, n), g) for n, g in gradients(model, batch)[1].items())
    kind = torch.float32 if wide else torch.bfloat16
    assert all(g.dtype == kind for grads in found[:2] for g in grads.values())
    assert_as_good_as_torch(*found)


def test_frozen_weights_get_no_gradient_and_stay():
    ours, _ = pair("gpt2", bias="lora_only")
    before = {n: p.clone() for n, p in ours.named_parameters()}
    optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    loss_of(ours.train()(**inputs("gpt2"))).backward()
    optimiser.step()
    for name, parameter in ours.named_parameters():
        trains = "lora_" in name or name.endswith("c_attn.base_layer.bias")
        assert parameter.requires_grad == trains == (parameter.grad is not None), name
        assert torch.equal(parameter, before[name]) != trains, name
