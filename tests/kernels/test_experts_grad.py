"""The gradients of a mixture's factors and of S, against float64; two runs give the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import experts_reference as reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.experts_grad import ExpertsGradConfig, grad_a, grad_sb
from tests.kernels.experts import by_tiles, factors, routed, used
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    matrix,
)

pytestmark = pytest.mark.numeric  # of `make test-versions`

PRODUCTS = (torch.matmul, by_tiles)


def rows_of(x, route, gather, keep=None):
    x = x[(route.pairs // route.k).long()] if gather else x
    return x if keep is None else x * keep


def weighted(s, route, weight):
    if weight is None:
        return s
    sorted_weight = weight.reshape(-1)[route.pairs.long()].float()
    return (s.float() * sorted_weight[:, None]).to(s.dtype)


def plain_outer(product, left, right, route):
    out = torch.zeros(route.experts, left.shape[1], right.shape[1])
    for expert, _, rows in reference.groups_of(route):
        out[expert] = product(left[rows].T, right[rows])
    return out


def plain_ds(product, dy, b, route, scale):
    out = dy.new_zeros(route.P, b.shape[2])
    for expert, _, rows in reference.groups_of(route):
        out[rows] = scale * product(dy[rows], b[expert].to(dy.dtype))
    return out


def check_grad_sb(route, dy, b, gather, weight=None, config=None, offset=1):
    s = matrix(route.P, b.shape[2], dy.dtype, seed=4, offset=offset)
    run = lambda: grad_sb(dy, route, b, s, 1.7, gather=gather, row_weight=weight, config=config)  # noqa: E731
    ds, db = run()
    assert ds.dtype == dy.dtype and db.dtype == torch.float32 and db.stride() == b.stride()
    gs = rows_of(dy, route, gather)
    own = [used(plain_ds(product, gs, b, route, 1.7), route) for product in PRODUCTS]
    exact = used(reference.grad_s(dy, route, b, 1.7, gather), route)
    assert_as_good_as_torch(used(ds, route), own, exact)
    sw = weighted(s, route, weight)
    assert_as_good_as_torch(
        db,
        [plain_outer(product, gs, sw, route) for product in PRODUCTS],
        reference.grad_b(dy, route, s, gather, weight),
    )
    again = run()
    assert torch.equal(used(ds, route), used(again[0], route)), "two runs differ"
    assert torch.equal(db, again[1]), "two runs differ"


def check_grad_a(route, x, r, gather, keep=None, weight=None, config=None, offset=1):
    ds = matrix(route.P, r, x.dtype, seed=6, offset=offset)
    bits = None if keep is None else pack_bits(keep)
    run = lambda: grad_a(  # noqa: E731
        ds, x, route, gather=gather, row_weight=weight, bits=bits, config=config
    )
    da = run()
    assert da.dtype == torch.float32 and da.is_contiguous()
    xs, dw = rows_of(x, route, gather, keep), weighted(ds, route, weight)
    assert_as_good_as_torch(
        da,
        [plain_outer(product, dw, xs, route) for product in PRODUCTS],
        reference.grad_a(ds, x, route, gather, weight, keep),
    )
    assert torch.equal(da, run()), "two runs differ"


def weights_of(route, dtype):
    g = torch.Generator().manual_seed(8)
    return torch.rand(route.P // route.k, route.k, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, k, experts, r, N, how, masked",
    [
        (41, 2, 3, 5, 341, "any", True),
        (9, 8, 64, 16, 96, "any", False),
        (150, 1, 4, 3, 64, "one", True),
        (20, 3, 16, 33, 40, "few", False),
        (12, 2, 4, 100, 40, "elsewhere", True),
        (8, 2, 2, 256, 64, "any", False),
        (1, 1, 1, 1, 300, "any", False),
    ],
)
def test_against_float64(T, k, experts, r, N, how, masked, dtype):
    route = routed(T, k, experts, 32, how)
    weight = weights_of(route, torch.float32)
    dy = matrix(T, N, dtype, seed=0, offset=1)
    check_grad_sb(route, dy, factors(experts, r, N, torch.float32, "b").mT, True, weight)
    keep = keep_mask(route.P, N, 3) if masked else None
    check_grad_a(route, matrix(route.P, N, dtype, seed=2, offset=1), r, False, keep, weight)


@few
@given(
    T=st.integers(1, 40),
    k=st.integers(1, 4),
    experts=st.integers(1, 6),
    r=st.integers(1, 40),
    N=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    layout=st.sampled_from("ab"),
    gather=st.booleans(),
    masked=st.booleans(),
    weights=st.sampled_from(["none", "own", "fp32"]),
    block_c=st.sampled_from([32, 64]),
)
def test_any_shape(T, k, experts, r, N, dtype, same, layout, gather, masked, weights, block_c):
    route = routed(T, k, experts, 32)
    b = factors(experts, r, N, dtype if same else torch.float32, layout).mT
    x = matrix(T if gather else route.P, N, dtype, seed=0)
    own = {"none": None, "own": dtype, "fp32": torch.float32}[weights]
    weight = None if own is None else weights_of(route, own)
    config = ExpertsGradConfig(block_m=16, block_c=block_c)
    check_grad_sb(route, x, b, gather, weight, config, offset=0)
    keep = keep_mask(route.P, N, 3) if masked else None
    check_grad_a(route, x, r, gather, keep, weight, config, offset=0)


def test_many_experts_without_rows_have_zeros():
    route = routed(6, 1, 512, 16, "few")
    x = matrix(6, 32, torch.float32, seed=0)
    check_grad_sb(route, x, factors(512, 2, 32, torch.float32, "b").mT, True)
    check_grad_a(route, x, 2, True)


def test_weights_as_pairs():
    route = routed(10, 2, 3)
    weight = weights_of(route, torch.float32)
    ds, x = matrix(20, 4, torch.float32, seed=0), matrix(10, 40, torch.float32, seed=1)
    one, other = (
        grad_a(ds, x, route, gather=True, row_weight=w) for w in (weight, weight.view(-1))
    )
    assert torch.equal(one, other)


def test_a_row_beyond_an_expert_does_not_reach_it():
    """A tile may have rows of the next expert after the last; infinite ones would show."""
    route = routed(20, 1, 2, 16)
    cut = int(route.offsets[1])
    assert cut % 16
    s, x = matrix(20, 4, torch.float32, seed=0), matrix(20, 40, torch.float32, seed=1)
    far = x.clone()
    far[cut:] = float("inf")
    b = factors(2, 4, 40, torch.float32, "b").mT
    for rows in (x, far):
        ds, db = grad_sb(rows, route, b, s, gather=False)
        da = grad_a(s, rows, route, gather=False)
        assert ds[:cut].isfinite().all() and db[0].isfinite().all() and da[0].isfinite().all()


def test_offsets_past_int32():
    route = routed(3, 2, 2, 16)
    x = far_rows(3, 64, seed=0)
    check_grad_sb(route, x, factors(2, 4, 64, torch.float32, "b").mT, True)
    check_grad_a(route, x, 4, True)


def test_empty():
    route = routed(0, 2, 3)
    b = factors(3, 5, 8, torch.float32, "b").mT
    ds, db = grad_sb(torch.ones(0, 8), route, b, torch.ones(0, 5), gather=True)
    assert ds.shape == (0, 5) and db.shape == (3, 8, 5) and not db.any()
    assert not grad_a(torch.ones(0, 5), torch.ones(0, 8), route, gather=False).any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"dy": torch.ones(8, 8)}, ValueError, r"dy has shape \(8, 8\); allowed: \(4, 8\)"),
        ({"dy": torch.ones(4, 8).long()}, TypeError, "dy has dtype torch.int64"),
        ({"b": torch.ones(3, 5, 8)}, ValueError, r"b has shape \(3, 5, 8\); allowed: \(3, 8, 5\)"),
        ({"b": torch.ones(3, 8, 5).half()}, TypeError, "b has dtype torch.float16"),
        ({"s": torch.ones(4, 5)}, ValueError, r"s has shape \(4, 5\); allowed: \(8, 5\)"),
        ({"s": torch.ones(8, 5).half()}, TypeError, "s has dtype torch.float16; allowed: float32"),
        ({"row_weight": torch.ones(2, 4)}, ValueError, r"row_weight has shape \(2, 4\)"),
        ({"row_weight": torch.ones(8).half()}, TypeError, "row_weight has dtype torch.float16"),
        ({"row_weight": torch.ones(8, device="meta")}, ValueError, "row_weight is on meta"),
        ({"route": routed(4, 2, 3, adapters=2)}, ValueError, "route has 2 adapters; allowed: 1"),
    ],
)
def test_bad_arguments_of_grad_sb_are_named(change, error, message):
    good = dict(
        dy=torch.ones(4, 8), route=routed(4, 2, 3), b=torch.ones(3, 8, 5), s=torch.ones(8, 5)
    )
    with pytest.raises(error, match=message):
        grad_sb(gather=True, **{**good, **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(8, 8)}, ValueError, r"x has shape \(8, 8\); allowed: \(4, 8\)"),
        ({"ds": torch.ones(4, 5)}, ValueError, r"ds has shape \(4, 5\); allowed: \(8, 5\)"),
        ({"ds": torch.ones(8, 0)}, ValueError, "ds has rank 0"),
        ({"bits": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, r"bits has shape \(4, 1\)"),
        ({"row_weight": torch.ones(9)}, ValueError, r"row_weight has shape \(9,\)"),
        ({"route": routed(4, 2, 3, adapters=2)}, ValueError, "route has 2 adapters; allowed: 1"),
    ],
)
def test_bad_arguments_of_grad_a_are_named(change, error, message):
    good = dict(ds=torch.ones(8, 5), x=torch.ones(4, 8), route=routed(4, 2, 3))
    with pytest.raises(error, match=message):
        grad_a(gather=True, **{**good, **change})


@pytest.mark.parametrize("field", [{"block_m": 24}, {"block_c": 16}, {"num_stages": 0}])
def test_invalid_configs_are_refused(field):
    with pytest.raises(ValueError, match=f"ExpertsGradConfig.{next(iter(field))} is"):
        ExpertsGradConfig(**field)
