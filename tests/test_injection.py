"""Injection succeeds or changes nothing, and a model that was wrapped before keeps its adapters."""

import copy

import peft
import pytest
import torch
from torch import nn

import peftkern
from tests.closeness import assert_same_number


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(torch.relu(self.lin(self.emb(ids))))


def snapshot(model):
    return (
        [(n, type(m)) for n, m in model.named_modules()],
        [(n, p.requires_grad) for n, p in model.named_parameters()],
    )


@pytest.mark.parametrize("second", [False, True])
def test_a_failure_halfway_leaves_nothing_behind(second, monkeypatch):
    from peftkern.tuners.lora.linear import Linear

    model = Net()
    wrapped = None
    if second:
        wrapped = peftkern.get_peft_model(model, peftkern.LoraConfig(target_modules=["lin"]))
    before = snapshot(model)
    real = Linear.update_layer

    def fail(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.out_features == 2:
            raise MemoryError("no room")

    monkeypatch.setattr(Linear, "update_layer", fail)
    config = peftkern.LoraConfig(target_modules=["lin", "emb", "head"])
    with pytest.raises(MemoryError):
        if second:
            wrapped.add_adapter("b", config)
        else:
            peftkern.get_peft_model(model, config)
    assert snapshot(model) == before
    if second:
        assert list(wrapped.peft_config) == ["default"]


def test_a_bias_for_an_embedding_is_refused_first():
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match="lora_bias=True .*`emb`"):
        peftkern.get_peft_model(
            model, peftkern.LoraConfig(target_modules=["lin", "emb"], lora_bias=True)
        )
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_second_wrapping_keeps_the_first_adapter():
    base, found = Net(), []
    for lib in (peftkern, peft):
        model = copy.deepcopy(base)
        first = lib.get_peft_model(model, lib.LoraConfig(target_modules=["lin"]), "one")
        with pytest.warns(UserWarning, match="second time"):
            config = lib.LoraConfig(target_modules=["lin"])
            again = lib.get_peft_model(first.base_model.model, config, "two")
        layer = again.base_model.model.lin
        again(torch.tensor([1])).sum().backward()
        trained = sorted(n for n, p in layer.named_parameters() if p.grad is not None)
        found.append((sorted(again.peft_config), list(layer.active_adapters), trained))
    assert found[0] == found[1]
    assert found[0][1] == ["two"]


def test_all_linear_on_a_second_adapter_names_the_layers_themselves():
    model = peftkern.get_peft_model(Net(), peftkern.LoraConfig(target_modules=["lin"]))
    model.add_adapter("b", peftkern.LoraConfig(target_modules="all-linear"))
    assert model.peft_config["b"].target_modules == {"lin", "head"}


def test_unload_returns_what_was_trained():
    results = []
    for lib in (peftkern, peft):
        torch.manual_seed(0)
        config = lib.LoraConfig(target_modules=["lin"], modules_to_save=["head"])
        model = lib.get_peft_model(Net(), config)
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.fill_(7.0)
        plain = model.unload()
        results.append((type(plain.lin), type(plain.head), plain.head.weight.detach()))
    assert results[0][:2] == results[1][:2] == (nn.Linear, nn.Linear)
    assert torch.equal(results[0][2], results[1][2])


def test_a_wrong_shape_is_an_error():
    model = peftkern.get_peft_model(Net(), peftkern.LoraConfig(target_modules=["lin"]))
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.base_model.model.lin(torch.ones(2, 4))  # 8 numbers, but not 8 columns


def test_transforms_of_torch_func_take_the_plain_formula():
    model = peftkern.get_peft_model(
        Net().double(), peftkern.LoraConfig(target_modules=["lin"], init_lora_weights=False)
    )
    layer, x = model.base_model.model.lin, torch.randn(3, 8, dtype=torch.float64)
    assert_same_number(torch.func.vmap(layer)(x), layer(x))


def test_weights_put_in_place_are_on_the_base_layers_device(tmp_path):
    model = peftkern.get_peft_model(Net(), peftkern.LoraConfig(target_modules=["lin", "emb"]))
    model.save_pretrained(tmp_path)
    loaded = peftkern.PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="`state_dict` lacks .*lora_A"):
        model.save_pretrained(tmp_path / "x", state_dict={})
