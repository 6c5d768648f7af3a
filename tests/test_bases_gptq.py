"""GPTQ and AWQ: each layout read bit for bit, trained beside HF PEFT's layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops.bases.formats import as_weight, read
from peftkern.tuners.lora.layer_classes import layer_class
from tests.closeness import assert_as_good_as_torch
from tests.packed_layers import Awq, AwqLayer, Gptq, GptqLayer, GptqModel, packed, under
from tests.quantised_models import assert_steps_are_equal, dense, llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def weight_of(layer: Any) -> Any:
    found = read(layer)
    assert not isinstance(found, str), found
    return found.packed


def test_the_tests_own_packing() -> None:
    assert packed(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321 - 2**32]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
def test_every_gptq_layout_is_read_bit_for_bit(bits: int, order: bool) -> None:
    for kind, first in ((Gptq, 1), (GptqModel, 1), (GptqModel, 0)):
        layer = kind(nn.Linear(96, 64), bits, 32, order, first)
        weight = weight_of(layer)
        assert weight.shape == (64, 96) and weight.format == f"{bits} bit (GPTQ)"
        assert torch.equal(weight.dense(torch.float16), layer.dense)
        assert weight.dense(torch.float32).is_contiguous()
    # in float64: a product with a turned view need not round as one with its copy does
    x = torch.randn(5, 96, dtype=torch.float64)
    wide = layer.dense.double()
    torch.testing.assert_close(as_weight(weight, x).t().product(x), x @ wide.T)
    dy, dx = torch.randn(5, 64).double(), torch.randn(5, 96).double()
    torch.testing.assert_close(as_weight(weight, x).product(dy, dx.clone()), dx + dy @ wide)


def test_the_awq_layout_is_read_bit_for_bit() -> None:
    layer = Awq(nn.Linear(96, 64))
    weight = weight_of(layer)
    assert weight.shape == (64, 96) and weight.format == "4 bit (AWQ)"
    assert torch.equal(weight.dense(torch.float16), layer.dense)
    x = torch.randn(5, 96)
    bare = Awq(nn.Linear(96, 64, bias=False))
    product = as_weight(weight_of(bare), x).t().product(x)  # in float16, as the owner's
    exact = x.double() @ bare.dense.double().t()
    assert_as_good_as_torch(product, bare(x), exact)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("kind", [Gptq, GptqModel, Awq], ids=["auto_gptq", "gptqmodel", "awq"])
def test_a_training_step_is_that_of_the_base_layer_and_an_update(
    kind: Any, settings: dict[str, Any]
) -> None:
    """The oracle is the model without formats: HF PEFT's formula on the layers' own forward."""
    base = llama(kind)
    more: Any = dict(r=4, target_modules=TARGETS, init_lora_weights=False, **settings)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    rows = peftkern.explain(ours)
    assert len(rows) == 14 and all(row.fused for row in rows), rows
    theirs = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    exact: Any = peftkern.get_peft_model(dense(base), peftkern.LoraConfig(**more)).double()
    held = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    for model in (theirs, exact):
        assert not model.load_state_dict(held, strict=False).unexpected_keys
    for module in theirs.modules():  # a hook, and the layer is called
        if isinstance(module, GptqLayer | AwqLayer):
            module.register_forward_hook(lambda *_: None)
    assert settings.get("use_dora") or not any(row.fused for row in peftkern.explain(theirs))
    close = dict(rtol=0.1, atol=2e-3) if kind is Awq else {}
    assert_steps_are_equal(ours, theirs, exact, settings, **close)
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


def test_gptq_equals_hf_pefts_layer() -> None:
    theirs: Any = pytest.importorskip("peft.tuners.lora.gptq")
    from peft import LoraConfig

    base = Gptq(nn.Linear(96, 64), order=True)
    config: Any = dict(r=4, target_modules=["0"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(
        nn.Sequential(copy.deepcopy(base)), peftkern.LoraConfig(**config)
    )
    layer = theirs.GPTQLoraLinear(base, "default", LoraConfig(**config), r=4, lora_alpha=8)
    ours = model.base_model.model[0]
    held = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    assert not layer.load_state_dict(held, strict=False).unexpected_keys
    x = torch.randn(7, 96)
    wide = base.dense.double()
    delta = ours.get_delta_weight("default").detach().double()
    exact = x.double() @ (wide + delta).T + base.bias.double()
    assert_as_good_as_torch(model(x).detach(), layer(x).detach(), exact.detach())


LAYOUTS = [
    ("MarlinLinear", ("BaseQuantLinear",), "gptqmodel", "packs its weight anew"),
    ("AwqGEMVLinear", ("AWQuantLinear", "BaseQuantLinear"), "gptqmodel", "in another layout"),
    ("ParoLinear", ("AWQuantLinear", "BaseQuantLinear"), "gptqmodel", "in another layout"),
    ("WQLinear_Marlin", (), "awq", "in another layout"),
    ("EetqLinear", (), "eetq", "computes its product itself"),
    ("QuantizedLinear", (), "aqlm", "computes its product itself"),
    ("PatchedLinear", (), "neural_compressor", "computes its product itself"),
]


@pytest.mark.parametrize("name, parents, library, said", LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_layers_that_are_not_read_are_called(
    name: str, parents: tuple[str, ...], library: str, said: str
) -> None:
    layer = under(GptqLayer, name, *parents, library=library)(nn.Linear(96, 64))
    config: Any = dict(r=4, target_modules=["0"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(nn.Sequential(layer), peftkern.LoraConfig(**config))
    [row] = peftkern.explain(model)
    assert not row.fused and said in row.reason
    x = torch.randn(3, 96)
    delta = model.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(model(x), layer(x) + x @ delta.T)
    model(x).sum().backward()
    with pytest.raises(ValueError, match="Cannot merge"):
        model.merge_adapter()


def test_weights_that_cannot_be_right_are_named() -> None:
    layer = Gptq(nn.Linear(96, 64))
    layer.qzeros = layer.qzeros[:2]
    assert "does not fit its statistics: (12, 64), (2, 8), (3, 64), (96,)" in str(read(layer))
    layer = Gptq(nn.Linear(96, 64))
    layer.scales = None
    assert "its statistics are missing" in str(read(layer))
    layer = GptqModel(nn.Linear(96, 64))
    layer.bits = 5
    assert "5 bit weight is packed in planes" in str(read(layer))
    layer.bits, layer.adapter = 4, object()
    assert "`adapter` computes more" in str(read(layer))
    layer = under(GptqLayer, "QuantLinear", library="auto_gptq")(nn.Linear(96, 64))
    layer.QUANT_TYPE = "marlin"
    assert "of kind 'marlin' packs its weight anew" in str(read(layer))
    for made in (Awq(nn.Linear(96, 64)), Gptq(nn.Linear(96, 64))):
        assert "on the meta device" in str(read(made.to("meta")))
    awq = Awq(nn.Linear(96, 64))
    awq.group_size = 16
    assert "does not fit its statistics" in str(read(awq))
    awq.w_bit = 3
    assert "has 3 bit; 2, 4 and 8 are read" in str(read(awq))


def test_other_layers_stay_refused() -> None:
    with pytest.raises(ValueError, match="is not supported"):
        layer_class(under(GptqLayer, "QuantLinear", library="elsewhere")(nn.Linear(32, 32)))
    table = under(GptqLayer, "QuantEmbeddings", "BaseQuantLinear", library="gptqmodel")
    with pytest.raises(ValueError, match="is not supported"):
        layer_class(table(nn.Linear(32, 32)))
