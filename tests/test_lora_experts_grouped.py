"""A mixture by torch's grouped products, beside the formula; on a CPU, where torch has them too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftkern.ops import lora_experts as module
from peftkern.ops.experts import grouped, loop, ways
from peftkern.ops.experts.double import masks_of_pairs
from peftkern.ops.experts.parts import Call, ExpertLinear
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_as_good_as_torch
from tests.mixtures import GATES, E, Mixture, formula, mixture, numbers

SIZES = (37, 16, 24, 32, 5, 3)
RANKS = {
    "both": ((3,), (8,)),
    "up": ((8,), ()),
    "down": ((), (2,)),
    "none": ((), ()),
    "two": ((3, 1), (2, 8)),
    "none-then-one": ((0, 3), (2, 0)),
}


@pytest.fixture(autouse=True)
def _grouped(monkeypatch):
    choice = ways.Choice(grouped, "grouped", "a test")
    monkeypatch.setattr(module, "choose", lambda call, keep: choice)


def call(m: Mixture, **kwargs) -> Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice, **kwargs)


def assert_right(m: Mixture, masks=None, **kwargs) -> None:
    assert grouped.why_not(Call(*m, False)) is None
    torch.manual_seed(4)
    found = numbers(lambda m: call(m, **kwargs), m)

    def exact(m: Mixture) -> Tensor:
        return formula(m, masks)

    assert_as_good_as_torch(found, numbers(exact, m), numbers(exact, m.to(torch.float64)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-norm-transposed"])
def test_values_and_gradients(gate, ranks, extras):
    assert_right(
        mixture(
            gate,
            ranks=RANKS[ranks],
            bias=extras,
            norm=extras,
            transposed=extras,
            dtype=torch.float32,
            sizes=SIZES,
        )
    )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gate", ["halves", "function"])
def test_bf16(low, gate):
    assert_right(mixture(gate, dtype=torch.bfloat16, low=low, bias=True, sizes=SIZES))


@pytest.mark.parametrize("ranks", ["both", "two", "none-then-one"])
def test_each_token_has_its_own_adapter(ranks):
    m = mixture(ranks=RANKS[ranks], bias=True, mixed=True, dtype=torch.float32, sizes=SIZES)
    assert_right(m)
    assert_right(m._replace(choice=torch.full_like(m.choice, -1)))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_sentinels_add_nothing(mixed, norm):
    m = mixture(
        ranks=RANKS["two"], bias=True, norm=norm, mixed=mixed, dtype=torch.float32, sizes=SIZES
    )
    m.index[1, 0], m.index[3] = E + 1, E + 5
    assert_right(m, sentinels=True)


@pytest.mark.parametrize("mixed", [False, True])
def test_dropout(mixed):
    m = mixture(ranks=RANKS["two"], p=0.4, mixed=mixed, dtype=torch.float32, sizes=SIZES)
    own = Call(*m, False)
    order = grouped.ordered(own)
    torch.manual_seed(4)
    words = module.words_of(own, order)
    parts = zip((m.up, m.down), words, strict=True)
    up, down = (masks_of_pairs(part, w, order.pairs) for part, w in parts)
    for mask in (*up, *down):
        assert 0.3 < mask.mean() < 0.95

    def exact(m: Mixture) -> Tensor:
        cast = [[mask.to(m.x.dtype) for mask in part] for part in (up, down)]
        return formula(m, (cast[0], cast[1]))

    torch.manual_seed(4)
    found = numbers(call, m)
    assert_as_good_as_torch(found, numbers(exact, m), numbers(exact, m.to(torch.float64)))


@pytest.mark.parametrize("only", range(6))
def test_one_gradient_alone(only):
    m = mixture(dtype=torch.float32, sizes=SIZES)
    for i, leaf in enumerate(m.leaves):
        leaf.requires_grad_(i == only)
    assert_right(m)


def test_all_tokens_of_one_expert_and_no_tokens():
    m = mixture(dtype=torch.float32, sizes=SIZES)
    assert_right(m._replace(index=torch.full_like(m.index, 2)))
    none = mixture(dtype=torch.float32, sizes=(0, *SIZES[1:]))
    found = numbers(call, none)
    assert found["y"].shape == (0, 32) and not any(grad.any() for grad in found.values())


def test_values_out_of_range_stop_the_device():
    m = mixture(dtype=torch.float32, sizes=SIZES)
    for index in (m.index + 5, m.index - 4):
        with pytest.raises(RuntimeError, match="index is out of range; allowed: 0 to 4"):
            call(m._replace(index=index))
    mixed = mixture(dtype=torch.float32, sizes=SIZES, mixed=True)
    with pytest.raises(RuntimeError, match="choice is out of range; allowed: -1"):
        call(mixed._replace(choice=mixed.choice + 1))


def test_the_way_is_chosen_and_says_why():
    m = mixture(dtype=torch.float32, sizes=SIZES)
    own = Call(*m, False)
    assert ways.of_torch(own)[:2] == (loop, "loop") and "CPU" in ways.of_torch(own).reason
    odd = mixture(dtype=torch.float32, sizes=(37, 15, 24, 32, 5, 3))
    reason = grouped.why_not(Call(*odd, False))
    assert reason is not None and "up's weight is [5, 48, 15]" in reason
    assert "float64" in (grouped.why_not(Call(*mixture(), False)) or "")
    moved = torch.empty(m.up.weight.numel() + 1)[1:].view_as(m.up.weight)
    shifted = own._replace(up=ExpertLinear(moved, None))
    assert "16 bytes" in (grouped.why_not(shifted) or "")


def test_results_are_the_same_every_time():
    m = mixture(ranks=RANKS["two"], dtype=torch.float32, sizes=SIZES)
    first, second = numbers(call, m), numbers(call, m)
    assert all(torch.equal(first[key], second[key]) for key in first)
