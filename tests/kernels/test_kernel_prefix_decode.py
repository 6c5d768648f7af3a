"""The kernel for prefix attention split over the keys, for decoding.

It equals the last rows of the forward, reads the prefix once for the batch, and reads no key beyond
an offset that lies on the device.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels.common import arch_of
from peftkern.kernels.prefix_attention import attend
from peftkern.kernels.prefix_decode import DecodeConfig, decode, few_rows, plan_decode
from peftkern.kernels.prefix_tile import check
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few
from tests.kernels.test_kernel_prefix import MASKS, SMALL, assert_lse, by_torch, draw

SPLIT = DecodeConfig(16, 16, 16, 2, 2, 4, 1)
ARCH = arch_of(torch.device("cpu"))


def verify(tensors, options, config=SPLIT):
    o, lse = decode(*tensors, **options, config=config)
    exact = by_torch(tensors, None, torch.float64, options)
    assert o.dtype == tensors[0].dtype
    plain = by_torch(tensors, None, o.dtype, options)
    assert_as_good_as_torch(o, plain[0], exact[0])
    assert_lse(lse, tensors, exact[1], options)
    again = decode(*tensors, **options, config=config)
    assert torch.equal(o, again[0]) and torch.equal(lse, again[1])
    return o, lse


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask, T):
    verify(draw(2, 2, 1, T, 35, 19, 24, torch.bfloat16), MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "left padded", "window", "sinks"])
def test_it_is_the_last_row_of_the_forward(mask, dtype):
    q, *rest = draw(2, 2, 1, 18, 35, 19, 16, dtype)
    o, lse = attend(q, *rest, **MASKS[mask], config=SMALL)
    last, last_lse = decode(q[:, :, -1:], *rest, **MASKS[mask], config=SPLIT)
    exact = by_torch([q, *rest], None, torch.float64, MASKS[mask])
    assert_as_good_as_torch(last, o[:, :, -1:], exact[0][:, :, -1:])
    seen = exact[1][:, :, -1:].isfinite()
    assert_as_good_as_torch(*(t[:, :, -1:][seen] for t in (last_lse[..., -1:], lse, exact[1])))


@pytest.mark.long
@few
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)),
    T=st.integers(1, 4),
    more=st.integers(0, 70),
    P=st.integers(0, 40),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    splits=st.tuples(st.integers(1, 4), st.integers(1, 3)),
)
def test_any_shape(sizes, T, more, P, D, dtype, shared, splits):
    B, H_kv, group = sizes
    tensors = draw(B, group * H_kv, H_kv, T, T + more, P, D, dtype, shared=shared)
    verify(tensors, {}, DecodeConfig(16, 32, 16, *splits, 4, 1))


@pytest.mark.long
def test_default_config_and_rows_over_several_tiles():
    verify(draw(3, 10, 1, 2, 40, 20, 16), {}, None)
    verify(draw(2, 10, 1, 2, 9, 5, 16, shared=False), {})


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])])
def test_more_parts_than_a_merge_loads_at_a_time(sinks):
    """Eight parts of D=256 are one load; there are 11, of which the last is short."""
    tensors = draw(2, 2, 1, 2, 130, 20, 200)
    x = check(*tensors)
    o = x.rows_like_q()
    config = DecodeConfig(16, 16, 16, 9, 2)
    merge = plan_decode(x, o, o[..., 0], config, ARCH)[1]
    assert merge.meta["CHUNK"] == 8 and merge.args[-1] == 11
    verify(tensors, dict(sinks=sinks), config)


def test_offsets_past_int32():
    q, _, _, pk, pv = draw(1, 1, 1, 1, 3, 2, 16, torch.float16)
    k, v = (far_rows(3, 16, seed=i)[None, None] for i in range(2))
    verify([q, k, v, pk, pv], {})


def test_what_lies_past_a_device_offset_is_not_read():
    """A StaticCache: room for 64 keys, of which 20 and 41 are there; NaN in the rest."""
    q, k, v, pk, pv = draw(2, 2, 1, 1, 64, 6, 16)
    at = torch.tensor([19, 40], dtype=torch.int32)
    rows = [
        (q[i : i + 1], k[i : i + 1, :, : n + 1], v[i : i + 1, :, : n + 1], pk, pv)
        for i, n in enumerate(at.tolist())
    ]
    want = torch.cat([attend(*row)[0] for row in rows])
    exact = torch.cat([by_torch(row, None, torch.float64, {})[0] for row in rows])
    for i, n in enumerate(at.tolist()):  # what is in ``rows`` stays
        k[i, :, n + 1 :], v[i, :, n + 1 :] = float("nan"), float("nan")
    o, _ = decode(q, k, v, pk, pv, q_offset=at, config=DecodeConfig(16, 16, 16, 4, 1, 4, 1))
    assert_as_good_as_torch(o, want, exact)
    # the launches are the same whatever the offset is: a graph replays them
    plans = [
        plan_decode(check(q, k, v, pk, pv, q_offset=a), o, o[..., 0], SPLIT, ARCH)
        for a in (at, at + 9)
    ]
    assert [p.grid for p in plans[0]] == [p.grid for p in plans[1]]


def test_padding_may_hold_anything():
    q, k, v, pk, pv = draw(2, 2, 1, 1, 35, 19, 16)
    keep = MASKS["left padded"]["keep"]
    o, _ = decode(q, k, v, pk, pv, keep=keep, config=SPLIT)
    k, v = (t.masked_fill(~keep[:, None, :, None], float("nan")) for t in (k, v))
    assert torch.equal(decode(q, k, v, pk, pv, keep=keep, config=SPLIT)[0], o)


def test_a_shared_prefix_is_read_once_for_the_batch():
    """The programs over a shared prefix do not grow with the batch; over one a row they do."""

    def programs(B, shared):
        q, k, v, pk, pv = draw(B, 4, 2, 1, 8, 32, 16, shared=shared)
        launch = plan_decode(check(q, k, v, pk, pv), q, q[..., 0], SPLIT, ARCH)[0]
        names = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert launch.grid[0] == names["PROGRAMS_P"] + B * 2
        return names["PROGRAMS_P"]

    assert programs(1, True) == programs(8, True) == 2 * 2  # key/value heads x stretches
    assert programs(8, False) == 8 * programs(1, False)


def test_nothing_to_see():
    tensors = draw(2, 2, 1, 1, 0, 0, 16)
    o, lse = decode(*tensors, causal=False)
    assert not o.any() and bool((lse == float("-inf")).all())
    o, lse = decode(*draw(0, 2, 1, 1, 4, 3, 16))
    assert o.shape == (0, 2, 1, 16)
    keep, none = torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    o, lse = decode(*draw(2, 2, 1, 1, 20, 3, 16), keep=keep, no_prefix=none, config=SPLIT)
    assert not o.any() and bool((lse == float("-inf")).all())


def test_few_rows():
    assert few_rows(1, 4) and few_rows(8, 8) and few_rows(1, 64)
    assert not few_rows(17, 1) and not few_rows(9, 8) and not few_rows(1024, 4)


@pytest.mark.parametrize(
    "field", [{"block_m": 24}, {"block_r": 8}, {"block_n": 0}, {"splits": 0}, {"prefix_splits": 0}]
)
def test_invalid_configs_are_refused(field):
    with pytest.raises(ValueError, match=f"DecodeConfig.{next(iter(field))} is"):
        DecodeConfig(**field)


def test_arguments_are_checked_as_in_the_forward():
    with pytest.raises(ValueError, match="window is 0"):
        decode(*draw(1, 1, 1, 1, 4, 3, 16), window=0)
