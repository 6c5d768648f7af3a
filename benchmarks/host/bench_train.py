"""A training step, forward and backward, of a Llama on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from .llama import MEDIUM, SMALL, TINY, Shape, build, tokens, trio
from .measure import BARE, OURS, PEFT, Work, check_equal

BATCH, LENGTH = 2, 128


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
@pytest.mark.parametrize("shape", [SMALL, MEDIUM], ids=str)
def test_step(compare: Callable[..., Any], shape: Shape, p: float) -> None:
    measure(compare, trio(build(shape), "all-linear", p), shape, f"{shape}, dropout {p}")


@pytest.mark.parametrize("p", [0.0, 0.1], ids="p{}".format)
def test_tiny_step(compare: Callable[..., Any], p: float) -> None:
    """The host's time of each call counts here: no product takes longer than 0.1 ms."""
    models = trio(build(TINY), "all-linear", p)
    measure(compare, models, TINY, f"{TINY}, dropout {p}", 0.95, 101, (1, 96))


class Steps:
    """Training steps of a bare model and adapted ones on equal tokens, by provider."""

    def __init__(
        self, models: dict[str, Any], shape: Shape, size: tuple[int, int] = (BATCH, LENGTH)
    ) -> None:
        self.models, self.ids = models, tokens(shape, *size)
        # the bare model has nothing to train, so its floor is the gradient of its embeddings, which
        # passes through every layer
        embedded = models[BARE].get_input_embeddings()(self.ids).detach()
        self.embedded = embedded.requires_grad_()

    def loss(self, name: str) -> torch.Tensor:
        given = {"inputs_embeds": self.embedded} if name == BARE else {"input_ids": self.ids}
        loss: torch.Tensor = self.models[name](**given, labels=self.ids, use_cache=False).loss
        return loss

    def step(self, name: str) -> torch.Tensor:
        loss = self.loss(name)
        loss.backward()
        return loss

    def forget(self, name: str) -> tuple[()]:
        self.embedded.grad = None
        self.models[name].train().zero_grad()
        torch.manual_seed(3)
        return ()


def measure(
    compare: Callable[..., Any],
    models: dict[str, Any],
    shape: Shape,
    row: str,
    target: float = 1.0,
    rounds: int | None = None,
    size: tuple[int, int] = (BATCH, LENGTH),
) -> Steps:
    """Check the losses and gradients of adapted models against each other, then time a step."""
    steps = Steps(models, shape, size)
    losses = {}
    for name in (PEFT, OURS):
        steps.forget(name)
        losses[name] = steps.step(name)
    check_equal("loss", losses[OURS], losses[PEFT])
    theirs = dict(models[PEFT].named_parameters())
    trained = [n for n, q in models[OURS].named_parameters() if q.requires_grad]
    assert trained, "nothing is trained"
    for parameter in trained:
        ours = models[OURS].get_parameter(parameter).grad
        scale = theirs[parameter].grad.abs().max()
        assert scale > 0, f"no gradient for {parameter}"
        check_equal(parameter, ours / scale, theirs[parameter].grad / scale, 1e-4)

    compare(
        f"training step {row}",
        {name: Work(partial(steps.step, name), partial(steps.forget, name)) for name in models},
        target=target,
        rounds=rounds or (21 if shape is SMALL else 15),
        note=f"batch {size[0]} x {size[1]}, all-linear, r=8; bare: gradient of the embeddings",
    )
    return steps
