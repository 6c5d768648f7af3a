"""HQQ's layers: every packing read as their owner reads it, trained beside HF PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import as_weight, read
from tests.quantised_models import adapted, assert_steps_are_equal, llama

quantize: Any = pytest.importorskip("hqq.core.quantize")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def hqq(
    linear: nn.Linear,
    nbits: float = 4,
    group_size: int | None = 32,
    axis: int = 1,
    compute_dtype: torch.dtype = torch.float32,
    quant_zero: bool = False,
    quant_scale: bool = False,
    view_as_float: bool = False,
) -> Any:
    """An ``HQQLinear`` of a linear layer's weight."""
    config = quantize.BaseQuantizeConfig(
        nbits=nbits, group_size=group_size, axis=axis, view_as_float=view_as_float
    )
    # HQQ's layer leaves these out now, but reads what older releases wrote
    small = dict(nbits=8, channel_wise=True, group_size=8, optimize=False)
    made = quantize.HQQLinear(
        None, {**config, "offload_meta": False}, compute_dtype=compute_dtype, device="cpu"
    )
    config.pop("offload_meta", None)
    if config["weight_quant_params"]["group_size"] is None:
        N, K = linear.weight.shape
        config["weight_quant_params"]["group_size"] = K if axis == 1 else N
    config["zero_quant_params"] = dict(small) if quant_zero else None
    config["scale_quant_params"] = dict(small) if quant_scale else None
    made.quantize(linear.weight.detach().clone(), **config)
    if linear.bias is not None:
        made.bias = linear.bias.detach().clone().to(compute_dtype)
    return made


def weight_of(layer: Any) -> Any:
    found = read(layer)
    assert not isinstance(found, str), found
    return found.packed


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1.58, 1])
def test_every_packing_is_read_as_its_owner_reads_it(nbits: float, axis: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for group in (16, None):
            layer = hqq(nn.Linear(64, 48), nbits, group, axis, dtype)
            packed = weight_of(layer)
            assert packed.shape == (48, 64) and packed.format == f"{nbits} bit (HQQ)"
            assert torch.equal(packed.dense(dtype), layer.dequantize())
    x = torch.randn(5, 64)
    assert torch.equal(as_weight(packed, x).t().product(x) + layer.bias, layer(x))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_quantised_statistics_and_float_views(zero: bool, scale: bool) -> None:
    how: dict[str, Any] = dict(quant_zero=zero, quant_scale=scale, view_as_float=True)
    layer = hqq(nn.Linear(64, 48), compute_dtype=torch.float16, **how)
    assert layer.W_q.dtype == torch.float16
    packed = weight_of(layer)
    assert torch.equal(packed.dense(torch.float16), layer.dequantize())
    assert (zero, scale) == ("zero_q" in layer.meta, "scale_q" in layer.meta)
    if zero == scale:  # statistics that are kept on the CPU lie in one tensor
        names = ("zero_q", "scale_q") if zero else ("zero", "scale")
        layer.meta["zero_scale"] = torch.stack([layer.meta.pop(n) for n in names])
        expected = layer.dequantize()
        assert "zero_scale" in layer.meta and not set(names) & set(layer.meta)
        assert torch.equal(weight_of(layer).dense(torch.float16), expected)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_a_training_step_equals_hf_pefts(settings: dict[str, Any]) -> None:
    models = adapted(llama(hqq), target_modules=TARGETS, **settings)
    rows = peftkern.explain(models[0])
    assert len(rows) == 14 and all(row.fused for row in rows), rows
    assert "4 bit (HQQ)" in rows[0].reason or settings.get("use_dora")
    assert_steps_are_equal(*models, settings)
    assert all(p.dtype == torch.float32 for p in models[0].parameters() if p.requires_grad)


def test_the_same_seed_gives_hf_pefts_adapters_and_targets() -> None:
    base = llama(hqq)
    for targets in (TARGETS, "all-linear"):
        given: Any = dict(r=2, target_modules=targets, init_lora_weights=False)
        found = []
        for module in (peft, peftkern):
            torch.manual_seed(1)
            try:
                model = module.get_peft_model(base, module.LoraConfig(**given))
            except ValueError:
                found.append({})
            else:
                found.append({k: v for k, v in model.state_dict().items() if "lora_" in k})
                model.unload()
        # HF PEFT counts only nn.Linear and Conv1D to "all-linear", and here that is the head alone
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
        assert bool(found[0]) == (targets == TARGETS)


def test_merging_quantises_with_hqq_and_puts_the_bits_back() -> None:
    layer = hqq(nn.Linear(64, 48))
    held, meta, before = layer.W_q, layer.meta, layer.W_q.data.clone()
    wanted = weight_of(layer).dense(torch.float32) + 0.1 * torch.randn(48, 64)
    state, error = repack.write(layer, wanted)
    assert 0 < error < 0.2 and not torch.equal(layer.W_q, before)
    assert torch.equal(weight_of(layer).dense(torch.float32), layer.dequantize())
    state.put(layer)
    assert layer.W_q is held and layer.meta is meta and torch.equal(held.data, before)


def test_a_backend_that_quantises_x_leaves_the_weight_readable() -> None:
    class Int8(quantize.HQQLinear):  # what HQQ's set_backend makes of its own class
        forward = quantize.HQQLinear.forward_aten_int8

    layer = hqq(nn.Linear(64, 48))
    layer.__class__ = Int8
    W = layer.dequantize()
    config: Any = dict(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(nn.Sequential(layer), peftkern.LoraConfig(**config))
    [row] = peftkern.explain(model)
    assert not row.fused and "its backend quantises the activations too" in row.reason
    want = W + model.base_model.model[0].get_delta_weight("default")
    dense = model.merge_and_unload(dequantize=True)
    torch.testing.assert_close(dense[0].weight, want)


def test_layers_that_are_not_read_are_called_or_refused() -> None:
    layer = hqq(nn.Linear(64, 48))
    layer.meta["packing"] = "5bit_u8"
    assert "packed its weight as '5bit_u8', of unknown format" in str(read(layer))
    layer = hqq(nn.Linear(64, 48))
    del layer.meta["scale"]
    assert "no scales" in str(read(layer))
    layer = hqq(nn.Linear(64, 48))
    layer.W_q = nn.Parameter(layer.W_q.to("meta"), requires_grad=False)
    assert "on the meta device" in str(read(layer))
    for name in ("scale", "zero"):
        layer = hqq(nn.Linear(64, 48))
        layer.meta[name] = layer.meta[name].to("meta")
        assert "statistics are on the meta device" in str(read(layer))
    for axis in (0, 1):  # one row would broadcast over all groups
        for name in ("scale", "zero"):
            layer = hqq(nn.Linear(64, 48), axis=axis)
            layer.meta[name] = layer.meta[name].reshape(-1)[:1]
            assert f"48 x 64 weight in groups of 32 has 1 {name}s, and 96 belong" in str(
                read(layer)
            )
    empty = quantize.HQQLinear(None, {"offload_meta": False}, device="cpu", initialize=False)
    assert "no weight yet" in str(read(empty))
    with pytest.raises(ValueError, match="HQQLinear has no `in_features` and no weight"):
        peftkern.get_peft_model(nn.Sequential(empty), peftkern.LoraConfig(target_modules=["0"]))


def test_fan_in_fan_out_is_for_conv1d() -> None:
    config = peftkern.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model: Any = peftkern.get_peft_model(nn.Sequential(hqq(nn.Linear(64, 48))), config)
    assert any("Setting fan_in_fan_out to False" in str(w.message) for w in said)
    assert model.base_model.model[0].get_delta_weight("default").shape == (48, 64)
