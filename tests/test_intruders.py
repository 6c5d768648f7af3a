"""``reduce_intruder_dimension``, beside HF PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension as hf_reduce

import peftkern
from tests.closeness import assert_same_number
from tests.tiny import assert_same, first, inputs, pair, snapshot


@pytest.mark.parametrize("epsilon", [0.0, 0.6, 9.0], ids=["none", "some", "all"])
def test_linear_layers_are_hf_pefts(epsilon):
    how = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    models = pair("llama", dtype=torch.float64, **how)
    said = []
    for model, reduce in zip(models, (peftkern.reduce_intruder_dimension, hf_reduce), strict=True):
        lines = []
        reduce(model, top_k=6, threshold_epsilon=epsilon, logging_sink=lines.append)
        said.append(lines)
    assert said[0] == said[1] and len(said[0]) == 5
    found = {line.partition(": ")[2] for line in said[0][:-1]}
    assert (found == {"No intruders"}) == (epsilon == 0.0)
    ours, theirs = models
    assert ours.active_adapters == theirs.active_adapters == ["intruder_reduced"]
    updates = [
        [m.get_delta_weight("intruder_reduced") for m in model.modules() if hasattr(m, "lora_A")]
        for model in models
    ]
    assert_same_number(*updates)
    assert_same_number(*(first(model.eval()(**inputs("llama"))) for model in models))
    if epsilon == 0.0:
        ours.set_adapter("default")
        plain = first(ours(**inputs("llama")))
        ours.set_adapter("intruder_reduced")
        assert_same_number(first(ours(**inputs("llama"))), plain)


@pytest.mark.parametrize(
    ("family", "target", "turned"), [("gpt2", "c_attn", True), ("llama", "embed_tokens", True)]
)
def test_weights_that_are_stored_turned(family, target, turned):
    """HF PEFT puts factors of the turned weight in B and A, whose shapes do not go together."""
    model, _ = pair(family, dtype=torch.float64, target_modules=[target])
    peftkern.reduce_intruder_dimension(model, threshold_epsilon=9.0, top_k=3, logging_sink=None)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    W = layer.get_base_layer().weight.detach()
    old, new = (layer.get_delta_weight(n).detach() for n in ("default", "intruder_reduced"))
    U, S, Vh = torch.linalg.svd(W + old, full_matrices=False)
    exact = old - 0.25 * (U[:, :3] * S[:3]) @ Vh[:3]
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    assert_same_number(new, (u[:, :4] * s[:4]) @ vh[:4])
    first(model(**inputs(family)))


def test_of_bfloat16_and_biases():
    how = {"lora_bias": True, "target_modules": ["c_attn"], "autocast_adapter_dtype": False}
    model, _ = pair("gpt2", dtype=torch.bfloat16, **how)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.fill_(0.5)
    peftkern.reduce_intruder_dimension(model, threshold_epsilon=9.0, logging_sink=None)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    assert layer.lora_A["intruder_reduced"].weight.dtype == torch.bfloat16
    assert torch.equal(layer.lora_B["intruder_reduced"].bias, layer.lora_B["default"].bias)


@pytest.mark.parametrize(
    ("lora", "call", "match"),
    [
        ({}, {"old_adapter_name": "x"}, r"`old_adapter_name` must be one of \['default'\]"),
        ({}, {"new_adapter_name": "default"}, "already exists"),
        ({"use_dora": True}, {}, "works on plain LoRA"),
    ],
)
def test_errors_come_before_anything_is_changed(lora, call, match):
    model, _ = pair("llama", **lora)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        peftkern.reduce_intruder_dimension(model, **call)
    assert_same(model, before)


def test_prompts_are_refused():
    from tests.tiny import make

    config = peftkern.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="not using LoRA"):
        peftkern.reduce_intruder_dimension(peftkern.get_peft_model(make("llama"), config))
