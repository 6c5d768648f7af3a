"""Gradients as a graph where one input of an operation is made of another, or is it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftkern
from peftkern.ops.dora import dora_linear
from peftkern.ops.lora import lora_linear
from peftkern.ops.lora_experts import lora_experts
from peftkern.ops.lora_mlp import lora_mlp
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.projection import Projection
from tests import moe_models
from tests.closeness import assert_same_number
from tests.expert_families import IDS, make, targets_of
from tests.mixtures import E, K, mixture


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def experts() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The routing weights are made of the tokens."""
    m, router = mixture(), draw(K, E)

    def run(x: Tensor) -> Tensor:
        weights = (x @ router).softmax(1).gather(1, m.index)
        return lora_experts(x, m.index, weights, m.up, m.down, m.gate)

    return run, draw(*m.x.shape)


def attention() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Keys are the values too, in the prefix as well, and queries are made of them."""

    def run(x: Tensor) -> Tensor:
        k, prefix = x[:, :, 2:], x[:, :, :2]
        return prefix_attention(k.sin(), k, k, prefix, prefix, scale=0.5, causal=True)

    return run, draw(1, 2, 6, 4)


def linear() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """B is Aᵀ."""
    x, w = draw(5, 4), draw(4, 4)
    return lambda A: lora_linear(x, w, None, A, A.t(), 0.7), draw(2, 4)


def dora() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x, w, m, norms = draw(5, 4), draw(4, 4), draw(4).abs() + 1, draw(4).abs() + 1
    return lambda A: dora_linear(x, w, None, A, A.t(), m, 0.7, norms=norms), draw(2, 4)


def mlp() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Gate and up have the same A."""
    x, gate, up, down, B = draw(5, 4), draw(6, 4), draw(6, 4), draw(4, 6), draw(6, 2)

    def run(A: Tensor) -> Tensor:
        ga, ua = (Projection(w, None, A, B, 0.7, 0.0, False) for w in (gate, up))
        de = Projection(down, None, B.t(), A.t(), 0.7, 0.0, False)
        return lora_mlp(x, ga, ua, de, "silu")

    return run, draw(2, 4)


@pytest.mark.parametrize("case", [experts, attention, linear, dora, mlp])
def test_gradients_of_both_orders(case: Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]):
    torch.manual_seed(0)
    run, leaf = case()
    leaf.requires_grad_()
    (plain,) = torch.autograd.grad(run(leaf).square().sum(), leaf)
    (graph,) = torch.autograd.grad(run(leaf).square().sum(), leaf, create_graph=True)
    assert_same_number(graph.detach(), plain)
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11 differentiates its other one once
        assert torch.autograd.gradgradcheck(run, leaf)


def test_a_penalty_on_the_gradients_of_a_mixture() -> None:
    """Beside HF PEFT's model, whose mixture is torch's own operations."""
    found = []
    for library in moe_models.peft, peftkern:
        base = make("gpt_oss")
        ups, downs = targets_of(base)
        model = moe_models.adapt(library, base, target_parameters=ups + downs)
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        loss = model(input_ids=IDS).logits.square().mean()
        grads = torch.autograd.grad(loss, list(factors.values()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()  # type: ignore[union-attr]
        found.append({n: p.grad for n, p in factors.items()})
    assert_same_number(found[1], found[0])
