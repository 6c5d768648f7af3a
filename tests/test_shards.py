"""Weights that processes share out (DTensors) are written to: new data would have no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peftkern
from peftkern.utils.shards import part_like, put_data
from tests.closeness import assert_same_number
from tests.ranks import NEEDS_GLOO

pytestmark = NEEDS_GLOO

N = 8
X = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NEW = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(N, N, bias=False, dtype=torch.float64))


def shard(module: nn.Module) -> nn.Module:
    """Freed after each forward, as decoder layers are."""
    mesh = init_device_mesh("cpu", (1,))
    return fully_shard(module, mesh=mesh, reshard_after_forward=True)


@pytest.mark.parametrize("ran", [False, True], ids=["before a forward", "after a forward"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "a shard"])
def test_a_new_base_weight(ran: bool, whole: bool, one_process: None) -> None:
    settings = peftkern.LoraConfig(target_modules=["0"])
    model = peftkern.get_peft_model(base(), settings)
    layer: Any = model.base_model.model[0]
    shard(layer)
    if ran:
        model(X)
    weight = layer.base_layer.weight
    layer.set_base_weight(NEW if whole else layer.get_base_weight() * 0 + part_like(weight, NEW))
    assert layer.base_layer.weight is weight
    assert_same_number(weight.full_tensor(), NEW)
    assert_same_number(model(X), X @ NEW.T)  # B is zero


def test_a_new_base_weight_that_no_one_shares() -> None:
    model = peftkern.get_peft_model(base(), peftkern.LoraConfig(target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    layer.set_base_weight(NEW)
    assert layer.weight.data_ptr() == NEW.data_ptr()


def test_another_dtype(one_process: None) -> None:
    model: Any = shard(base())
    weight = model[0].weight
    put_data(weight, part_like(weight, NEW.float()))
    assert weight is model[0].weight and weight.dtype == torch.float32
    assert torch.equal(weight.full_tensor(), NEW.float())


def test_starts_that_change_a_sharded_base_weight(one_process: None) -> None:
    # KaSA leaves the r smallest singular values of the base weight out
    sharded: Any = shard(plain := base())
    whole = plain[0].weight.full_tensor().detach().clone()
    u, s, v = torch.linalg.svd(whole)
    kasa = peftkern.LoraConfig(r=2, target_modules=["0"], kasa_config=peftkern.KasaConfig())
    model = peftkern.get_peft_model(sharded, kasa)
    layer: Any = model.base_model.model[0]
    cut = (u[:, :-2] * s[:-2]) @ v[:-2]
    found = layer.base_layer.weight.full_tensor()
    assert float((found - cut).abs().max()) < 1e-6 < float((found - whole).abs().max())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loaded_after_a_forward(low_cpu_mem_usage: bool, one_process: None) -> None:
    settings = peftkern.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(base(), settings)
    layer: Any = model.base_model.model[0]
    state = {name: 2 * w for name, w in peftkern.get_peft_model_state_dict(model).items()}
    A, B = (state[f"base_model.model.0.lora_{of}.weight"] for of in "AB")
    want = X @ (layer.weight.detach() + layer.scaling["default"] * B @ A).T
    shard(model)
    model(X)
    peftkern.set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_number(model(X), want)
