"""FSDP shards the packed bytes of a quantised base; every forward and backward reads them whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import peftkern
from peftkern.ops.bases.formats import read
from tests import quantised_models
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.ranks import NEEDS_GLOO, results

pytest.importorskip("bitsandbytes")
fsdp: Any = pytest.importorskip("tests.fsdp")

pytestmark = [
    NEEDS_GLOO,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """{case: numbers} of each process."""
    return results("tests.fsdp", tmp_path_factory.mktemp("fsdp"), fsdp.RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp.CASES)
def test_two_processes_are_as_one_with_dense_weights(name: str, found: Any) -> None:
    first, second = (of_rank[name] for of_rank in found)
    assert_same_number(first, fsdp.alone(fsdp.CASES[name]))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp.BESIDE)
def test_float32_is_as_good_as_hf_pefts(name: str, found: Any) -> None:
    exact = fsdp.alone(fsdp.BESIDE[name])
    for of_rank in found:
        assert_as_good_as_torch(of_rank[f"{name} peftkern"], of_rank[f"{name} peft"], exact)


def test_a_shard_is_no_weight(one_process: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    base = quantised_models.bnb4(nn.Linear(64, 48), quant_storage=torch.bfloat16)
    settings = peftkern.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = peftkern.get_peft_model(nn.Sequential(base), settings)
    want = model(x := torch.randn(3, 64))
    layer: Any = model.base_model.model[0]

    fully_shard(model, mesh=mesh)
    assert "its weights are shards between forwards" in peftkern.explain(model)[0].reason
    for call in (lambda: layer(x), layer.merge):
        with pytest.raises(ValueError, match="a Linear4bit.* that fully_shard was given"):
            call()
    assert torch.equal(model(x), want)  # the gathered weight, also when a call was refused


def test_a_base_layer_that_is_sharded_by_itself(one_process: None) -> None:
    base = quantised_models.bnb4(nn.Linear(64, 48), quant_storage=torch.bfloat16)
    want = base(x := torch.randn(3, 64, requires_grad=True))
    settings = peftkern.LoraConfig(target_modules=["0"])
    model = peftkern.get_peft_model(nn.Sequential(base), settings)
    fully_shard(base, mesh=init_device_mesh("cpu", (1,)))
    assert "a shard here (a DTensor)" in peftkern.explain(model)[0].reason
    assert peftkern.explain(model)[0].reason.endswith("in the forward of the layer itself")
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", ["prepare_model_for_kbit_training", "cast_mixed_precision_params"])
def test_casts_for_training_come_before_the_first_forward(one_process: None, name: str) -> None:
    """Later FSDP2 gathers from the memory that it has found, which a cast does not reach."""

    def cast(model: nn.Module) -> None:
        if name == "cast_mixed_precision_params":
            peftkern.utils.other.cast_mixed_precision_params(model, half)
        else:
            peftkern.prepare_model_for_kbit_training(model)

    half = torch.bfloat16
    mesh = init_device_mesh("cpu", (1,))
    dtype = torch.float32 if name == "cast_mixed_precision_params" else half
    for late in (False, True):
        base = quantised_models.bnb4(nn.Linear(64, 48, dtype=dtype), quant_storage=half)
        model = fully_shard(nn.Sequential(base, nn.Linear(48, 48, dtype=dtype)), mesh=mesh)
        x = torch.randn(3, 64, dtype=dtype)
        model.requires_grad_(False)
        if late:
            model(x)
            before = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
            with pytest.raises(ValueError, match=f"{name}: FSDP2 .* before the first forward"):
                cast(model)
            assert before == [(p, p.dtype, p.requires_grad) for p in model.parameters()]
        else:
            cast(model)
            wanted = torch.float32 if dtype == half else half
            assert model[1].weight.dtype == wanted == model(x.to(wanted)).dtype


def test_a_weight_and_bias_that_fsdp1_keeps_as_attributes(one_process: None) -> None:
    base = quantised_models.bnb4(nn.Linear(64, 48), quant_storage=torch.float32)
    want, bias = base.weight.detach().clone(), base.bias.detach().clone()
    base.requires_grad_(False)
    with pytest.warns(UserWarning, match="NO_SHARD"):  # one process has no shards
        whole = FullyShardedDataParallel(base, use_orig_params=False, device_id=torch.device("cpu"))
    held: list[Any] = []
    base.register_forward_pre_hook(lambda m, _: held.append(("weight" in m._parameters, read(m))))
    whole(torch.randn(3, 64, requires_grad=True))
    [(registered, found)] = held
    assert not registered  # its own forward then makes the attribute a parameter
    assert torch.equal(found.packed.bits, want) and torch.equal(found.bias, bias)
