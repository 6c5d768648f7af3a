"""One LoRA linear on a batch whose samples name different adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import peftkern

from .llama import LIBRARIES, equalise, share
from .measure import BARE, OURS, PEFT, Work, check_equal


def with_adapters(library: Any, base: nn.Module, ranks: list[int]) -> nn.Module:
    """``base`` with adapters a0, a1, ... of these ranks."""

    def config(r: int) -> Any:
        return library.LoraConfig(r=r, lora_alpha=16, target_modules=["0"])

    model: nn.Module = library.get_peft_model(share(base), config(ranks[0]), adapter_name="a0")
    for i, r in enumerate(ranks[1:], 1):
        model.add_adapter(f"a{i}", config(r))  # type: ignore[operator]
    return model.eval()


@pytest.mark.parametrize("tokens", [16, 1])
@pytest.mark.parametrize(
    ("count", "ranks"), [(16, [8]), (64, [8]), (64, [4, 8, 16, 32])], ids=["16", "64", "64-ranks"]
)
def test_mixed_batch(
    compare: Callable[..., Any], count: int, ranks: list[int], tokens: int
) -> None:
    size = 256
    of = [ranks[i % len(ranks)] for i in range(count)]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size, bias=False)).requires_grad_(False)
    models = {name: with_adapters(library, base, of) for name, library in LIBRARIES.items()}
    equalise(models[PEFT], models[OURS])
    layers: dict[str, Any] = {name: m.base_model.model[0] for name, m in models.items()}
    one = with_adapters(peftkern, base, [max(ranks)]).base_model.model[0]
    names = [f"a{7 * i % count}" for i in range(count)]
    ours = peftkern.AdapterNames(names)  # as the model's forward hands it to its layers
    x = torch.randn(count, tokens, size)
    works = {
        BARE: Work(partial(one, x)),
        PEFT: Work(partial(layers[PEFT], x, adapter_names=names)),
        OURS: Work(partial(layers[OURS], x, adapter_names=ours)),
    }
    with torch.no_grad():
        check_equal("output", works[OURS].run(), works[PEFT].run())
        compare(
            f"mixed batch, {count} samples x {tokens} of {count} adapters, "
            f"r {', '.join(map(str, ranks))}, {size}x{size}",
            works,
            rounds=41,
            calls=20,
            warmup=4,
            note="bare: one adapter, of the largest rank, for all samples",
        )
