"""The order of rows that kernels for mixtures of experts take, against a plain loop over pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels.experts_route import by_sorting, most_tiles, route
from tests.kernels.oracle import few

pytestmark = pytest.mark.numeric  # of `make test-versions`


def check(index, experts, block_m, choice=None, adapters=1):
    T, k = index.shape
    groups = experts * adapters
    chosen = [0] * T if choice is None else choice.tolist()

    def group_of(pair):
        expert, adapter = int(index[pair // k, pair % k]), chosen[pair // k]
        known = 0 <= expert < experts and 0 <= adapter < adapters
        return expert * adapters + adapter if known else groups

    of_pairs = [group_of(pair) for pair in range(T * k)]
    pairs = sorted(range(T * k), key=of_pairs.__getitem__)  # a stable sort
    starts = [sum(g < group for g in of_pairs) for group in range(groups + 1)]
    tiles = [
        (group, first)
        for group in range(groups)
        for first in range(starts[group], starts[group + 1], block_m)
    ]
    for way in (route, by_sorting):
        found = way(index, experts, block_m, choice, adapters)
        assert found.pairs.tolist() == pairs, way
        assert found.offsets.tolist() == starts, way
        shown = list(zip(found.tile_group.tolist(), found.tile_start.tolist(), strict=True))
        assert shown == tiles + [(-1, T * k)] * (len(shown) - len(tiles)), way
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in found[:4])
        assert (found.P, found.groups, found.tiles) == (T * k, groups, len(shown))
        assert found[4:] == (block_m, k, experts, adapters)


@few
@given(
    T=st.integers(0, 60),
    k=st.integers(1, 8),
    experts=st.sampled_from([1, 3, 8, 33]),
    adapters=st.integers(1, 3),
    strangers=st.integers(0, 3),
    block_m=st.sampled_from([16, 32]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_any_routing(T, k, experts, adapters, strangers, block_m, dtype):
    g = torch.Generator().manual_seed(T)
    low, high = -(strangers // 2), experts + strangers
    index = torch.randint(low, high, (T, k), generator=g).to(dtype)
    last = adapters + strangers // 2
    choice = torch.randint(0, last, (T,), generator=g).to(dtype) if adapters > 1 else None
    check(index, experts, block_m, choice, adapters)


@pytest.mark.parametrize("experts", [1, 8, 512])
def test_all_tokens_on_one_expert(experts):
    check(torch.full((70, 1), experts - 1), experts, 16)


@pytest.mark.parametrize("experts", [1024, 1025])
def test_many_experts(experts):
    """The kernels' most, and more."""
    g = torch.Generator().manual_seed(0)
    check(torch.randint(0, experts, (30, 2), generator=g), experts, 16)


def test_many_pairs():
    """Chunks of several blocks."""
    g = torch.Generator().manual_seed(0)
    check(torch.randint(0, 5, (4500, 2), generator=g), 4, 64)


def test_strided_index_and_choice():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 4, (3, 50), generator=g).t()[:, 1:]
    check(index, 4, 16, torch.randint(0, 2, (100,), generator=g)[::2], 2)


def test_all_pairs_elsewhere():
    check(torch.full((9, 2), 8), 8, 16)


def test_no_routing_needs_more_tiles_than_are_made():
    """The worst: a group of many rows whose last tile has one, and groups of one row."""
    for P, groups, block_m in ((100, 8, 16), (5, 8, 16), (16, 1, 16), (17, 2, 16), (1, 512, 64)):
        alone = min(P, groups) - 1
        index = torch.tensor([[0]] * (P - alone) + [[1 + i] for i in range(alone)])
        used = int((route(index, groups, block_m).tile_group >= 0).sum())
        assert used <= most_tiles(P, groups, block_m)
    assert most_tiles(113, 8, 16) == 15 and most_tiles(0, 8, 16) == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"index": torch.zeros(3)}, ValueError, r"index has shape \(3,\); allowed: a matrix"),
        ({"index": torch.zeros(3, 2)}, TypeError, "index has dtype torch.float32; allowed: int64"),
        ({"index": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, r"index has shape \(3, 0\)"),
        ({"experts": 0}, ValueError, "experts is 0; allowed: 1 or more"),
        ({"adapters": 0}, ValueError, "adapters is 0; allowed: 1 or more"),
        ({"adapters": 2}, ValueError, "choice is None with adapters=2"),
        ({"block_m": 24}, ValueError, "block_m is 24; allowed: a power of two"),
        ({"block_m": 8}, ValueError, "block_m is 8"),
        ({"choice": torch.zeros(3)}, TypeError, "choice has dtype torch.float32"),
        ({"choice": torch.zeros(2, dtype=torch.int64)}, ValueError, r"choice has shape \(2,\)"),
        (
            {"choice": torch.zeros(3, dtype=torch.int64, device="meta")},
            ValueError,
            "choice is on meta; allowed: cpu",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"index": torch.zeros(3, 2, dtype=torch.int64), "experts": 4, "block_m": 16}
    with pytest.raises(error, match=message):
        route(**{**good, **change})
