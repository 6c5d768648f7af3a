"""Greedy decoding with ``generate``, adapters unmerged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from .llama import MEDIUM, SMALL, Shape, build, tokens, trio
from .measure import OURS, PEFT, Work, check_equal

PROMPT, NEW = 16, 24


@pytest.mark.parametrize("targets", ["all-linear", None], ids=["all-linear", "default"])
@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
def test_decode(compare: Callable[..., Any], shape: Shape, targets: str | None) -> None:
    measure(compare, trio(build(shape), targets), shape, f"{shape}, {targets or 'q,v (default)'}")


def measure(
    compare: Callable[..., Any],
    models: dict[str, Any],
    shape: Shape,
    row: str,
    target: float = 0.8,
) -> None:
    """Check that the adapted models generate the same tokens, then time generating them."""
    models = {provider: model.eval() for provider, model in models.items()}
    ids = tokens(shape, 1, PROMPT)
    with torch.no_grad():
        check_equal("logits", models[OURS](ids).logits, models[PEFT](ids).logits)
    greedy = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    works = {name: Work(partial(m.generate, input_ids=ids, **greedy)) for name, m in models.items()}
    written = works[OURS].run()
    assert written.shape == (1, PROMPT + NEW)
    assert torch.equal(written, works[PEFT].run()), "the two generate different tokens"
    compare(
        f"decode {NEW} tokens {row}",
        works,
        target=target,
        rounds=21 if shape is SMALL else 15,
        note=f"batch 1, prompt of {PROMPT}, KV cache, r=8",
    )
