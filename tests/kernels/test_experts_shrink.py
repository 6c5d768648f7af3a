"""S of the rows of a mixture, each with the A of its expert, against float64; and its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import experts_reference as reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.experts_shrink import ExpertsShrinkConfig, shrink
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


def plain(product, x, route, a, scale, gather, keep):
    """The formula in x's own dtype, group by group."""
    x = x[(route.pairs // route.k).long()] if gather else x
    x = x if keep is None else x * keep
    out = x.new_zeros(route.P, max(t.shape[1] for t in a if t is not None))
    for expert, i, rows in reference.groups_of(route):
        if a[i] is not None:
            s = scale[i] * product(x[rows], a[i][expert].to(x.dtype).T)
            out[rows, : s.shape[1]] = s
    return out


def check(route, x, a, gather, keep=None, config=None):
    scale = [1.7 + i for i in range(len(a))]
    bits = None if keep is None else pack_bits(keep)
    out = shrink(x, route, a, scale, gather=gather, bits=bits, config=config)
    assert out.dtype == x.dtype
    exact = reference.shrink(x, route, a, scale, gather, keep)
    own = [
        used(plain(product, x, route, a, scale, gather, keep), route)
        for product in (torch.matmul, by_tiles)
    ]
    assert_as_good_as_torch(used(out, route), own, used(exact, route))
    again = shrink(x, route, a, scale, gather=gather, bits=bits, config=config)
    assert torch.equal(used(out, route), used(again, route)), "two runs differ"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, k, experts, r, K, how, masked",
    [
        (41, 2, 3, 5, 341, "any", True),
        (9, 8, 64, 16, 96, "any", False),
        (70, 1, 4, 3, 64, "one", True),
        (20, 3, 16, 33, 40, "few", False),
        (12, 2, 4, 256, 40, "elsewhere", True),
        (1, 1, 1, 1, 1100, "any", False),
        (5, 2, 512, 8, 64, "any", False),
    ],
)
def test_against_float64(T, k, experts, r, K, how, masked, dtype):
    route = routed(T, k, experts, 32, how)
    keep = keep_mask(route.P, K, 3) if masked else None
    a = [factors(experts, r, K, torch.float32)]
    check(route, matrix(T, K, dtype, seed=0, offset=1), a, True, keep)
    check(route, matrix(route.P, K, dtype, seed=0, offset=1), a, False, keep)


@few
@given(
    T=st.integers(1, 40),
    k=st.integers(1, 4),
    experts=st.integers(1, 6),
    r=st.integers(1, 40),
    K=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    layout=st.sampled_from("ab"),
    gather=st.booleans(),
    masked=st.booleans(),
    block_m=st.sampled_from([16, 64]),
    split=st.integers(1, 3),
)
def test_any_shape(T, k, experts, r, K, dtype, same, layout, gather, masked, block_m, split):
    route = routed(T, k, experts, 32)
    a = factors(experts, r, K, dtype if same else torch.float32, layout)
    x = matrix(T if gather else route.P, K, dtype, seed=0)
    keep = keep_mask(route.P, K, 3) if masked else None
    config = ExpertsShrinkConfig(block_m=block_m, block_k=32, split_k=split)
    check(route, x, [a], gather, keep, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [64, 75])
def test_each_token_has_its_adapter(K, dtype):
    route = routed(30, 2, 3, 16, adapters=4)
    a = [
        factors(3, 5, K, torch.float32),
        factors(3, 40, K, torch.float32, "b"),
        None,
        factors(3, 16, K, torch.float32),
    ]
    out = check(route, matrix(30, K, dtype, seed=0), a, True, keep_mask(60, K, 1))
    assert out.shape == (60, 40)
    for _, i, rows in reference.groups_of(route):
        assert not out[rows, 0 if a[i] is None else a[i].shape[1] :].any()
    dense = [a[0], None, a[3], factors(3, 8, K, dtype)]  # one dtype differs: all are fp32
    check(route, matrix(60, K, dtype, seed=0), dense, False)


def test_adapters_of_large_rank():
    route = routed(20, 1, 2, 16, adapters=2)
    a = [factors(2, 200, 40, torch.float32), factors(2, 4, 40, torch.float32)]
    check(route, matrix(20, 40, torch.float16, seed=0), a, True)


def test_offsets_past_int32():
    route = routed(3, 2, 2, 16)
    check(route, far_rows(3, 64, seed=0), [factors(2, 4, 64, torch.float32)], True)


def test_empty():
    route = routed(0, 2, 3)
    a = factors(3, 5, 8, torch.float32)
    assert shrink(torch.ones(0, 8), route, [a], gather=True).shape == (0, 5)
    route = routed(4, 2, 3)
    assert not shrink(torch.ones(4, 0), route, [a[:, :, :0]], gather=True).any()


def test_no_pair_is_here():
    route = routed(4, 2, 3)._replace(offsets=torch.zeros(4, dtype=torch.int32))
    route = route._replace(tile_group=torch.full_like(route.tile_group, -1))
    a = factors(3, 5, 8, torch.float32)
    assert used(shrink(torch.ones(4, 8), route, [a], gather=True), route).shape == (0, 5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4)}, ValueError, r"x has shape \(4,\); allowed: a matrix"),
        ({"x": torch.ones(4, 8).double()}, TypeError, "x has dtype torch.float64"),
        ({"x": torch.ones(8, 8)}, ValueError, r"x has shape \(8, 8\); allowed: \(4, 8\)"),
        ({"gather": False}, ValueError, r"x has shape \(4, 8\); allowed: \(8, 8\)"),
        ({"a": []}, ValueError, "a has 0 entries; allowed: 1"),
        ({"a": [None]}, ValueError, "a has no tensor"),
        ({"a": [torch.ones(2, 8)]}, ValueError, r"a\[0\] has shape \(2, 8\); allowed: \[E, r, K\]"),
        ({"a": [torch.ones(3, 257, 8)]}, ValueError, r"a\[0\] has rank 257"),
        ({"a": [torch.ones(2, 2, 8)]}, ValueError, r"a\[0\] has shape \(2, 2, 8\)"),
        ({"a": [torch.ones(3, 2, 8).half()]}, TypeError, r"a\[0\] has dtype torch.float16"),
        ({"a": [torch.ones(3, 2, 8, device="meta")]}, ValueError, r"a\[0\] is on meta"),
        ({"scale": [1.0, 2.0]}, ValueError, "scale has 2 entries; allowed: 1"),
        ({"bits": torch.zeros(8, 1)}, TypeError, "bits has dtype torch.float32"),
        ({"bits": torch.zeros(4, 1, dtype=torch.int32)}, ValueError, r"bits has shape \(4, 1\)"),
    ],
)
def test_bad_arguments_are_named_before_any_launch(change, error, message):
    good = {"x": torch.ones(4, 8), "a": [torch.ones(3, 2, 8)], "scale": 1.0, "gather": True}
    with pytest.raises(error, match=message):
        shrink(route=routed(4, 2, 3), **{**good, **change})


@pytest.mark.parametrize("field", [{"block_m": 24}, {"block_k": 16}, {"split_k": 0}])
def test_invalid_configs_are_refused(field):
    with pytest.raises(ValueError, match=f"ExpertsShrinkConfig.{next(iter(field))} is"):
        ExpertsShrinkConfig(**field)
