"""Blocks of experts, which the loop of lora_experts takes together."""

from __future__ import annotations

import pytest
import torch

from peftkern.ops.experts import loop
from peftkern.ops.experts.blocks import SharedRows, blocks_of, groups_of, most_rows
from peftkern.ops.experts.order import Span, spans_of
from peftkern.ops.experts.parts import Call
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_same_number
from tests.mixtures import GATES, Mixture, formula, mixture, numbers

SIZES = (400, 6, 10, 5, 7, 2)


def call(m: Mixture) -> torch.Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice)


def blocks_in(m: Mixture) -> list[int]:
    """How many experts each block has."""
    order = loop.ordered(Call(*m, False))
    assert order.spans is not None
    return [len(b.spans) for b in blocks_of(order.spans)]


def everywhere(m: Mixture) -> Mixture:
    """With tokens for every expert, and most of them for expert 2."""
    experts, index = m.up.weight.shape[0], m.index.clone()
    index[: len(index) // 2] = torch.tensor([2, 0])
    index[-experts:, 0] = torch.arange(experts)
    return m._replace(index=index)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-norm"])
@pytest.mark.parametrize("spread", [lambda m: m, everywhere], ids=["one-empty", "all"])
def test_several_blocks_have_the_numbers_of_the_formula(gate, mixed, extras, spread):
    ranks = ((3, 1), (2, 4))
    m = spread(mixture(gate, ranks=ranks, bias=extras, norm=extras, mixed=mixed, sizes=SIZES))
    made = blocks_in(m)
    assert len(made) > 1 and max(made) > 1, "not what is to be tested"
    expected = numbers(formula, m)
    assert_same_number(numbers(call, m), expected)
    with torch.no_grad():
        assert_same_number(call(m), expected["y"])


@pytest.mark.parametrize("mixed", [False, True])
def test_dropout_is_the_same_by_the_same_seed_in_several_blocks(mixed):
    m = mixture(ranks=((3, 0), (2, 4)), p=0.4, mixed=mixed, sizes=SIZES)
    assert len(blocks_in(m)) > 1, "not what is to be tested"
    torch.manual_seed(3)
    found = numbers(call, m)
    with torch.no_grad():
        torch.manual_seed(3)
        assert_same_number(call(m), found["y"])
    # the derivative along each leaf, from two outputs with the same masks
    step = 1e-6
    weights = torch.linspace(-1, 1, found["y"].numel(), dtype=torch.float64).cos()
    for i, leaf in enumerate(m.leaves):
        along, made = torch.randn_like(leaf), []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                leaf.add_(along, alpha=sign * step)
                torch.manual_seed(3)
                made.append(call(m).flatten() @ weights)
                leaf.sub_(along, alpha=sign * step)
        slope = (made[0] - made[1]) / (2 * step)
        torch.testing.assert_close((found[str(i)] * along).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "counts", [[], [1], [3] * 300, [1000, 1, 1, 0, 700, 0, 5], [200, 200, 56, 1]]
)
def test_blocks_have_all_rows_once(counts):
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    spans = spans_of(bounds, False, 0)
    blocks = blocks_of(spans)
    assert [s for b in blocks for s in b.spans] == spans
    assert [s for b in blocks for s in b.of(spans)] == spans
    for b in blocks:
        assert (b.start, b.end) == (b.spans[0].start, b.spans[-1].end)
        assert b.end - b.start == sum(b.sizes)
        assert len(b.spans) == 1 or b.end - b.start <= max(256, bounds[-1] // 6)
    assert most_rows(blocks) == max((b.end - b.start for b in blocks), default=0)


def test_groups_have_each_row_with_its_adapter():
    # two experts and two adapters, the last group of each expert without one
    bounds = [0, 2, 2, 3, 3, 7, 8]
    [block] = blocks_of(spans_of(bounds, True, 2))
    rows = torch.arange(8)
    found = {g.adapter: [t.tolist() for t in g.cut(rows)] for g in groups_of(block, 2)}
    assert found == {0: [[0, 1]], 1: [[3, 4, 5, 6]], 2: [[2], [7]]}
    [block] = blocks_of([Span(4, 0, 3, None), Span(6, 3, 8, None)])
    for i, group in enumerate(groups_of(block, 2)):
        assert group.adapter == i and len(group.parts(rows)) == 1
        assert [t.tolist() for t in group.cut(rows)] == [[0, 1, 2], [3, 4, 5, 6, 7]]


def test_scratch_keeps_its_memory_and_grows():
    scratch = SharedRows(4, torch.zeros(1, dtype=torch.float64))
    first = scratch.take("a", 2, 3)
    assert first.shape == (2, 3) and first.dtype == torch.float64
    assert scratch.take("a", 4, 3).data_ptr() == first.data_ptr()
    assert scratch.take("b", 4, 3).data_ptr() != first.data_ptr()
    assert scratch.take("a", 5, 8).shape == (5, 8)
    x = torch.randn(6, 3, dtype=torch.float64)
    at = torch.tensor([5, 0, 5])
    assert torch.equal(scratch.gather("a", x, at), x[at])
