"""The kernel for a batch whose samples name adapters: base product and updates in one launch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import common, mixed, reference
from peftkern.kernels.mixed import MixedConfig
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few, matrix

SMALL = MixedConfig(block_m=16, block_n=16, block_k=32, block_r=16, group_m=2, num_stages=2)
NAN = float("nan")


def adapters(ranks, K, N, dtype, offset=0):
    """A and B for each rank, None for rank 0; with ``offset`` slices of longer rows."""
    As = [matrix(r, K, dtype, seed=5 + i, scale=0.2, offset=offset) for i, r in enumerate(ranks)]
    Bs = [matrix(N, r, dtype, seed=50 + i, scale=0.2, offset=offset) for i, r in enumerate(ranks)]
    gone = [r == 0 for r in ranks]
    return (
        [None if g else a for g, a in zip(gone, As, strict=True)],
        [None if g else b for g, b in zip(gone, Bs, strict=True)],
        [0.25 * (i + 1) for i in range(len(ranks))],
    )


def plain(x, w, As, Bs, scales, index, bias=None):
    """The same in torch, in x's dtype."""
    y = x @ w.T if bias is None else x @ w.T + bias
    T = x.shape[0] // len(index)
    for j, i in enumerate(index):
        if i >= 0 and As[i] is not None:
            part = x[j * T : j * T + T]
            low = scales[i] * (part @ As[i].to(x.dtype).T)
            y[j * T : j * T + T] += low @ Bs[i].to(x.dtype).T
    return y


def check(
    index, T, K, N, ranks, dtype=torch.float32, low=torch.float32, *,
    conv1d=False, bias=False, offset=0, config=SMALL,
):  # fmt: skip
    x = matrix(len(index) * T, K, dtype, seed=0, offset=offset)
    w = matrix(N, K, dtype, seed=1, scale=0.2)
    if conv1d:
        w = matrix(K, N, dtype, seed=1, scale=0.2).T
    c = matrix(1, N, dtype, seed=2)[0] if bias else None
    As, Bs, scales = adapters(ranks, K, N, low, offset)
    out = mixed.mixed(x, w, As, Bs, scales, chosen(index), c, config=config)
    exact = reference.mixed(x, w, As, Bs, scales, index, c)
    assert_as_good_as_torch(out, plain(x, w, As, Bs, scales, index, c), exact)
    return out


def chosen(index):
    return torch.tensor(index, dtype=torch.int32)


@pytest.mark.parametrize("low", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 7])
def test_ranks_that_differ_base_rows_and_repeats(T, dtype, low):
    """With T = 7 the samples straddle the tiles of 16 rows."""
    low = dtype if low == "same" else torch.float32
    check([1, -1, 0, 2, 1, 0, -1], T, 100, 41, (4, 16, 7), dtype, low, bias=True)


@pytest.mark.parametrize("index", [[0], [-1], [1, 1, 1], [-1, -1], [3, 2, 1, 0]])
def test_one_adapter_none_and_all(index):
    check(index, 1, 70, 33, (4, 16, 1, 30))
    check(index, 20, 70, 33, (4, 16, 1, 30))


def test_lanes_past_one_chunk_and_ranks_up_to_256():
    """Chunks of 16 lanes: 100 + 3 + 40 lanes take nine walks, and cut adapters in two."""
    check([0, 2, -1, 1], 2, 40, 35, (100, 3, 40))
    check([0, 1], 3, 40, 35, (256, 129), config=MixedConfig(16, 32, 32, 128))


def test_an_adapter_without_weights_here():
    check([0, 1, 2, 1], 3, 40, 35, (4, 0, 7))
    check([0, 0], 3, 40, 35, (0,))


def test_weights_and_rows_that_are_slices_and_conv1d():
    check([0, 1, -1], 5, 65, 34, (4, 9), conv1d=True, offset=1, bias=True)
    check([0, 1, -1], 5, 65, 34, (4, 9), torch.float16, torch.float16, offset=3)


