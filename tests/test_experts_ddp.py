"""DistributedDataParallel over two processes trains a mixture as one process does on all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import ddp, moe_models
from tests.closeness import assert_same_number
from tests.ranks import NEEDS_GLOO, results

pytestmark = [
    pytest.mark.long,
    NEEDS_GLOO,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """{case: numbers} of each process."""
    return results("tests.ddp", tmp_path_factory.mktemp("ddp"), ddp.RANKS)


@pytest.mark.parametrize("case", ddp.CASES)
def test_two_processes_are_as_one_with_all_tokens(case: str, found: Any) -> None:
    first, second = (of_rank[case] for of_rank in found)
    want = ddp.numbers(case)
    assert_same_number(first, want)
    assert first.keys() == second.keys()
    for name in want:  # the same bits, as every process has got the same sum
        pair = first[name], second[name]
        assert torch.equal(*pair) if pair[0] is not None else pair[1] is None, name
    grads = {n: g for n, g in want.items() if n.endswith(".grad")}
    idle = {n for n, g in grads.items() if g is None}
    assert idle == {n for n in grads if ".other." in n}
    assert not any("experts" in n and not g.any() for n, g in grads.items() if g is not None)


@pytest.mark.parametrize("case", [c for c in ddp.CASES if not ddp.CASES[c].keys() & {"skips"}])
def test_experts_without_a_token_have_zeros_in_the_gradient(case: str, found: Any) -> None:
    both = ddp.AWAY[ddp.RANKS]
    for of_rank in found:
        grads = {n: g for n, g in of_rank[case].items() if n.endswith("default.weight.grad")}
        assert len(grads) == 4
        for name, grad in grads.items():
            E = moe_models.EXPERTS
            of_experts = grad.unflatten(0, (E, -1)) if "lora_A" in name else None
            if of_experts is None:
                of_experts = grad.unflatten(1, (-1, E)).permute(2, 0, 1)
            without = [e for e in range(E) if not of_experts[e].any()]
            assert set(both) <= set(without) < set(range(E)), name


@pytest.mark.parametrize("tokens", [0, 12])
def test_a_process_gives_a_gradient_for_every_factor(tokens: int) -> None:
    """Whichever experts its tokens chose, none of the stacked factors is an unused parameter."""
    model = moe_models.alone()
    for rank, own in enumerate(ddp.batches("default")):
        model.zero_grad(set_to_none=True)
        model(own.view(-1, 4)[: tokens // 4]).sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if p.requires_grad]
        assert len(grads) == 4 and all(g is not None for g in grads)
        assert all(bool(g.any()) == bool(tokens) for g in grads if g is not None), rank
