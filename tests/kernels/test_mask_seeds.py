"""The seeds of masks: torch's own numbers from its CPU generator, wherever a forward runs."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from peftkern.ops import masks

X = torch.zeros(2, 3)


def wanted() -> list[Any]:
    torch.manual_seed(5)
    return [torch.randint(2**62, (1,)).item() for _ in range(3)]


def drawn(into: list[Any] | None = None) -> list[Any]:
    torch.manual_seed(5)
    found = [masks._seed(X) for _ in range(3)]
    if into is not None:
        into += found
    return found


@pytest.mark.parametrize("first", ["plain", "inference"])
def test_they_are_randints(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever mode a thread draws its first in."""
    monkeypatch.setattr(masks, "_last", threading.local())
    if first == "inference":
        with torch.inference_mode():
            assert drawn() == wanted()
    assert drawn() == wanted()
    with torch.inference_mode():
        assert drawn() == wanted()
    with torch.device("meta"):  # a default device that holds no numbers
        found = drawn()
    assert found == wanted()


def test_a_thread_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_last", threading.local())
    here = drawn()
    mine, there = masks._last.number, []
    thread = threading.Thread(target=lambda: there.append((drawn(), masks._last.number)))
    thread.start()
    thread.join()
    [(found, number)] = there
    assert found == here and number is not mine and mine.item() == here[-1]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_a_selective_checkpoint_draws_the_same_again(policy: CheckpointPolicy) -> None:
    """Also one that keeps the output of every operation, and gives it back in the recomputation."""
    found: list[int] = []

    def step(x: Tensor) -> Tensor:
        found.extend(masks._seed(X) for _ in range(2))  # type: ignore[misc]
        return x.sin().cos()

    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)
    x = torch.ones(3, requires_grad=True)
    checkpoint(step, x, use_reentrant=False, context_fn=contexts).sum().backward()
    first, second, *again = found
    assert first != second and again == [first, second]


def test_words_are_of_the_same_seeds_in_a_checkpoint() -> None:
    """A seed drawn under a mode and one drawn without are the same number of the generator."""
    found = []

    def step(x: Tensor) -> Tensor:
        found.append(masks._seed(X))
        return x.sin()

    policy = CheckpointPolicy.PREFER_RECOMPUTE
    for contexts in ({}, {"context_fn": functools.partial(_with, policy)}):
        torch.manual_seed(5)
        checkpoint(step, torch.ones(3), use_reentrant=False, **contexts)  # type: ignore[arg-type]
    assert found[0] == found[1] == wanted()[0]


def _with(policy: CheckpointPolicy) -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: policy)
