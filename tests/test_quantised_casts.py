"""A cast of the whole model: right numbers, an error of its owner, or one clear error of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases.fp8_numbers import is_cast
from peftkern.tuners.preparing import cast_mixed_precision_params
from tests.quantised_models import quanto
from tests.quantised_zoo import LAYERS

DTYPES = {"bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32}
# its bits or numbers are of a floating-point dtype, which torch casts like any weight
LOST = {
    "bitsandbytes NF4 in bf16": ("half", "float"),
    "transformers fp8": ("bfloat16", "half", "float"),
    "transformers fp8, one scale": ("bfloat16", "half", "float"),
    "compressed-tensors FP8": ("bfloat16", "half", "float"),
}


def adapted(name: str, bias: bool = True) -> Any:
    torch.manual_seed(0)
    if name.startswith("quanto"):
        quanto()
    layer = LAYERS[name](nn.Linear(64, 32, bias).requires_grad_(False))
    config = peftkern.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return peftkern.get_peft_model(nn.Sequential(layer), config).eval()


@torch.no_grad()
def outputs(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    y: Tensor = model(x.to(dtype))
    return y.float()


@pytest.mark.parametrize("name", LAYERS)
def test_a_cast_gives_no_wrong_numbers(name: str) -> None:
    for how, dtype in DTYPES.items():
        model = adapted(name)
        before = outputs(model)
        if how in LOST.get(name, ()):
            getattr(model, how)()
            with pytest.raises(ValueError, match="cannot be called: its .* (cast|not quantised)"):
                outputs(model, dtype)
            with model.disable_adapter(), pytest.raises(ValueError, match="cannot be called"):
                outputs(model, dtype)
            with pytest.raises(ValueError, match="Cannot merge adapters into"):
                model.merge_adapter()
            continue
        try:
            getattr(model, how)()
            after = outputs(model, dtype)
        except (ValueError, RuntimeError) as error:
            # the owner's own refusals: quanto's of any cast, torchao's of the call
            assert "cannot be changed" in str(error) or "X too" in name, error
            continue
        assert (after - before).norm() < 0.02 * before.norm()


def test_a_dense_weight_is_not_taken_for_a_cast_one() -> None:
    numbers = torch.randn(48, 64)
    fp8 = (numbers * 100).to(torch.float8_e4m3fn)
    for dtype in DTYPES.values():
        assert is_cast(fp8.to(dtype)) and not is_cast(numbers.to(dtype))
    assert not is_cast(torch.zeros(8, 8))


@pytest.mark.parametrize("name", LAYERS)
def test_casts_for_training_leave_packed_weights_alone(name: str) -> None:
    """`prepare_model_for_kbit_training` and the cast for automatic mixed precision."""
    model = adapted(name, bias=False)
    before = outputs(model)
    cast_mixed_precision_params(model, torch.bfloat16)
    assert torch.equal(outputs(model), before)
    peftkern.prepare_model_for_kbit_training(model)
    assert torch.equal(outputs(model), before)
    assert not any(p.requires_grad for p in model.parameters())