@pytest.mark.parametrize("M", [1, 16, 40, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_configs(M, dtype):
    """The tiles that are shipped, chosen for a small device; 40 rows of 40 samples, and of 4."""
    check([i % 4 - 1 for i in range(M)], 1, 96, 130, (8, 4, 16), dtype, config=None)
    samples = 4 if M % 4 == 0 else 1
    index = [i - 1 for i in range(samples)]
    check(index, M // samples, 96, 130, (8, 4, 16), dtype, config=None)


@few
@given(
    index=st.lists(st.integers(-1, 2), min_size=1, max_size=7),
    T=st.integers(1, 12),
    K=st.integers(1, 80),
    N=st.integers(1, 50),
    ranks=st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(1, 19)),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
)
def test_any_shape(index, T, K, N, ranks, dtype, same):
    check(index, T, K, N, ranks, dtype, dtype if same else torch.float32, conv1d=same)


def test_adapters_of_both_dtypes_at_once():
    x, w = matrix(4, 40, torch.bfloat16, seed=0), matrix(20, 40, torch.bfloat16, seed=1, scale=0.2)
    As, Bs, scales = adapters((4, 8), 40, 20, torch.float32)
    As[1], Bs[1] = As[1].bfloat16(), Bs[1].bfloat16()
    index = [0, 1, -1, 1]
    out = mixed.mixed(x, w, As, Bs, scales, chosen(index), config=SMALL)
    exact = reference.mixed(x, w, As, Bs, scales, index)
    assert_as_good_as_torch(out, plain(x, w, As, Bs, scales, index), exact)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("broken", ["A", "B", "both"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_rows_do_not_see_the_nan_of_another_rows_adapter(T, broken, value):
    """Neither base rows nor rows of a sound adapter in the same tile; its own rows show it."""
    index = [0, 1, -1]
    x, w = matrix(3 * T, 40, torch.float32, seed=0), matrix(20, 40, torch.float32, seed=1)
    As, Bs, scales = adapters((4, 8), 40, 20, torch.float32)
    if broken != "B":
        As[1][2, 3] = value
    if broken != "A":
        Bs[1][5, 6] = value
    out = mixed.mixed(x, w, As, Bs, scales, chosen(index), config=SMALL)
    sound = [0] * T + [1] * T + [0] * T
    rows = torch.tensor(sound) == 0
    index = [0, -1, -1]
    exact = reference.mixed(x, w, As, Bs, scales, index)
    assert_as_good_as_torch(out[rows], plain(x, w, As, Bs, scales, index)[rows], exact[rows])
    assert not out[~rows][:, 5].isfinite().any()


def test_base_rows_alone_read_no_adapter():
    x, w = matrix(2, 40, torch.float32, seed=0), matrix(20, 40, torch.float32, seed=1)
    As, Bs = [torch.full((4, 40), NAN)], [torch.full((20, 4), NAN)]
    for rows in (1, 2):
        out = mixed.mixed(x[:rows], w, As, Bs, [NAN], chosen([-1] * rows))
        assert_as_good_as_torch(out, x[:rows] @ w.T, reference.linear(x[:rows], w))


def test_an_index_out_of_range_on_the_device_is_the_base_alone():
    x, w = matrix(6, 40, torch.float32, seed=0), matrix(20, 40, torch.float32, seed=1)
    As, Bs, scales = adapters((4, 8, 3), 40, 20, torch.float32)
    wild = [0, 3, 64, -7, 2**31 - 1, 2]  # 3 is the slot that pads three adapters to four
    out = mixed.mixed(x, w, As, Bs, scales, chosen(wild), config=SMALL)
    same = mixed.mixed(x, w, As, Bs, scales, chosen([0, -1, -1, -1, -1, 2]), config=SMALL)
    assert torch.equal(out, same)


def test_one_launch_whatever_the_batch(monkeypatch):
    ran, run = [], common.Launch.run
    monkeypatch.setattr(common.Launch, "run", lambda launch: (ran.append(launch), run(launch))[1])
    check([0, 1, -1, 0], 1, 40, 20, (4, 100))
    check([0, 1, -1, 0], 9, 40, 20, (4, 100))
    assert len(ran) == 2


def test_kernels_are_few_whatever_the_ranks():
    """One compiled kernel serves all ranks, scales, and counts of adapters up to a power of two.

    Not even a rank of 1 or a multiple of 16 may get a kernel of its own.
    """
    x, w = torch.empty(8, 64), torch.empty(48, 64)

    def key(ranks):
        As = [torch.empty(r, 64) for r in ranks]
        Bs = [torch.empty(48, r) for r in ranks]
        index = torch.zeros(8, dtype=torch.int32)
        (launch,) = mixed.plan_mixed(
            torch.empty(8, 48), x, w, As, Bs, [1.0] * len(As), index, None,
            MixedConfig(block_r=64),
        )  # fmt: skip
        named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert all(v % 16 == 0 for v in named["ranks"]) and named["a_strides"] is None
        assert launch.meta["ALIGNED"]  # A is read 16 bytes at a time
        return launch.meta, len(named["As"])

    assert key((1, 16, 5)) == key((16, 7, 1, 8))


def test_offsets_past_int32():
    """Rows of x, w and A that start past 2**31 elements."""
    far, near = far_rows(3, 40, seed=0), matrix(3, 40, torch.float16, seed=1, scale=0.2)
    B = [matrix(3, 3, torch.float16, seed=2, scale=0.2)]
    for x, w, A in ((far, near, near), (near, far, near), (near, near, far)):
        index = [0, -1, 0]
        out = mixed.mixed(x, w, [A], B, [0.5], chosen(index), config=SMALL)
        exact = reference.mixed(x, w, [A], B, [0.5], index)
        assert_as_good_as_torch(out, plain(x, w, [A], B, [0.5], index), exact)
    B = far_rows(3, 3, seed=2)
    out = mixed.mixed(near, near, [near], [B], [0.5], chosen([0, 0, 0]), config=SMALL)
    exact = reference.mixed(near, near, [near], [B], [0.5], [0, 0, 0])
    assert_as_good_as_torch(out, plain(near, near, [near], [B], [0.5], [0, 0, 0]), exact)


def test_empty():
    A, B = [torch.ones(2, 4)], [torch.ones(7, 2)]
    none = torch.empty(0, dtype=torch.int32)
    assert mixed.mixed(torch.ones(0, 4), torch.ones(7, 4), A, B, [1.0], none).shape == (0, 7)
    assert mixed.mixed(torch.ones(0, 4), torch.ones(7, 4), A, B, [1.0], chosen([0])).shape == (0, 7)
    y = mixed.mixed(torch.ones(2, 4), torch.ones(7, 4), [], [], [], chosen([-1, 0]))
    assert torch.equal(y, torch.full((2, 7), 4.0))


def test_every_config_fits_its_device():
    for arch in (common.Arch(108, 80, 101376), common.Arch(132, 90, 232448)):
        for M, T in ((1, 1), (16, 1), (64, 1), (300, 1), (8192, 1), (8192, 1024)):
            for ranks in ((1,), (16,) * 8, (256,) * 64):
                for size in (2, 4):
                    c = mixed.default_config(M, 4096, T, ranks, arch, itemsize=size)
                    assert c.shared_bytes(size, 4) <= arch.shared
                    assert c.block_m >= min(M, 64)


def test_bad_arguments_are_named():
    x, w, index = torch.ones(4, 6), torch.ones(7, 6), chosen([0, 1])
    A, B, scales = [torch.ones(3, 6)] * 2, [torch.ones(7, 3)] * 2, [1.0, 1.0]
    assert mixed.mixed(x, w, A, B, scales, index).shape == (4, 7)

    def bad(error, match, **given):
        arguments = dict(x=x, w=w, As=A, Bs=B, scales=scales, index=index) | given
        with pytest.raises(error, match=match):
            mixed.mixed(**arguments)

    bad(TypeError, "x has dtype torch.int64", x=x.long())
    bad(TypeError, "w has dtype torch.float16; allowed: torch.float32", w=w.half())
    bad(ValueError, r"w has shape \(7, 5\); allowed: \(7, 6\)", w=torch.ones(7, 5))
    bad(ValueError, r"As\[1\] has shape \(3, 5\)", As=[A[0], torch.ones(3, 5)])
    bad(ValueError, r"Bs\[1\] has shape \(7, 2\); allowed: \(7, 3\)", Bs=[B[0], torch.ones(7, 2)])
    bad(ValueError, r"As\[0\] has rank 0", As=[torch.ones(0, 6)] * 2, Bs=[torch.ones(7, 0)] * 2)
    bad(ValueError, r"As\[0\] has rank 257", As=[torch.ones(257, 6)] * 2)
    bad(TypeError, r"As\[0\] has dtype torch.float64", As=[A[0].double()] * 2)
    bad(TypeError, r"Bs\[1\] has dtype torch.int32", Bs=[B[0], B[0].int()])
    bad(ValueError, r"As\[1\] and Bs\[1\]: allowed: both, or neither", As=[A[0], None])
    bad(ValueError, "2, 2 and 1 entries; allowed: equal counts, at most 64", scales=[1.0])
    many = dict(As=A * 33, Bs=B * 33, scales=scales * 33)
    bad(ValueError, "66, 66 and 66 entries; allowed: equal counts, at most 64", **many)
    bad(TypeError, "index has dtype torch.int64; allowed: torch.int32", index=index.long())
    bad(
        ValueError, r"index has shape \(3,\); allowed: .* a divisor of x's 4", index=chosen([0] * 3)
    )
    bad(ValueError, r"index has shape \(2, 1\)", index=index[:, None])
    bad(ValueError, r"index has shape \(0,\)", index=index[:0])
    bad(ValueError, r"bias has shape \(6,\); allowed: \(7,\)", bias=torch.ones(6))
    bad(ValueError, "index is on meta; allowed: cpu", index=index.to("meta"))
    bad(ValueError, r"Bs\[1\] is on meta; allowed: cpu", Bs=[B[0], B[0].to("meta")])
    with pytest.raises(ValueError, match="MixedConfig.block_r is 8"):
        MixedConfig(block_r=8)
    with pytest.raises(ValueError, match="MixedConfig.group_m is 0"):
        MixedConfig(group_m=0)
