"""lora_experts against its formula in float64: values, gradients, kept tensors, low precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from peftkern.ops import lora_experts as module
from peftkern.ops.experts import loop
from peftkern.ops.experts.double import masks_of_pairs
from peftkern.ops.experts.parts import ExpertLinear, Factors
from peftkern.ops.lora_experts import lora_experts
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ
from tests.mixtures import GATES, E, Mixture, formula, mixture, numbers


def call(m: Mixture, **kwargs) -> Tensor:
    return lora_experts(*m[:6], norm=m.norm, choice=m.choice, **kwargs)


RANKS = {
    "both": ((3,), (2,)),
    "up": ((3,), ()),
    "down": ((), (2,)),
    "none": ((), ()),
    "two": ((3, 1), (2, 4)),
    "none-then-one": ((0, 3), (2, 0)),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-norm-transposed"])
def test_values_and_gradients(gate, ranks, extras):
    m = mixture(gate, ranks=RANKS[ranks], bias=extras, norm=extras, transposed=extras)
    assert_same_number(numbers(call, m), numbers(formula, m))


@pytest.mark.parametrize("ranks", ["both", "two", "none-then-one"])
@pytest.mark.parametrize("bias", [False, True])
def test_each_token_has_its_own_adapter(ranks, bias):
    m = mixture(ranks=RANKS[ranks], bias=bias, mixed=True)
    expected = numbers(formula, m)
    assert_same_number(numbers(call, m), expected)
    assert differ(expected["y"], formula(m._replace(choice=None)).detach())
    nobody = m._replace(choice=torch.full_like(m.choice, -1))
    assert_same_number(numbers(call, nobody), numbers(formula, nobody))


def with_masks(monkeypatch, m: Mixture):
    """(numbers of lora_experts, the masks that it drew, of pairs)."""
    drawn = []
    real = module.words_of

    def draw(own, order):
        drawn.append(real(own, order))
        return drawn[-1]

    monkeypatch.setattr(module, "words_of", draw)
    found = numbers(call, m)
    order = loop.ordered(module.Call(*m, False)).pairs
    parts = zip((m.up, m.down), drawn[0], strict=True)
    return found, tuple(masks_of_pairs(part, words, order) for part, words in parts)


@pytest.mark.parametrize("gate", ["halves", "function"])
@pytest.mark.parametrize("mixed", [False, True])
def test_dropout(gate, mixed, monkeypatch):
    m = mixture(gate, ranks=RANKS["two"], p=0.4, mixed=mixed)
    found, masks = with_masks(monkeypatch, m)
    assert_same_number(found, numbers(lambda m: formula(m, masks), m))
    assert differ(found["y"], formula(m).detach())
    kept = torch.cat([mask.flatten() for part in masks for mask in part])
    assert 0.4 < kept.mean() < 0.95


def test_masks_are_drawn_for_each_pair_and_again_by_the_same_seed():
    m = mixture(p=0.5, sizes=(64, 6, 10, 5, 4, 2))
    torch.manual_seed(5)
    first = numbers(call, m)
    assert differ(numbers(call, m)["y"], first["y"])
    torch.manual_seed(5)
    assert_same_number(numbers(call, m), first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    m = mixture(p=0.5)
    torch.manual_seed(5)
    expected = numbers(call, m)

    torch.manual_seed(5)
    y = checkpoint(lambda x: call(m._replace(x=x)), m.x, use_reentrant=reentrant)
    assert_same_number(y.detach(), expected["y"])
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view_as(y))
    for i, leaf in enumerate(m.leaves):
        assert_same_number(leaf.grad, expected[str(i)])


@pytest.mark.parametrize("only", range(6))
def test_one_gradient_alone(only):
    m = mixture(bias=False)
    leaves, expected = m.leaves, numbers(formula, m)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == only)
    found = numbers(call, m)
    assert_same_number(found, {"y": expected["y"], "0": expected[str(only)]})


def test_without_gradients_the_result_is_the_same():
    for mixed in (False, True):
        m = mixture(ranks=RANKS["two"], bias=True, norm=True, mixed=mixed)
        with torch.no_grad():
            alone = call(m)
        assert torch.equal(alone, call(m).detach())
        with torch.inference_mode():
            assert torch.equal(call(m), alone)


def test_second_derivatives():
    m = mixture(p=0.3, bias=True, norm=True)

    def twice(run):
        torch.manual_seed(2)
        first = torch.autograd.grad(run(m).square().sum(), m.leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in first)
        return dict(enumerate(torch.autograd.grad(total, m.leaves)))

    torch.manual_seed(2)
    order = loop.ordered(module.Call(*m, False))
    words = module.words_of(module.Call(*m, False), order)
    parts = zip((m.up, m.down), words, strict=True)
    masks = tuple(masks_of_pairs(part, own, order.pairs) for part, own in parts)
    assert_same_number(twice(call), twice(lambda m: formula(m, masks)))


def test_batches_of_gradients_and_transforms():
    m = mixture(bias=True)
    y = call(m)
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    rows = torch.autograd.grad(y, m.leaves, basis, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, m.leaves, b, retain_graph=True) for b in basis]
    for i, batch in enumerate(rows):
        assert_same_number(batch, torch.stack([grads[i] for grads in single]))
    forward = torch.func.jvp(lambda x: call(m._replace(x=x)), (m.x,), (torch.ones_like(m.x),))[1]
    dot = torch.einsum("b...,...->b", rows[0], torch.ones_like(m.x)).view_as(y)
    assert_same_number(forward.detach(), dot)
    with forward_ad.dual_level():
        moved = call(m._replace(x=forward_ad.make_dual(m.x, torch.ones_like(m.x))))
        assert_same_number(forward_ad.unpack_dual(moved).tangent.detach(), dot)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_errors_are_not_above_torchs(dtype, low, gate):
    m = mixture(gate, bias=True, dtype=dtype, low=low, sizes=(64, 24, 40, 24, 6, 3))
    assert_as_good_as_torch(
        numbers(call, m), numbers(formula, m), numbers(formula, m.to(torch.float64))
    )


def test_adapters_of_several_dtypes_have_gradients_in_their_own():
    m = mixture(ranks=RANKS["two"], dtype=torch.bfloat16)
    first, second = m.up.factors
    wide = Factors(
        *(t.detach().float().requires_grad_() for t in (second.A, second.B)), second.scale
    )
    m = m._replace(up=m.up._replace(factors=(first, wide)))
    found = numbers(call, m)
    assert [found[str(i)].dtype for i in range(2, 6)] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert_as_good_as_torch(found, numbers(formula, m), numbers(formula, m.to(torch.float64)))


def test_autocast_computes_in_the_weights_dtype():
    m = mixture(dtype=torch.float32)
    expected = numbers(call, m)
    with torch.autocast("cpu", torch.bfloat16):
        found = numbers(call, m)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    narrow = m._replace(x=m.x.detach().bfloat16().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert call(narrow).dtype == torch.bfloat16


def test_results_are_the_same_every_time():
    m = mixture("function", ranks=RANKS["two"], dtype=torch.float32, sizes=(300, 24, 40, 24, 9, 4))
    first, second = numbers(call, m), numbers(call, m)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("norm", [False, True])
def test_kept_for_the_backward(norm):
    m = mixture(p=0.5, norm=norm, dtype=torch.float32, sizes=(40, 64, 32, 24, 5, 3))
    own = {t.data_ptr() for t in (*m.leaves, m.up.weight, m.down.weight, m.index)}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(m)
    pairs = 120
    bits = pairs * 4 * (64 // 32 + 32 // 32)
    numbers_kept = pairs * 4 * (2 * 32 + 3 + 2 + (24 if norm else 0))
    assert sum(kept.values()) == numbers_kept + bits + pairs * 8


def test_gradients_are_dense_and_zero_for_experts_without_tokens():
    m = mixture()
    found = torch.autograd.grad(call(m).sum(), [m.up.factors[0].A, m.up.factors[0].B])
    assert all(t.is_contiguous() for t in found)
    dA, dB = Factors(*found, 1.0).of_experts(E)
    assert dA[:-1].ne(0).all() and dB[:-1].ne(0).all()
    assert not dA[-1].any() and not dB[-1].any()


@pytest.mark.parametrize("mixed", [False, True])
def test_sentinels_add_nothing_and_get_no_gradient(mixed):
    m = mixture(norm=True, ranks=RANKS["two"], bias=True, mixed=mixed, p=0.0)
    m.index[1, 0], m.index[3] = E, E + 5
    expected = numbers(formula, m)
    assert_same_number(numbers(lambda m: call(m, sentinels=True), m), expected)
    assert not expected["1"][3].any() and not expected["y"][3].any()


def test_routings_at_the_edges():
    for index in (torch.zeros(7, 3), torch.arange(7)[:, None] % 3, torch.full((7, 1), 3)):
        m = mixture()
        weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
        for dtype in (torch.int32, torch.int64):
            m = m._replace(index=index.to(dtype), weights=weights)
            assert_same_number(numbers(call, m), numbers(formula, m))


def test_no_tokens():
    m = mixture(sizes=(0, 6, 10, 5, 4, 2), p=0.5, bias=True)
    found = numbers(call, m)
    assert found["y"].shape == (0, 5)
    assert not any(grad.any() for grad in found.values())


def test_operands_of_other_strides():
    m = mixture()
    x = m.x.detach().repeat(1, 2)[:, : m.x.shape[1]].requires_grad_()
    (f,) = m.up.factors
    A, B = (t.detach().t().contiguous().t().requires_grad_() for t in (f.A, f.B))
    odd = m._replace(x=x, up=ExpertLinear(m.up.weight, None, (f._replace(A=A, B=B),)))
    assert_same_number(numbers(call, odd), numbers(formula, m))


@pytest.mark.parametrize("mixed", [False, True])
def test_an_index_of_bytes_names_any_of_many_experts(mixed: bool) -> None:
    ranks = ((1, 1), (1, 1)) if mixed else ((1,), (1,))
    m = mixture(sizes=(9, 6, 10, 5, 300, 2), ranks=ranks, mixed=mixed)
    m = m._replace(index=m.index.clamp(max=255))
    narrow = m._replace(index=m.index.to(torch.uint8))
    assert_same_number(call(narrow), call(m))
