"""Each format that can be quantised again: merging, unmerging bit for bit, and a dense model.

A format adds a line to ``BUILD``: a function that makes its layer of a linear one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import read
from peftkern.ops.bases.fp8_linear import Fp8Linear
from tests.test_bases_fp8 import finegrained, torchao_layer

Build = Callable[[nn.Linear], Any]
BUILD: dict[str, Build] = {
    "fp8, ours": Fp8Linear,
    "fp8, transformers": lambda m: finegrained(m, (32, 16)),
    "fp8, transformers, one scale": lambda m: finegrained(m, None),
    "fp8, transformers, e8m0": lambda m: finegrained(m, (16, 16), "ue8m0"),
    "fp8, torchao, rows": lambda m: torchao_layer(m, "row"),
    "fp8, torchao, one scale": lambda m: torchao_layer(m, "tensor"),
}


class Model(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = build(nn.Linear(64, 96))
        self.second = build(nn.Linear(96, 32, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def adapted(build: Build) -> Any:
    torch.manual_seed(1)
    config = peftkern.LoraConfig(
        r=4, target_modules=["first", "second"], init_lora_weights=False, lora_alpha=2
    )
    return peftkern.get_peft_model(Model(build), config).eval()


def held(model: Any) -> list[Tensor]:
    """The packed tensors of both layers, as bytes."""
    found = []
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name).get_base_layer()
        packed = read(layer)
        assert not isinstance(packed, str), packed
        found += [t.detach().clone().contiguous() for t in packed.packed.tensors]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        if x.dim()
        else torch.equal(x.reshape(1).view(torch.uint8), y.reshape(1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_a_merged_weight_is_as_near_as_the_format_allows(build: Build) -> None:
    model, x = adapted(build), torch.randn(5, 64)
    before, packed = model(x), held(model)
    layer = model.base_model.model.first
    W = repack.dense_value(layer.base_layer)
    want = W + layer.get_delta_weight("default")
    # what its owner makes of the sum from the start
    with torch.no_grad():
        fresh = nn.Linear(64, 96)
        fresh.weight.copy_(want)
    owners = repack.dense_value(build(fresh))
    with pytest.warns(peftkern.PeftWarning, match="into 2 quantised weights"):
        model.merge_adapter(safe_merge=True)
    merged = repack.dense_value(layer.base_layer)
    # both round to the nearest number of the format; scales may differ in their last bit
    step = (owners - want).abs().max()
    assert (merged - want).abs().max() <= 1.01 * step
    assert layer.merge_error == pytest.approx(((merged - want).norm() / want.norm()).item(), 1e-3)
    assert not same(held(model), packed)
    assert (model(x) - before).norm() < 0.5 * before.norm()
    model.unmerge_adapter()
    assert same(held(model), packed) and torch.equal(model(x), before)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_a_dense_model_has_the_sum(build: Build) -> None:
    model, x = adapted(build), torch.randn(5, 64)
    before = model(x)
    dense = model.merge_and_unload(dequantize=torch.float32)
    assert [type(m) for m in (dense.first, dense.second)] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(dense(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_what_a_format_cannot_hold_is_refused(build: Build) -> None:
    model = adapted(build)
    packed = held(model)
    with torch.no_grad():
        model.base_model.model.second.lora_B["default"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite|NaN"):
        model.merge_adapter()
    assert same(held(model), packed)
    assert model.base_model.model.first.merged_adapters == []


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_a_packed_weight_is_no_target_parameter(build: Build) -> None:
    model = Model(build)
    config = peftkern.LoraConfig(target_modules=[], target_parameters=["first.weight"])
    with pytest.raises(ValueError, match="first.weight.*quantised.*target_modules"):
        peftkern.get_peft_model(model, config)
    assert not hasattr(model.first, "base_layer")
