"""Layers of bitsandbytes in 4 bit: read in their format, equal to HF PEFT's, never called."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.ops.bases.formats import as_weight, read

bitsandbytes: Any = pytest.importorskip("bitsandbytes")


def quantised(linear: nn.Linear, **how: Any) -> Any:
    """A ``Linear4bit`` of a linear layer's weight, on the CPU."""
    N, K = linear.weight.shape
    made = bitsandbytes.nn.Linear4bit(K, N, bias=linear.bias is not None, **how)
    kept = {k: v for k, v in how.items() if k != "compute_dtype"}
    weight = linear.weight.detach().clone()
    made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=made, **kept)
    made.bias = linear.bias
    return made.to("cpu")


def llama(**how: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantised(module, **how))
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_is_read_as_its_owner_reads_it(kind: str, nested: bool) -> None:
    layer = quantised(nn.Linear(64, 48), quant_type=kind, compress_statistics=nested)
    found = read(layer)
    assert not isinstance(found, str) and found.bias is layer.bias
    owner = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(found.packed.dense(torch.float32), owner)
    x = torch.randn(5, 64)
    w = as_weight(found.packed, x)
    assert w.shape == (48, 64) and w.t().shape == (64, 48)
    assert torch.equal(w.t().product(x), x @ owner.t())
    assert torch.equal(w.product(x @ owner.t()), x @ owner.t() @ owner)
    assert torch.equal(x @ w.t(), x @ owner.t())  # an operation that knows nothing of it
    with pytest.raises(TypeError, match="frozen NF4|frozen FP4"):
        w.zero_()


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_logits_and_gradients_equal_hf_pefts(settings: dict[str, Any]) -> None:
    base = llama(quant_type="nf4")
    more = dict(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**more))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    rows = peftkern.explain(ours)
    assert all(row.fused for row in rows), rows
    x = torch.randint(0, 64, (2, 9))
    grads, logits = [], []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(3)
        out = model(input_ids=x, labels=x)
        out.loss.backward()
        logits.append(out.logits.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5)
