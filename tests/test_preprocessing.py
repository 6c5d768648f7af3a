"""Starts of A and B from data: they leave the model as it was, and refuse what does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftkern
from peftkern.tuners.lora import CordaConfig, preprocess_corda

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 12)
        self.b.eval()  # unlike the rest

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def corda(*targets: str, **settings: Any) -> peftkern.LoraConfig:
    return peftkern.LoraConfig(
        r=2,
        target_modules=list(targets or "ab"),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm", **settings),
    )


def lora_ga(*targets: str) -> peftkern.LoraConfig:
    return peftkern.LoraConfig(
        r=2,
        target_modules=list(targets or "ab"),
        init_lora_weights="lora_ga",
        lora_ga_config=peftkern.LoraGAConfig(),
    )


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The modules' attributes: modes, hooks, and what a start leaves on them."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for module in model.modules()
    ]


def test_corda_leaves_each_module_in_its_mode(net):
    modes = [module.training for module in net.modules()]
    seen = []
    preprocess_corda(net, corda(), run_model=lambda: (seen.append(net.training), net(X)))
    assert seen == [False]
    assert [module.training for module in net.modules()] == modes == [True, True, False]


def broken(net: Net) -> None:
    net(X)
    raise KeyError("broken")


@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        (None, ValueError, "run_model must be specified"),
        (broken, KeyError, "broken"),
        (lambda net: net(X.view(2, 8, 12)), ValueError, r"one sequence .* input \(2, 8, 12\)"),
        (lambda net: net.b(net.a(X[0])), ValueError, r"one sequence .* input \(12,\)"),
        (lambda net: net(X * torch.nan), ValueError, "Invalid value found in input"),
        (lambda net: net.a(X), ValueError, "never ran the layer `b`"),
    ],
)
def test_corda_leaves_the_model_as_it_was_on_an_error(net, run, error, said):
    before = attributes(net)
    with pytest.raises(error, match=said):
        preprocess_corda(net, corda(), run_model=run and (lambda: run(net)))
    assert attributes(net) == before


def test_corda_takes_one_token_as_a_row(net):
    """[1, K] is one row of X, as it is within [T, K] up to the scale that each input gets."""
    kept = corda("a", prune_temporary_fields=False)
    preprocess_corda(net, kept, run_model=lambda: net(X[:1]))
    x = X[:1] / X[:1].max().abs()
    assert torch.equal(net.a.covariance_matrix, x.T @ x)


def test_corda_asks_for_its_settings(net):
    with pytest.raises(ValueError, match="`corda_config` is None"):
        preprocess_corda(net, peftkern.LoraConfig(target_modules=["a"]), lambda: net(X))


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_corda_refuses_a_file_of_other_layers(net, tmp_path, kind):
    there = {kind: str(tmp_path / "file")}
    preprocess_corda(
        copy.deepcopy(net), corda("a", **there), hooked_model=net, run_model=lambda: net(X)
    )
    before = attributes(net)
    with pytest.raises(ValueError, match=r"file has no 'b.* made for another model"):
        preprocess_corda(net, corda("a", "b", **there))
    assert attributes(net) == before


def test_lora_ga_refuses_a_cache_of_other_layers(net, tmp_path):
    file = tmp_path / "gradients"
    save_file({"a._peft_loraga_grad": torch.ones(10, 12)}, file)
    before = attributes(net)
    with pytest.raises(ValueError, match=r"gradients has no 'b\._peft_loraga_grad'"):
        peftkern.preprocess_loraga(net, lora_ga(), lambda: None, str(file))
    assert attributes(net) == before


def test_lora_ga_neither_counts_nor_drops_gradients_that_are_there(net):
    """HF PEFT adds them to the mean and drops them."""

    def step(model=net):
        model(X).square().sum().backward()

    fresh = copy.deepcopy(net)
    peftkern.preprocess_loraga(fresh, lora_ga(), lambda: step(fresh))
    step()
    before = {name: parameter.grad for name, parameter in net.named_parameters()}
    values = {name: grad.clone() for name, grad in before.items()}
    peftkern.preprocess_loraga(net, lora_ga(), step)
    for name, parameter in net.named_parameters():
        assert parameter.grad is before[name] and torch.equal(parameter.grad, values[name])
    for ours, expected in ((net.a, fresh.a), (net.b, fresh.b)):
        assert torch.equal(ours._peft_loraga_grad, expected._peft_loraga_grad)
