"""The sum over the experts of each token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import experts_reference
from peftkern.kernels.experts_combine import ExpertsCombineConfig, combine
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few, matrix

pytestmark = pytest.mark.numeric  # of `make test-versions`


def plain(y, weights, k, dtype):
    each = y.float().view(-1, k, y.shape[1])
    return (each if weights is None else each * weights.float()[:, :, None]).sum(1).to(dtype)


def check(T, k, N, dtype, of=torch.float32, out=None, offset=0, config=None):
    y = matrix(T * k, N, dtype, seed=0, offset=offset).contiguous()
    weights = None if of is None else matrix(T, k, of, seed=1, offset=offset)
    made = combine(y, weights, k=k, dtype=out, config=config)
    want = plain(y, weights, k, out or dtype)
    assert_as_good_as_torch(made, want, experts_reference.combine(y, weights, k))


@pytest.mark.parametrize("of", [None, "float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, of):
    of = dtype if of == "same" else of and torch.float32
    check(7, 8, 300, dtype, of)
    check(7, 3, 40, dtype, of, torch.float32, config=ExpertsCombineConfig(16))


@few
@given(
    T=st.integers(1, 20),
    k=st.integers(1, 20),
    N=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    block_n=st.sampled_from([16, 64, None]),
)
def test_any_shape(T, k, N, dtype, out, weighted, block_n):
    config = block_n and ExpertsCombineConfig(block_n)
    check(T, k, N, dtype, torch.float32 if weighted else None, out, int(weighted), config)


def test_rows_that_are_slices_and_rows_past_int32():
    y, weights = matrix(12, 40, torch.float32, seed=0, offset=3), torch.rand(4, 3)
    assert not y.is_contiguous()
    exact = experts_reference.combine(y.contiguous(), weights, 3)
    assert_as_good_as_torch(combine(y, weights), plain(y.contiguous(), weights, 3, y.dtype), exact)
    far = far_rows(3, 40, seed=0)
    near = far.clone()
    assert torch.equal(combine(far, None, k=3), combine(near, None, k=3))
    assert torch.equal(combine(far, None, k=1), near)


def test_the_order_of_experts_is_the_order_of_the_sum():
    """In fp32, 1 + 2**-24 is 1, and 2**-24 + 2**-24 + 1 is more."""
    small = 2.0**-24
    y = torch.tensor([[1.0], [small], [small], [small], [small], [1.0]])
    assert combine(y, None, k=3).tolist() == [[1.0], [1.0 + 2 * small]]


def test_empty():
    assert combine(torch.ones(0, 5), torch.ones(0, 2)).shape == (0, 5)
    assert combine(torch.ones(6, 0), None, k=2).shape == (3, 0)


def test_bad_arguments_are_named():
    y = torch.ones(6, 5)
    with pytest.raises(ValueError, match="k is 4; allowed: a whole number that divides the 6 rows"):
        combine(y, None, k=4)
    with pytest.raises(ValueError, match="k is None; allowed: a whole number"):
        combine(y, None)
    with pytest.raises(ValueError, match=r"weights has shape \(2, 2\); allowed: \(3, 2\)"):
        combine(y, torch.ones(2, 2))
    with pytest.raises(ValueError, match="k is 3; allowed: 2, the columns of weights"):
        combine(y, torch.ones(3, 2), k=3)
    with pytest.raises(TypeError, match="weights has dtype torch.int64; allowed: float16"):
        combine(y, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="dtype is torch.int32; allowed: float16"):
        combine(y, None, k=2, dtype=torch.int32)
    with pytest.raises(ValueError, match="weights is on meta; allowed: cpu"):
        combine(y, torch.ones(3, 2, device="meta"))
