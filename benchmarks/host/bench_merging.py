"""Merging and unmerging one LoRA linear, in peftkern and in HF PEFT.

peftkern restores the base weight bit for bit, HF PEFT up to rounding; the rows show the cost of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from .llama import LIBRARIES
from .measure import OURS, PEFT, Work

RANK, K = 16, 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("back", [False, True], ids=["merge", "merge and unmerge"])
def test_merge(compare: Callable[..., Any], dtype: torch.dtype, back: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, K, bias=False)).requires_grad_(False).to(dtype)
    layers: dict[str, Any] = {}
    for name, library in LIBRARIES.items():
        torch.manual_seed(1)
        config = library.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
        layers[name] = library.get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    layers[OURS].load_state_dict(layers[PEFT].state_dict())
    before = layers[OURS].base_layer.weight.clone()
    for layer in layers.values():
        layer.merge()
    one_rounding = 2**-7 if dtype is torch.bfloat16 else 1e-6
    ours, theirs = (layers[n].base_layer.weight.float() for n in (OURS, PEFT))
    torch.testing.assert_close(ours, theirs, rtol=one_rounding, atol=one_rounding)
    for layer in layers.values():
        layer.unmerge()
    assert torch.equal(layers[OURS].base_layer.weight, before)

    def there_and_back(layer: Any) -> None:
        layer.merge()
        if back:
            layer.unmerge()

    def forget(layer: Any) -> None:
        if not back:
            layer.unmerge()

    compare(
        f"merge{' and unmerge' if back else ''}, {K}x{K}, {str(dtype).removeprefix('torch.')}",
        {
            name: Work(partial(there_and_back, layer), cleanup=lambda _, layer=layer: forget(layer))
            for name, layer in layers.items()
        },
    )
