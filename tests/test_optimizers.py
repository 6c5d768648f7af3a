"""LoRA+ and LoRA-FA: HF PEFT's own optimizers beside them, step by step on the same model."""

from __future__ import annotations

import peft.optimizers
import pytest
import torch
from peft.optimizers import lorafa as hf_lorafa

import peftkern
from peftkern import optimizers
from tests.closeness import assert_same_number
from tests.tiny import inputs, loss_of, pair

MODELS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["model.norm"]},
}


def train(models, optimizers, steps=3):
    """Train both, and compare all numbers after each step."""
    batch = inputs("llama")
    for _ in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(**batch)).backward()
            optimizer.step()
        ours, theirs = (dict(model.named_parameters()) for model in models)
        assert_same_number(ours, theirs)


def moved(model, before):
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("how", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_loraplus_is_hf_pefts(how, cls):
    models = pair("llama", dtype=torch.float64, **how)
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 1e-3,
                "loraplus_weight_decay": 0.1}  # fmt: skip
    makers = (optimizers.create_loraplus_optimizer, peft.optimizers.create_loraplus_optimizer)
    ours, theirs = (make(m, cls, **settings) for make, m in zip(makers, models, strict=True))
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert (mine["lr"], mine["weight_decay"]) == (other["lr"], other["weight_decay"])
        assert [p.shape for p in mine["params"]] == [p.shape for p in other["params"]]
    train(models, (ours, theirs))


def test_loraplus_puts_each_parameter_into_its_group():
    how = {"bias": "all", "target_modules": ["c_attn", "wte"]}
    model, theirs = pair("gpt2", fan_in_fan_out=False, **how)
    model.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    theirs.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    made = []
    for make, m in ((optimizers, model), (peft.optimizers, theirs)):
        optimizer = make.create_loraplus_optimizer(m, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)
        names = {p: n for n, p in m.named_parameters()}
        made.append([[names[p] for p in group["params"]] for group in optimizer.param_groups])
    assert made[0] == made[1] and all(made[0])


@pytest.mark.parametrize("how", list(MODELS.values())[:2], ids=list(MODELS)[:2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lorafa_is_hf_pefts(how, decay):
    models = pair("llama", dtype=torch.float64, **how, modules_to_save=["model.norm"])
    before = {n: p.detach().clone() for n, p in models[0].named_parameters()}
    settings = {"r": 4, "lora_alpha": 8, "lr": 1e-2, "weight_decay": decay}
    makers = (optimizers.create_lorafa_optimizer, peft.optimizers.create_lorafa_optimizer)
    ours, theirs = (make(m, **settings) for make, m in zip(makers, models, strict=True))
    for key in ("names", "scaling_factors", "scaling_factor", "lr", "weight_decay"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    train(models, (ours, theirs))
    names = moved(models[0], before)
    assert names and all("lora_B" in n or "norm" in n for n in names)
    # its state is HF PEFT's, so a run can go on with either
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()
    assert_same_number(ours.state_dict()["state"], theirs.state_dict()["state"])
    theirs.load_state_dict(ours.state_dict())


def test_lorafa_projects_by_its_formula(monkeypatch):
    a = torch.randn(3, 7, dtype=torch.float64)
    grad = torch.randn(5, 3, dtype=torch.float64)
    exact = grad @ torch.linalg.inv(a @ a.T) / 4
    error = (optimizers.lorafa.projected(grad, a, 2.0) - exact).abs().max() / exact.abs().max()
    assert error < 0.1  # bfloat16's product
    monkeypatch.setattr(optimizers.lorafa, "is_bf16_available", lambda: False)
    found = optimizers.lorafa.projected(grad, a, 2.0)
    assert found.dtype == torch.float64 and (found - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize(
    "how", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["c_attn"]}]
)
def test_lorafa_trains_what_is_neither_a_nor_b(how):
    """HF PEFT's takes a magnitude or B's bias for the next layer's A."""
    model, _ = pair("gpt2", dtype=torch.float64, **how)
    optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model(**inputs("gpt2"))).backward()
    optimizer.step()
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) == trains and not any("lora_A" in n for n in trains)


def test_lorafa_with_two_adapters_trains_the_active_one():
    """HF PEFT's pairs one adapter's A with the other's."""
    model, _ = pair("llama", dtype=torch.float64)
    model.add_adapter("second", peftkern.LoraConfig(r=2, init_lora_weights=False))
    model.set_adapter("second")
    optimizer = optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model(**inputs("llama"))).backward()
    optimizer.step()
    assert {n.split(".lora_")[1] for n in moved(model, before)} == {"B.second.weight"}
    again = optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.state.keys() == optimizer.state.keys()


def test_lorafa_errors():
    model, _ = pair("llama")
    for wrong, words in (
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, "beta parameter: 1.0"),
        ({"eps": -1.0}, "epsilon value: -1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizers.LoraFAOptimizer(model.parameters(), **wrong)
        with pytest.raises(ValueError, match=words):
            hf_lorafa.LoraFAOptimizer(model.parameters(), **wrong)
    with pytest.raises(ValueError, match="use_rslora=True.*'default'"):
        optimizers.create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=True)
    named = [
        {"params": list(model.parameters()), "names": [n for n, _ in model.named_parameters()]}
    ]
    with pytest.raises(KeyError, match="scaling_factors"):
        optimizers.LoraFAOptimizer(named).step()
    named[0]["scaling_factor"] = 2.0
    with pytest.warns(FutureWarning, match="scaling_factor"):
        optimizers.LoraFAOptimizer(named).step()
    with pytest.warns(FutureWarning, match="use_rslora"):
        optimizers.create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=False)
