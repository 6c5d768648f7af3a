"""Tests of closeness.py: its assertions accept another order of sums and reject every mistake."""

from __future__ import annotations

import pytest
import torch

from tests.closeness import assert_as_good_as_torch, assert_same_number, differ

G = torch.Generator().manual_seed(0)
X, W = (torch.randn(64, 64, dtype=torch.float64, generator=G) for _ in range(2))
# the sum over 64 columns, and the same in two parts
WHOLE, PARTS = X @ W, X[:, :40] @ W[:40] + X[:, 40:] @ W[40:]


def mistaken(number):
    """The same with the smallest of mistakes: one row of many, a hundredth of a percent off."""
    number = number.clone()
    number[3] *= 1.0001
    return number


def test_same_number():
    assert_same_number(PARTS, WHOLE)
    assert_same_number({"a": [PARTS, 1.5, None]}, {"a": [WHOLE, 1.5, None]})
    for wrong in (mistaken(WHOLE), WHOLE.float(), WHOLE[:1], WHOLE * float("nan"), WHOLE[:0]):
        assert differ(wrong, WHOLE)
    with pytest.raises(AssertionError, match=r"\['a'\]\[0\]: differs by"):
        assert_same_number({"a": [mistaken(PARTS)]}, {"a": [WHOLE]})
    with pytest.raises(AssertionError, match="compare float64 models"):
        assert_same_number(WHOLE.float(), WHOLE.float())
    with pytest.raises(AssertionError, match="keys differ: .*'b'"):
        assert_same_number({"a": WHOLE}, {"a": WHOLE, "b": WHOLE})
    with pytest.raises(AssertionError, match="1.5"):
        assert_same_number([1.5], [1.50001])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["largest", "average", "mapping"])
def test_as_good_as_torch(dtype, kind):
    x, w = X.to(dtype), W.to(dtype)
    exact = x.double() @ w.double()
    theirs, ours = x @ w, x[:, :40] @ w[:40] + x[:, 40:] @ w[40:]
    noisy = theirs + 40 * (theirs - exact).to(dtype)
    biased = mistaken(exact).to(dtype) if dtype == torch.float32 else exact.to(dtype) * 2
    wrong = (noisy, biased, theirs * float("nan"), theirs[:1])

    def measure(ours, theirs, exact):
        if kind == "mapping":
            return assert_as_good_as_torch({"y": ours, "z": ours}, *({"y": t, "z": t} for t in
                                                                     (theirs, exact)))  # fmt: skip
        return assert_as_good_as_torch(ours, theirs, exact, average=kind == "average")

    measure(ours, theirs, exact)
    measure(exact.to(dtype), theirs, exact)
    for bad in wrong:
        with pytest.raises(AssertionError):
            measure(bad, theirs, exact)
    with pytest.raises(AssertionError, match="expected float64"):
        measure(ours, theirs, exact.float())
