"""torch.compile of a prefix-tuned model, with gradient checkpointing: one graph, eager's gradients.

A prefix does not need transformers' ``enable_input_require_grads``. With that, the graph of a
checkpointed model breaks, with or without a prefix.
"""

from __future__ import annotations

import pytest
import torch

import peftkern
from peftkern.tuners.prefix_tuning.attention import SLOT
from tests.closeness import assert_same_number
from tests.prompts import prompt_model
from tests.tiny import inputs

pytestmark = [
    pytest.mark.filterwarnings("error:Dynamo detected a call"),  # to a cached function of ours
    # torch's own, where the graph breaks and a prefix goes into the next one
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_and_weight():
    model = prompt_model(peftkern, "prefix").train()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.mul_(3.0)
    return model, weight


def step(call, weight):
    weight.grad = None
    loss = call(**inputs("llama", "CAUSAL_LM"), use_cache=False).loss
    loss.backward()
    return loss.detach().double(), weight.grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", ["no", "one graph", "with transformers' hook"])
def test_gradients_are_those_of_eager(checkpointed):
    model, weight = model_and_weight()
    expected = step(model, weight)
    if checkpointed != "no":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if checkpointed == "one graph":
        model.get_base_model().disable_input_require_grads()
    whole = checkpointed != "with transformers' hook"
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    for _ in range(2):
        assert_same_number(step(compiled, weight), expected)
    assert expected[1].any()


@pytest.mark.slow
def test_a_layer_that_misses_its_prefix_is_an_error_in_a_checkpoint_too():
    model, weight = model_and_weight()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    delattr(model.get_base_model().model.layers[1].self_attn, SLOT)
    with pytest.raises(RuntimeError, match=r"attention of layers \[1\]"):
        step(torch.compile(model, backend="aot_eager"), weight)


@pytest.mark.long
def test_reentrant_checkpoints_are_refused():
    """They would give no gradient at all, without an error."""
    model, weight = model_and_weight()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(Exception, match=r"loses the prefix's gradient .*use_reentrant"):
        step(torch.compile(model, backend="aot_eager"), weight)
    assert weight.grad is None
