"""Tests only for BD-LoRA, against HF PEFT: blocks, combination, names, refusals."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.variants import BlockDiagonalLinear as Theirs

import peftkern
from peftkern.tuners.lora.variant_registry import BlockDiagonalLinear
from tests.closeness import assert_same_number
from tests.tiny import fill, first, make
from tests.variants import CASES, models

IDS = torch.arange(3, 17).view(2, 7)
CASE = CASES["bdlora"]
BLOCKS = CASE.settings["use_bdlora"]


def test_blocks():
    torch.manual_seed(0)
    for shape in ((3, 12), (2, 5, 12), (12,)):
        layer = BlockDiagonalLinear(12, 8, 4).double()
        other = Theirs(12, 8, 4).double()
        other.load_state_dict(layer.state_dict())
        x = torch.randn(shape, dtype=torch.float64)
        M = layer.weight_as_blockdiagonal_matrix()
        assert torch.equal(M, other.weight_as_blockdiagonal_matrix())
        assert_same_number(layer(x), x @ M.T)


def test_conv1d_stores_its_weight_the_other_way():
    config = peftkern.LoraConfig(
        r=4,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        use_bdlora=peftkern.BdLoraConfig(target_modules_bd_a=["c_attn"], nblocks=2),
    )
    model = peftkern.get_peft_model(make("gpt2", dtype=torch.float64), config)
    fill(model)
    want = first(model.eval()(input_ids=IDS))
    model.merge_adapter()
    assert_same_number(first(model(input_ids=IDS)), want)


def test_conversion():
    ours, _ = models(CASE)
    fill(ours)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = peftkern.convert_to_lora(ours, 4)
    plain = peftkern.get_peft_model(make("llama", dtype=torch.float64), config)
    peftkern.set_peft_model_state_dict(plain, tensors)
    with torch.no_grad():
        want = first(ours.eval()(input_ids=IDS))
        assert_same_number(first(plain.eval()(input_ids=IDS)), want)


@pytest.mark.parametrize("kind", ["linear", "ties", "svd", "cat"])
def test_weighted_sums(kind):
    outputs = []
    for model, library in zip(models(CASE), (peftkern, peft), strict=True):
        for name, nblocks in (("b", 2), ("other", 1)):
            blocks = {**BLOCKS, "nblocks": nblocks}
            targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
            config = library.LoraConfig(r=4, target_modules=targets, use_bdlora=blocks)
            model.add_adapter(name, config)
        fill(model)
        call = {"combination_type": kind, "density": 0.5, "adapter_name": "sum"}
        if library is peftkern:
            with pytest.raises(ValueError, match="BD-LoRA"):
                model.add_weighted_adapter(["default", "other"], [0.5, 0.7], **call)
            if kind in ("svd", "cat"):  # HF PEFT fails, or joins blocks that do not belong together
                with pytest.raises(ValueError, match="allowed: linear, ties"):
                    model.add_weighted_adapter(["default", "b"], [0.5, 0.7], **call)
                return
        model.add_weighted_adapter(["default", "b"], [0.5, 0.7], **call)
        model.set_adapter("sum")
        outputs.append(first(model.eval()(input_ids=IDS)))
    assert_same_number(*outputs)


def test_explain():
    ours, _ = models(CASE)
    reasons = {row.name.rsplit(".", 1)[-1]: row for row in peftkern.explain(ours)}
    assert "lora_A is block-diagonal" in reasons["o_proj"].reason
    assert "lora_B is block-diagonal" in reasons["q_proj"].reason
    assert reasons["v_proj"].fused


@pytest.mark.parametrize(
    "blocks, said",
    [
        ({"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]}, "matches both"),
        ({"target_modules_bd_a": ["q_proj"]}, "matches neither A nor B"),
        ({"target_modules_bd_a": ["proj"], "nblocks": 3}, "not divisible by 3"),
        ({"target_modules_bd_b": ["proj"], "nblocks": 8}, "not divisible by 8"),
    ],
)
def test_refusals_leave_the_model(blocks, said):
    for library in (peftkern, peft):
        model = make("llama")
        names = [name for name, _ in model.named_modules()]
        config = library.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_bdlora=blocks)
        with pytest.raises(ValueError, match=said):
            library.get_peft_model(model, config)
        if library is peftkern:
            assert [name for name, _ in model.named_modules()] == names
            assert all(p.requires_grad for p in model.parameters())


def test_bad_blocks():
    for make_config in (
        lambda: peftkern.BdLoraConfig(["a"], ["a", "b"]),
        lambda: peft.LoraConfig(
            use_bdlora={"target_modules_bd_a": ["a"], "target_modules_bd_b": ["a"]}
        ),
    ):
        with pytest.raises(ValueError, match="Found overlapping modules"):
            make_config()
    with pytest.raises(ValueError, match="`nblocks` must be at least 1"):
        peftkern.BdLoraConfig(nblocks=0)


def test_layer_classes_of_users_and_no_bias_beside_blocks():
    """A layer class that a user registers is given the layer's name, and a B of blocks has no bias.

    So merging, which HF PEFT refuses, has no bias to add.
    """

    class Mine(peftkern.tuners.lora.Linear):
        pass

    config = peftkern.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_bias=True, use_bdlora=BLOCKS
    )
    config._register_custom_module({torch.nn.Linear: Mine})
    base = make("llama", dtype=torch.float64)
    for layer in base.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            linear.bias = torch.nn.Parameter(linear.weight.detach()[:, 0].clone())
    model = peftkern.get_peft_model(base, config)
    fill(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is Mine and type(layer.lora_B["default"]) is BlockDiagonalLinear
    want = first(model.eval()(input_ids=IDS))
    model.merge_adapter()
    assert_same_number(first(model(input_ids=IDS)), want)
