"""Merging and unmerging one LoRA linear and whole models, in peftkern and in HF PEFT.

peftkern restores the base weight bit for bit, HF PEFT up to rounding; the rows show the cost of it.
The update is 1% of the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from .llama import LIBRARIES, LINEARS, MEDIUM, SMALL, Shape, build
from .measure import OURS, PEFT, Work

RANK = 16
DTYPES = [torch.bfloat16, torch.float32]
# (name, whether unmerging is timed too, keywords of peftkern's merge)
CASES = [
    ("merge", False, {}),
    ("merge and unmerge", True, {}),
    ("merge, keeping nothing", False, {"exact": False}),
]


def adapted(base: nn.Module, targets: Any) -> dict[str, Any]:
    """{library: its model}, of copies of ``base`` with equal adapters of 1% of the weights."""
    models: dict[str, Any] = {}
    for name, library in LIBRARIES.items():
        config = library.LoraConfig(r=RANK, target_modules=targets)
        models[name] = library.get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in linears(models[name]):
                weight, A = layer.base_layer.weight, layer.lora_A["default"].weight
                A.copy_(torch.randn_like(A))
                B = torch.randn_like(layer.lora_B["default"].weight.float()).double()
                B *= 0.01 * weight.double().norm() / (B @ A.double()).norm()
                layer.lora_B["default"].weight.copy_(B)
    return models


def linears(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def check(models: dict[str, Any], dtype: torch.dtype) -> None:
    """Both libraries merge the same, and peftkern's weights come back bit for bit."""
    ours, theirs = (linears(models[name]) for name in (OURS, PEFT))
    before = [layer.base_layer.weight.clone() for layer in ours]
    for layer in ours + theirs:
        layer.merge()
    one_rounding = 2**-7 if dtype is torch.bfloat16 else 1e-6
    floor = 1e-4 if dtype is torch.bfloat16 else 1e-8  # weights are about 0.01
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            mine.base_layer.weight.float(), other.base_layer.weight.float(),
            rtol=one_rounding, atol=floor,
        )  # fmt: skip
    for layer in ours + theirs:
        layer.unmerge()
    for layer, weight in zip(ours, before, strict=True):
        assert torch.equal(layer.base_layer.weight, weight)


def works(
    models: dict[str, Any], merge: str, unmerge: str, back: bool, keywords: dict[str, Any]
) -> dict[str, Work]:
    """The work of each library: its methods of these names."""

    def there_and_back(model: Any, keywords: dict[str, Any]) -> None:
        getattr(model, merge)(**keywords)
        if back:
            getattr(model, unmerge)()

    def forget(model: Any) -> None:
        if not back:
            getattr(model, unmerge)()

    return {
        name: Work(
            partial(there_and_back, model, keywords if name == OURS else {}),
            cleanup=lambda _, model=model: forget(model),
        )
        for name, model in models.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2048, 4096])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_merge(compare: Callable[..., Any], dtype: torch.dtype, size: int, case: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size, bias=False)).requires_grad_(False).to(dtype)
    models = {name: model.base_model.model[0] for name, model in adapted(base, ["0"]).items()}
    check(models, dtype)
    name, back, keywords = case
    compare(
        f"{name}, {size}x{size}, {str(dtype).removeprefix('torch.')}",
        works(models, "merge", "unmerge", back, keywords),
        target=1.5 if not back else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_merge_model(
    compare: Callable[..., Any], dtype: torch.dtype, shape: Shape, case: Any
) -> None:
    models = adapted(build(shape).to(dtype), LINEARS)
    check(models, dtype)
    name, back, keywords = case
    compare(
        f"{name}, {shape}, {str(dtype).removeprefix('torch.')}",
        works(models, "merge_adapter", "unmerge_adapter", back, keywords),
        target=1.5 if not back else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
def test_merge_and_unload(compare: Callable[..., Any], dtype: torch.dtype, shape: Shape) -> None:
    models = adapted(build(shape).to(dtype), LINEARS)
    compare(
        f"merge_and_unload, {shape}, {str(dtype).removeprefix('torch.')}",
        {
            name: Work(
                lambda copied: copied.merge_and_unload(),
                prepare=lambda model=model: (copy.deepcopy(model),),
            )
            for name, model in models.items()
        },
        target=1.0,
    )
