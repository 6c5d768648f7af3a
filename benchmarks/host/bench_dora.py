"""One DoRA linear, HF PEFT's, and the bare layer: a training step, a call, and bytes kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from .llama import LIBRARIES, share
from .measure import BARE, OURS, PEFT, Work, check_equal, kept_bytes

RANK, K, M = 16, 1024, 512


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
def test_dora_linear(compare: Callable[..., Any], count: Callable[..., Any], p: float) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, K)).requires_grad_(False)
    layers: dict[str, nn.Module] = {BARE: base[0]}
    for name, library in LIBRARIES.items():
        torch.manual_seed(1)
        config = library.LoraConfig(
            r=RANK, target_modules=["0"], lora_dropout=p, use_dora=True, init_lora_weights=False
        )
        layers[name] = library.get_peft_model(share(base), config).base_model.model[0]
    layers[OURS].load_state_dict(layers[PEFT].state_dict())
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, K)
    found = {}
    for name in (PEFT, OURS):
        torch.manual_seed(3)
        y = layers[name].train()(x)
        weights = [w for w in layers[name].parameters() if w.requires_grad]
        found[name] = (y, *torch.autograd.grad(y, [x, *weights], dy))
    for what, ours, theirs in zip(
        ("output", "dX", "dA", "dB", "dm"), found[OURS], found[PEFT], strict=True
    ):
        check_equal(what, ours, theirs)
    kept = {n: kept_bytes(partial(m, x), list(m.parameters())) for n, m in layers.items()}
    count(f"bytes kept, DoRA linear M={M} K=N={K} dropout {p}", kept, note="fp32, measured")

    def step(layer: nn.Module) -> None:
        layer(x).backward(dy)

    def forget() -> tuple[()]:
        x.grad = None
        for layer in layers.values():
            layer.zero_grad()
        return ()

    compare(
        f"DoRA linear {M}x{K}x{K} forward+backward, dropout {p}",
        {name: Work(partial(step, layer), forget) for name, layer in layers.items()},
        rounds=21,
        note="bare: dX alone, through the frozen weight",
    )


@pytest.mark.parametrize("rows", [1, M])
def test_dora_call(compare: Callable[..., Any], rows: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, K)).requires_grad_(False)
    layers: dict[str, nn.Module] = {BARE: base[0].eval()}
    for name, library in LIBRARIES.items():
        torch.manual_seed(1)
        config = library.LoraConfig(
            r=RANK, target_modules=["0"], use_dora=True, init_lora_weights=False
        )
        layers[name] = library.get_peft_model(share(base), config).base_model.model[0].eval()
    layers[OURS].load_state_dict(layers[PEFT].state_dict())
    x = torch.randn(rows, K)
    with torch.no_grad():
        check_equal("output", layers[OURS](x), layers[PEFT](x))
        compare(
            f"DoRA linear {rows}x{K}x{K}, no grad",
            {name: Work(partial(layer, x)) for name, layer in layers.items()},
            rounds=21,
            note="the norms are made anew in every call",
        )
