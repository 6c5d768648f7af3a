"""Tests only for aLoRA: the token at which it starts, checkpoints, threads, generation."""

from __future__ import annotations

import threading

import peft
import pytest
import torch

import peftkern
from peftkern.tuners.lora.variant_registry import calculate_alora_offsets
from tests import variants
from tests.closeness import assert_same_number, differ
from tests.tiny import fill, first, gradients

CASE = variants.CASES["alora"]
CALL = CASE.settings["alora_invocation_tokens"]
# an invocation in the middle, two of them, none, one that is cut off at the end
IDS = torch.tensor(
    [[3, 4, 7, 9, 5, 6, 8], [7, 9, 3, 7, 9, 4, 5], [3, 9, 7, 5, 6, 8, 4], [3, 4, 5, 6, 8, 9, 7]]
)
OFFSETS = [5, 4, None, None]


def models():
    found = variants.models(CASE)
    for model in found:
        fill(model)
    return found


def test_offsets():
    configs = {
        "a": peftkern.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=CALL),
        "b": peftkern.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3]),
        "plain": peftkern.LoraConfig(),
    }
    for names in (None, ["a", "b", "plain", "__base__"], ["b"]):
        mine = calculate_alora_offsets(configs, "a", IDS, adapter_names=names)
        other = peft.tuners.lora.variants.calculate_alora_offsets(configs, "a", IDS, names)
        assert mine == other
    assert calculate_alora_offsets(configs, "a", IDS) == OFFSETS


def test_before_its_invocation_the_model_is_the_base_model():
    ours, _ = models()
    with torch.no_grad():
        after = first(ours.eval()(input_ids=IDS))
        with ours.disable_adapter():
            base = first(ours(input_ids=IDS))
        embeds = ours.get_input_embeddings()(IDS)
        with pytest.warns(UserWarning, match="only inputs_embeds are provided"):
            plain = first(ours(inputs_embeds=embeds, attention_mask=None))
    for row, offset in enumerate(OFFSETS):
        start = IDS.shape[1] - (offset or 0)
        assert_same_number(after[row, :start], base[row, :start])
        assert offset is None or differ(after[row, start:], base[row, start:])
    assert_same_number(plain, base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_know_their_offsets(reentrant):
    """Also when there is another forward before the backward, which HF PEFT refuses."""
    ours, _ = models()
    batch = {"input_ids": IDS, "labels": IDS}
    want = gradients(ours.train(), batch)[1]
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    ours.zero_grad()
    loss = ours(**batch).loss
    ours(input_ids=IDS.flip(1), labels=IDS)
    loss.backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same_number(parameter.grad, want[name], name)


def test_checkpoints_of_several_threads_keep_their_offsets_apart():
    ours, _ = models()
    batch = {"input_ids": IDS, "labels": IDS}
    want = gradients(ours.train(), batch)[1]
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.zero_grad()
    name = "_gradient_checkpointing_func"
    runs = {m: m.__dict__[name] for m in ours.modules() if name in m.__dict__}
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ours.base_model._enable_peft_forward_hooks(alora_offsets=[1, 1, 1, 1]):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with ours.base_model._enable_peft_forward_hooks(alora_offsets=OFFSETS):
        thread.start()
        assert entered.wait(60)
        ours.base_model.model(**batch).loss.backward()
    leave.set()
    thread.join()
    for key, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_same_number(parameter.grad, want[key], key)
    assert runs and all(m.__dict__[name] is run for m, run in runs.items())


def test_generation():
    ours, theirs = models()
    kwargs = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    mine, other = (m.eval().generate(input_ids=IDS, **kwargs) for m in (ours, theirs))
    assert torch.equal(mine, other)
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(input_ids=IDS, **kwargs), mine)
    with pytest.raises(ValueError, match="Beam search not yet supported for aLoRA"):
        ours.generate(input_ids=IDS, num_beams=2, **kwargs)


def test_layers_of_plain_adapters_beside_it_are_not_handed_offsets():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lin = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8)
            self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.box = torch.nn.Sequential(torch.nn.Linear(8, 8))

        def forward(self, input_ids=None, **kwargs):
            x = self.lin(self.embed(input_ids))
            return self.box(self.attn(x, x, x)[0])

    plain = peftkern.LoraConfig(target_modules=["attn"], target_parameters=["box.0.weight"])
    ours = peftkern.get_peft_model(Model().double(), plain, "plain")
    alora = peftkern.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["lin"], alora_invocation_tokens=CALL
    )
    ours.add_adapter("alora", alora)
    fill(ours)
    ours.set_adapter("alora")
    with ours.disable_adapter():
        base = ours(input_ids=IDS)
    with ours.base_model._enable_peft_forward_hooks(alora_offsets=OFFSETS):
        got = ours.base_model.model(input_ids=IDS)
    assert torch.equal(got[2:], base[2:]) and differ(got[:2], base[:2])


def test_what_it_does_not_do():
    ours, _ = models()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peftkern.convert_to_lora(ours, rank=2)
    assert "aLoRA" in peftkern.explain(ours)[0].reason
    with pytest.raises(ValueError, match="one number .* for each row"):
        ours(input_ids=IDS, alora_offsets=[1, 2])
    with pytest.warns(UserWarning, match="only inputs_embeds are provided"):
        ours(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64))
