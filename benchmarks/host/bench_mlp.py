"""A Llama layer with adapters on all seven linears: bytes kept, and the time of a training step.

Beside the bare layer and HF PEFT's, peftkern's runs twice: with its MLP as one operation, and as
separate operations (its linears one by one, and torch's own activation and product).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkern.tuners.lora.mlp import release_blocks

from .llama import MEDIUM, SMALL, Shape, build, share, trio
from .measure import BARE, OURS, PEFT, Work, check_equal, kept_bytes

BATCH, LENGTH = 2, 128
SEPARATE = "separate"


def layers(shape: Shape, p: float) -> dict[str, nn.Module]:
    """{provider: decoder layer in training mode}, with equal adapters."""
    models = trio(build(replace(shape, layers=1)), "all-linear", p)
    models[SEPARATE] = share(models[OURS])
    release_blocks(models[SEPARATE], everywhere=True)
    found = {}
    for name, model in models.items():
        inner = model if name == BARE else model.get_base_model()
        found[name] = inner.train().model.layers[0]
        found[name].embeddings = [inner.model.rotary_emb]
    return found


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
def test_layer(
    compare: Callable[..., Any], count: Callable[..., Any], shape: Shape, p: float
) -> None:
    found = layers(shape, p)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(BATCH, LENGTH, shape.hidden, generator=generator).requires_grad_()
    dy = torch.randn(BATCH, LENGTH, shape.hidden, generator=generator)
    [rotary] = found[BARE].embeddings
    angles = rotary(x, torch.arange(LENGTH)[None])

    def forward(name: str) -> Tensor:
        y: Any = found[name](x, position_embeddings=angles)
        return y

    def step(name: str) -> Tensor:
        y = forward(name)
        y.backward(dy)
        return y

    def forget(name: str) -> tuple[()]:
        x.grad = None
        found[name].zero_grad()
        torch.manual_seed(3)
        return ()

    made = {}
    for name in found:
        forget(name)
        grads = [step(name), x.grad]
        grads += [w.grad for w in found[name].parameters() if w.grad is not None]
        made[name] = grads
    for name in (OURS, SEPARATE):
        for i, (ours, theirs) in enumerate(zip(made[name], made[PEFT], strict=True)):
            scale = theirs.detach().abs().max()
            check_equal(f"{name}: number {i}", ours / scale, theirs / scale, 1e-4)

    known = [*angles, x]
    kept = {n: kept_bytes(partial(forward, n), [*m.parameters(), *known]) for n, m in found.items()}
    assert kept[OURS] <= 0.75 * kept[SEPARATE], kept
    row = f"Llama layer {shape.hidden}, dropout {p}"
    count(f"bytes kept, {row}", kept, note="fp32, measured, without the layer's input")
    compare(
        f"training step {row}",
        {name: Work(partial(step, name), partial(forget, name)) for name in found},
        rounds=41,
        target=1.0,
        note=f"batch {BATCH} x {LENGTH}, 7 linears, r=8; separate: peftkern without the MLP as one",
    )
