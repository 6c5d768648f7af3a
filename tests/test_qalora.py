"""QA-LoRA on layers quantised by GPTQ, beside HF PEFT's layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.packed_layers import Awq, Gptq, GptqModel
from tests.tiny import assert_same, make, snapshot

hf_gptq: Any = pytest.importorskip("peft.tuners.lora.gptq")
SETTINGS: Any = dict(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=8, target_modules=["0"])


def adapted(base: nn.Module, **more: Any) -> Any:
    """(model, its layer) with numbers in A and B."""
    torch.manual_seed(1)
    config = peftkern.LoraConfig(**{**SETTINGS, **more})
    model: Any = peftkern.get_peft_model(nn.Sequential(base), config)
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
    return model, model.base_model.model[0]


@pytest.mark.parametrize("kind", [Gptq, GptqModel])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_numbers_and_gradients_are_hf_pefts(kind: Any, p: float) -> None:
    torch.manual_seed(0)
    base = kind(nn.Linear(96, 64))
    model, layer = adapted(copy.deepcopy(base), lora_dropout=p)
    assert layer.lora_A["default"].weight.shape == (4, 12)
    [row] = peftkern.explain(model)
    assert not row.fused and "QA-LoRA" in row.reason
    config = LoraConfig(**SETTINGS, lora_dropout=p)
    theirs = hf_gptq.GPTQLoraLinear(base, "default", config, r=4, lora_alpha=6)
    held = {k: v for k, v in layer.state_dict().items() if "lora_" in k}
    assert not theirs.load_state_dict(held, strict=False).unexpected_keys
    wide = []
    for module in (layer, theirs):
        module = copy.deepcopy(module).train()
        module.lora_A.double(), module.lora_B.double()  # not the base's scales
        torch.manual_seed(2)
        x = torch.randn(3, 5, 96, dtype=torch.float64).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        A, B = module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad
        wide.append({"y": y.detach(), "x": x.grad, "A": A, "B": B})
    assert_same_number(*wide)
    x = torch.randn(3, 5, 96)
    # plain LoRA with the wider A is the same update
    delta = layer.get_delta_weight("default").detach().double()
    exact = x.double() @ (base.dense.double() + delta).T + base.bias.double()
    y, z = (m.eval()(x).detach() for m in (layer, theirs))
    assert_as_good_as_torch(y, z, exact)
    assert differ(exact, base(x.double()))


def test_files_and_a_second_adapter(tmp_path: Any) -> None:
    base = GptqModel(nn.Linear(96, 64))
    model, layer = adapted(copy.deepcopy(base))
    x = torch.randn(3, 96)
    want = model(x)
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(base)), tmp_path)
    assert torch.equal(again(x), want)
    again.add_adapter("plain", peftkern.LoraConfig(r=2, target_modules=["0"]))
    again.set_adapter("plain")
    assert differ(again(x).double(), want.double())
    again.delete_adapter("default")
    assert "default" not in getattr(again.base_model.model[0], "qalora_group_size", {})


def test_refusals_come_before_anything_is_changed() -> None:
    model = make("llama")
    before = snapshot(model)
    config = peftkern.LoraConfig(use_qalora=True, target_modules=["q_proj"])
    with pytest.raises(NotImplementedError, match="GPTQ, and `model.*q_proj` is a Linear"):
        peftkern.get_peft_model(model, config)
    assert_same(model, before)
    for base, more, error, match in (
        (Awq(nn.Linear(96, 64)), {}, NotImplementedError, "GPTQ"),
        (Gptq(nn.Linear(96, 64)), {"qalora_group_size": 7}, ValueError, r"\(96\).*divisible.*7"),
        (Gptq(nn.Linear(96, 64)), {"use_dora": True}, ValueError, "variant combination"),
    ):
        with pytest.raises(error, match=match):
            adapted(base, **more)
    merged, _ = adapted(Gptq(nn.Linear(96, 64)))
    with pytest.raises((NotImplementedError, ValueError)):
        merged.merge_adapter()
