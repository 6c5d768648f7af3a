"""A tiny Llama on the device: both backends train alike, checkpointing redraws the same mask."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from tests.gpu.ground import DEVICE, ON_CPU, backend, triton_backend


def tiny_llama(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64 if ON_CPU else 256,
        intermediate_size=96 if ON_CPU else 512,
        num_hidden_layers=1 if ON_CPU else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(DEVICE, dtype)


def adapted(base, **settings):
    torch.manual_seed(1)
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, **settings
    )
    return peftkern.get_peft_model(copy.deepcopy(base), config)


def train(model, ids, steps=5):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("product", triton_backend.PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_backends_train_alike(dtype, product, monkeypatch):
    monkeypatch.setattr(triton_backend, "product", product)
    base = tiny_llama(dtype)
    torch.manual_seed(2)
    ids = torch.randint(0, 60, (2, 9 if ON_CPU else 65), device=DEVICE)
    losses, logits = {}, {}
    for choice in ("torch", "triton"):
        model = adapted(base, r=5)
        with backend.use_backend(choice):
            losses[choice] = train(model, ids)
            with torch.no_grad():
                logits[choice] = model.eval()(ids[:1, :1]).logits.float()
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert losses["torch"] == pytest.approx(losses["triton"], abs=tolerance)
    assert losses["torch"][0] - losses["torch"][-1] > 1e-3  # it did learn
    scale = logits["torch"].abs().max()
    assert (logits["torch"] - logits["triton"]).abs().max() <= 10 * tolerance * max(scale, 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_elements_again(reentrant):
    ids = torch.randint(0, 60, (2, 9), device=DEVICE)
    with backend.use_backend("triton"):
        model = adapted(tiny_llama(torch.float32), r=3, lora_dropout=0.3)
        grads = []
        for checkpoint in (False, True):
            if checkpoint:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(3)
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            model.zero_grad()
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-5)
