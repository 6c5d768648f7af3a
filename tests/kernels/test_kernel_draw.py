"""Masks drawn by the kernels that make S: the words of ``dropout_bits``, and S of these words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import bits
from peftkern.kernels.bits import Draw
from peftkern.kernels.shrink import ShrinkConfig, draws, shrink
from peftkern.kernels.shrink_expand import ShrinkExpandConfig, shrink_expand
from tests.kernels.oracle import DTYPES, few, matrix


def empty(M, K, group):
    return [torch.full((M, -(-K // 32)), -1, dtype=torch.int32) for _ in range(group)]


def wanted(M, K, p, seed, group):
    return [bits.reference_bits(M, K, p, seed, group=i) for i in range(group)]


def check(M, K, N, ranks, dtype, p, seed, split=1):
    x = matrix(M, K, dtype, seed=0, offset=1)
    As = [matrix(r, K, torch.float32, seed=1 + i) for i, r in enumerate(ranks)]
    Bs = [matrix(N, r, torch.float32, seed=7 + i) for i, r in enumerate(ranks)]
    words, given_words = empty(M, K, len(ranks)), wanted(M, K, p, seed, len(ranks))
    config = ShrinkConfig(16, 32, split)
    s = shrink(x, As, 0.5, words, draw=Draw(p, seed), config=config)
    for ours, theirs in zip(words, given_words, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(s, shrink(x, As, 0.5, given_words, config=config))
    words, joined = empty(M, K, len(ranks)), ShrinkExpandConfig(16, 64, 32)
    s, ys = shrink_expand(x, As, Bs, 0.5, words, draw=Draw(p, seed), config=joined)
    for ours, theirs in zip(words, given_words, strict=True):
        assert torch.equal(ours, theirs)
    again, others = shrink_expand(x, As, Bs, 0.5, given_words, config=joined)
    assert torch.equal(s, again)
    assert all(torch.equal(a, b) for a, b in zip(ys, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, ranks, split", [(41, 341, (8,), 1), (9, 130, (5, 16, 3), 3), (1, 7, (1,), 1)]
)
def test_words_and_s(M, K, ranks, split, dtype):
    check(M, K, 20, ranks, dtype, 0.1, 11, split)


@few
@given(
    M=st.integers(1, 40),
    K=st.integers(1, 150),
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1e-5]),
    seed=st.integers(-(2**63), 2**63 - 1),
    split=st.integers(1, 3),
    on_device=st.booleans(),
)
def test_any_shape_probability_and_seed(M, K, ranks, p, seed, split, on_device):
    given_seed = torch.tensor([seed]) if on_device else seed
    check(M, K, 5, ranks, torch.float32, p, given_seed, split)


def test_the_default_config_of_a_wide_device_draws_the_same_words():
    M, K = 70, 300
    x, a = matrix(M, K, torch.float32, seed=0), matrix(8, K, torch.float32, seed=1)
    for config in (ShrinkConfig(64, 128, 1, 8, 3), ShrinkConfig(16, 256, 2), None):
        words = empty(M, K, 1)
        shrink(x, [a], 1.0, words, draw=Draw(0.1, 3), config=config)
        assert torch.equal(words[0], bits.dropout_bits(M, K, 0.1, 3, device="cpu"))


def test_without_rows_nothing_is_drawn():
    words = [torch.zeros(0, 1, dtype=torch.int32)]
    s = shrink(torch.ones(0, 6), [torch.ones(4, 6)], 1.0, words, draw=Draw(0.1, 3))
    assert s.shape == (0, 4)


def test_bad_arguments_are_named():
    x, a, b = torch.ones(5, 6), torch.ones(4, 6), torch.ones(3, 4)
    (w,) = empty(5, 6, 1)
    assert draws([64, 64]) and not draws([64, 64, 1])
    for call, error, message in (
        (lambda: shrink(x, [a], 1.0, [w], draw=Draw(1.0, 0)), ValueError, "p is 1.0; allowed"),
        (lambda: shrink(x, [a], 1.0, [w], draw=Draw(0.1, 1.5)), TypeError, "seed is float"),
        (lambda: shrink(x, [a], 1.0, draw=Draw(0.1, 0)), ValueError, "draw is given, and bits"),
        (lambda: shrink(x, [a], 1.0, w, draw=Draw(0.1, 0)), ValueError, "draw is given, and bits"),
        (lambda: shrink(x, [a], 1.0, [None], draw=Draw(0.1, 0)), ValueError, "draw is given"),
        (lambda: shrink(x, [a, a], 1.0, [w, w], draw=Draw(0.1, 0)), ValueError, "of its own"),
        (lambda: shrink(x, [a], 1.0, [w.long()], draw=Draw(0.1, 0)), TypeError, r"bits\[0\]"),
        (lambda: shrink(x, [a], 1.0, [w[1:]], draw=Draw(0.1, 0)), ValueError, r"bits\[0\]"),
        (
            lambda: shrink_expand(x, [a], [b], 1.0, [w[:, ::2].expand(5, 2)], draw=Draw(0.1, 0)),
            ValueError,
            "allowed: contiguous",
        ),
        (
            lambda: shrink(x, [torch.ones(129, 6)], 1.0, [w], draw=Draw(0.1, 0)),
            ValueError,
            r"As have ranks \[129\]; allowed with it: 128 together",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
