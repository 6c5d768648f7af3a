"""Bad input on every quantised format: one clear error, and nothing half-merged."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import numbers
from tests.quantised_models import llama, quanto
from tests.quantised_zoo import LAYERS

X = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    if name.startswith("quanto"):
        quanto()
    layer = LAYERS[name](nn.Linear(64, 32).requires_grad_(False))
    config = peftkern.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return peftkern.get_peft_model(nn.Sequential(layer), config).train()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    y: Tensor = model(X)
    return y


@pytest.mark.parametrize("name", LAYERS)
def test_what_overflows_is_refused_and_nothing_is_half_merged(name: str) -> None:
    model = adapted(name)
    layer, before = model.base_model.model[0], outputs(model)
    base, B = layer.get_base_layer(), layer.lora_B["default"].weight
    kept = B.detach().clone()
    if repack.why_not(base) is not None:
        with pytest.raises(ValueError, match="Cannot merge adapters into .*dequantize=True"):
            model.merge_adapter()
        return
    for large in (float("inf"), 1e37, 1e6):
        with torch.no_grad():
            B.fill_(large)
        want = repack.dense_value(base) + layer.get_delta_weight("default")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.merge_adapter()
            except ValueError as error:
                assert "Cannot merge adapters" in str(error)
                assert layer.merged_adapters == []
            else:  # the format has numbers of that size
                assert large < float("inf") and layer.merge_error < 0.2
                assert (repack.dense_value(base) - want).norm() < 0.2 * want.norm()
                model.unmerge_adapter()
        with torch.no_grad():
            B.copy_(kept)
        assert torch.equal(outputs(model), before), large


# torch itself moves no parameters of bitsandbytes to meta, and HQQ's layer does not move by `to`;
# test_bases_bnb4_bad.py and test_bases_hqq.py have those
@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith(("bitsandbytes", "HQQ"))])
def test_a_base_on_meta_is_named(name: str) -> None:
    model = adapted(name)
    base = model.base_model.model[0].get_base_layer()
    base.to("meta")
    found = numbers(base)
    assert isinstance(found, str) and "meta" in found
    [row] = peftkern.explain(model)
    assert not row.fused and "meta" in row.reason
    for merge in (model.merge_adapter, lambda: model.merge_and_unload(dequantize=True)):
        with pytest.raises(ValueError, match="meta"):
            merge()


STATISTICS = {
    "bitsandbytes NF4": ("weight.quant_state.absmax",),
    "bitsandbytes NF4 in bf16": ("weight.quant_state.absmax",),
    "peftkern fp8": ("weight_scale_inv",),
    "transformers fp8": ("weight_scale_inv",),
    "transformers fp8, one scale": ("weight_scale_inv",),
    "compressed-tensors W8A8": ("weight_scale",),
    "compressed-tensors W4A16": ("weight_scale",),
    "compressed-tensors FP8": ("weight_scale",),
    "compressed-tensors NVFP4": ("weight_scale",),
    "GPTQ": ("scales", "qzeros", "g_idx"),
    "AWQ": ("scales", "qzeros"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_missing_statistics_are_named(name: str) -> None:
    for path in STATISTICS[name]:
        model = adapted(name)
        base = model.base_model.model[0].get_base_layer()
        holder: Any = base
        *parents, last = path.split(".")
        for part in parents:
            holder = getattr(holder, part)
        setattr(holder, last, None)
        if hasattr(base, "quant_state"):
            base.quant_state = base.weight.quant_state
        found = numbers(base)
        assert isinstance(found, str) and ("scales" in found or "statistics" in found)
        with pytest.raises(ValueError, match="scales|statistics"):
            model.merge_and_unload(dequantize=True)


@pytest.mark.parametrize("name", LAYERS)
def test_explain_shows_every_layer_fused_or_the_reason(name: str) -> None:
    if name.startswith("quanto"):
        quanto()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peftkern.LoraConfig(r=2, target_modules=targets)
    rows = peftkern.explain(peftkern.get_peft_model(llama(LAYERS[name]), config))
    assert len(rows) == 14
    for row in rows:
        if "X too" in name:
            assert not row.fused and "asks for quantised activations" in row.reason
        else:
            assert row.fused and "base weight: " in row.reason, row
