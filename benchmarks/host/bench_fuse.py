"""HF PEFT's own model before and after ``peftkern.fuse``: a training step and decoding.

In these rows ``peftkern`` is HF PEFT's model, fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch

import peftkern

from . import bench_decode, bench_train
from .llama import SMALL, adapt, build, equalise, lora_config
from .measure import BARE, OURS, PEFT


def before_and_after(p: float = 0.0) -> dict[str, Any]:
    base = build(SMALL)
    models = {BARE: base}
    for name in (PEFT, OURS):
        torch.manual_seed(0)
        models[name] = adapt(peft, base, lora_config(peft, "all-linear", p))
    equalise(models[PEFT], models[OURS])
    peftkern.fuse(models[OURS])
    assert all(row.fused for row in peftkern.explain(models[OURS]))
    return models


def test_step(compare: Callable[..., Any]) -> None:
    row = f"fused HF PEFT {SMALL}, dropout 0.1"
    bench_train.measure(compare, before_and_after(0.1), SMALL, row)


def test_decode(compare: Callable[..., Any]) -> None:
    row = f"fused HF PEFT {SMALL}, all-linear"
    bench_decode.measure(compare, before_and_after(), SMALL, row, target=1.0)
