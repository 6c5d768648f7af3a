"""The kernels for a batch whose samples name adapters: base product and updates in two launches."""

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import common, mixed, reference
from peftkern.kernels.mixed_config import MixedConfig, default_config, most_tiles
from peftkern.kernels.mixed_segments import find_rows
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few, matrix

SMALL = MixedConfig(block_m=16, block_n=16, block_k=32, low_k=32, group_m=2, num_stages=2)
SPLIT = dataclasses.replace(SMALL, split_k=3, low_split=2, finish_n=16)  # K in parts
H100 = common.Arch(132, 90, 232448)
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
    exact = reference.mixed(x, w, As, Bs, scales, index, c)
    want = plain(x, w, As, Bs, scales, index, c)
    for how in (SMALL, SPLIT) if config == SMALL else (config,):
        out = mixed.mixed(x, w, As, Bs, scales, chosen(index), c, config=how)
        assert_as_good_as_torch(out, want, exact)


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


def test_chunks_of_ranks_up_to_256():
    check([0, 2, -1, 1], 2, 40, 35, (100, 3, 40))
    check([0, 1], 3, 40, 35, (256, 129), config=MixedConfig(16, 32, 32, block_r=128, low_k=32))


def test_a_segment_of_many_tiles():
    check([1] * 50 + [0, 1], 1, 40, 20, (3, 9))


@pytest.mark.long
def test_64_adapters():
    """A row of each, and a second one of some."""
    index = [63 - i % 64 for i in range(70)]
    config = MixedConfig(32, 16, 32, low_k=32, finish_n=16, num_stages=2)
    check(index, 1, 20, 16, [1 + i % 7 for i in range(64)], config=config)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
def test_two_runs_agree_bit_for_bit(config):
    x, w = matrix(20, 100, torch.float16, seed=0), matrix(41, 100, torch.float16, seed=1)
    As, Bs, scales = adapters((20, 7), 100, 41, torch.float32)
    index = chosen([1, 0, 1, -1] * 5)
    first = mixed.mixed(x, w, As, Bs, scales, index, config=config)
    assert torch.equal(first, mixed.mixed(x, w, As, Bs, scales, index, config=config))


def test_an_adapter_without_weights_here():
    check([0, 1, 2, 1], 3, 40, 35, (4, 0, 7))
    check([0, 0], 3, 40, 35, (0,))


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
def test_rows_of_any_size_lose_nothing_in_parts(config):
    """Parts of bf16 are fp16, whose range is far smaller: each row of a tile has its own factor."""
    size = 2.0 ** torch.tensor([120, 40, 17, 0, -20, -60, -110, -125])[:, None]
    x = (matrix(8, 100, torch.float32, seed=0) * size).bfloat16()
    x[3] = 0
    w = matrix(41, 100, torch.bfloat16, seed=1, scale=0.2)
    As, Bs, scales = adapters((4,), 100, 41, torch.float32)
    index = [0, -1] * 4
    out = mixed.mixed(x, w, As, Bs, scales, chosen(index), config=config)
    exact, want = reference.mixed(x, w, As, Bs, scales, index), plain(x, w, As, Bs, scales, index)
    for i in range(8):
        assert_as_good_as_torch(out[i] / size[i], want[i] / size[i], exact[i] / size[i].double())


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_column_that_is_not_finite_is_alone_in_parts(value):
    x, w = matrix(5, 100, torch.bfloat16, seed=0), matrix(41, 100, torch.bfloat16, seed=1)
    sound = [mixed.mixed(x, w, [None], [None], [1.0], chosen([-1] * 5), config=SPLIT)]
    w[7, 50] = value
    out = mixed.mixed(x, w, [None], [None], [1.0], chosen([-1] * 5), config=SPLIT)
    assert not out[:, 7].isfinite().any()
    others = [i for i in range(41) if i != 7]
    exact = reference.linear(x, w[others])
    assert_as_good_as_torch(out[:, others], x @ w[others].T, exact)
    assert sound[0].isfinite().all()


def test_parts_are_short_in_bf16_if_torch_allows_it():
    """And they cost no digit that bf16 keeps: the results hardly differ."""
    matmul = torch.backends.cuda.matmul

    def run(dtype):
        x, w = matrix(16, 512, dtype, seed=0), matrix(64, 512, dtype, seed=1, scale=0.2)
        As, Bs, scales = adapters((4,), 512, 64, torch.float32)
        y, index = torch.empty(16, 64, dtype=dtype), chosen([0] * 16)
        config = dataclasses.replace(SPLIT, split_k=8, block_n=32)
        launches = mixed.plan_mixed(y, x, w, As, Bs, scales, index, None, config, H100)
        for launch in launches:
            launch.run()
        parts, factors = launches[0].args[:2]
        return parts.dtype, None if factors is None else tuple(factors.shape), y

    assert run(torch.float32)[:2] == run(torch.float16)[:2] == (torch.float32, None)
    *kinds, short = run(torch.bfloat16)
    assert kinds == [torch.float16, (8, 2, 16)]
    try:
        matmul.allow_bf16_reduced_precision_reduction = False
        *kinds, whole = run(torch.bfloat16)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True
    assert kinds == [torch.float32, None]
    assert (short != whole).sum() <= whole.numel() // 4
    assert (short - whole).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * whole.abs().max()


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
    index=st.lists(st.integers(-1, 2), min_size=1, max_size=40),
    T=st.integers(1, 3),
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


def test_two_launches_whatever_the_batch(monkeypatch):
    ran, run = [], common.Launch.run
    monkeypatch.setattr(common.Launch, "run", lambda launch: (ran.append(launch), run(launch))[1])
    x, w = matrix(36, 40, torch.float32, seed=0), matrix(20, 40, torch.float32, seed=1)
    As, Bs, scales = adapters((4, 100), 40, 20, torch.float32)
    for config, names in (
        (SMALL, ["_segment_kernel", "_product_kernel"]),
        (SPLIT, ["_parts_kernel", "_finish_kernel"]),
    ):
        for rows in (4, 36):
            mixed.mixed(x[:rows], w, As, Bs, scales, chosen([0, 1, -1, 0]), config=config)
            assert [launch.kernel.__name__ for launch in ran] == names
            del ran[:]
    # the base alone has no segments
    mixed.mixed(x, w, [None], [None], [1.0], chosen([0]), config=SMALL)
    assert [launch.kernel.__name__ for launch in ran] == ["_product_kernel"]


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["whole", "split"])
def test_an_index_rewritten_between_runs_of_the_same_launches(config):
    """What a captured graph replays: nothing of a launch depends on the values of the index."""
    x, w = matrix(40, 50, torch.float32, seed=0), matrix(33, 50, torch.float32, seed=1)
    As, Bs, scales = adapters((4, 20, 9), 50, 33, torch.float32)
    y, index = torch.empty(40, 33), torch.zeros(40, dtype=torch.int32)
    launches = mixed.plan_mixed(y, x, w, As, Bs, scales, index, None, config, H100)
    for choice in ([0] * 40, [-1] * 40, [i % 4 - 1 for i in range(40)], [2] * 39 + [1], [1] * 40):
        index.copy_(chosen(choice))
        y.fill_(NAN)
        for t in (t for launch in launches for t in launch.args if isinstance(t, torch.Tensor)):
            if t.dtype == torch.float32 and t.dim() == 3:
                t.fill_(NAN)  # the parts
        for launch in launches:
            launch.run()
        exact = reference.mixed(x, w, As, Bs, scales, choice)
        assert_as_good_as_torch(y, plain(x, w, As, Bs, scales, choice), exact)


@triton.jit
def _rows_kernel(out, adapter_out, index, samples, T, L, P: tl.constexpr, SAMPLES: tl.constexpr):
    tile = tl.program_id(0)
    adapter, is_first, row, ok = find_rows(tile, index, samples, T, L, P, SAMPLES, 16)
    tl.store(out + tile * 16 + tl.arange(0, 16), tl.where(ok, row, -1))
    tl.store(adapter_out + 2 * tile, adapter)
    tl.store(adapter_out + 2 * tile + 1, is_first.to(tl.int32))


@few
@given(
    index=st.lists(st.integers(-2, 6), min_size=1, max_size=60),
    T=st.sampled_from([1, 2, 7, 40]),
    block=st.sampled_from([1, 8, 64]),
)
def test_rows_are_sorted_by_adapter_in_tiles(index, T, block):
    """Every row of an adapter is in one tile, in its order; tiles are no more than planned."""
    L, P = 5, 8
    grid = most_tiles(len(index) * T, L, len(index), 16)
    out = torch.empty(grid, 16, dtype=torch.int32)
    whose = torch.empty(grid, 2, dtype=torch.int32)
    _rows_kernel[(grid,)](out, whose, chosen(index), len(index), T, L, P=P, SAMPLES=block)
    want, tiles = [], []
    for i in range(L):
        rows = [j * T + t for j, v in enumerate(index) if v == i for t in range(T)]
        want += rows
        tiles += [[i, int(at == 0)] for at in range(0, len(rows), 16)]
    assert out[out >= 0].tolist() == want
    assert whose[: len(tiles)].tolist() == tiles
    assert (whose[len(tiles) :, 0] == P).all() and (out[len(tiles) :] < 0).all()


def test_the_most_tiles_are_reached_by_some_index():
    """Not one program too few, and none that no index could use."""
    for samples, adapters_, block in ((1, 3, 16), (40, 3, 16), (64, 64, 16), (50, 7, 4)):
        counts = [1] * min(samples, adapters_)
        counts[0] += samples - len(counts)
        tiles = sum(-(-c // block) for c in counts)
        assert most_tiles(samples, adapters_, samples, block) == tiles
    assert most_tiles(10, 0, 10, 16) == 0


def test_kernels_are_few_whatever_the_ranks():
    """One compiled kernel serves all ranks, scales, and counts of adapters up to a power of two.

    Not even a rank of 1 or a multiple of 16 may get a kernel of its own. B is read 16 bytes at a
    time if all ranks are multiples of 16 bytes, which is another form of the second kernel.
    """
    x, w = torch.empty(8, 64), torch.empty(48, 64)

    def keys(ranks, config):
        As = [torch.empty(r, 64) for r in ranks]
        Bs = [torch.empty(48, r) for r in ranks]
        index = torch.zeros(8, dtype=torch.int32)
        first, second = mixed.plan_mixed(
            torch.empty(8, 48), x, w, As, Bs, [1.0] * len(As), index, None, config, H100
        )
        named = dict(zip(first.kernel.arg_names, first.args, strict=False))
        assert all(v % 16 == 0 for v in named["ranks"]) and named["a_strides"] is None
        assert first.meta["ALIGNED"]  # A is read 16 bytes at a time
        assert not any(isinstance(a, tuple) for a in second.args)
        return first.meta, second.meta, len(named["As"])

    for config in (MixedConfig(block_r=64), MixedConfig(block_r=64, low_k=32, split_k=2)):
        assert keys((1, 16, 5), config) == keys((16, 7, 1, 8), config)
        assert keys((4, 16), config)[1]["B_ALIGNED"] and not keys((1,), config)[1]["B_ALIGNED"]


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
    # 64 KB: AMD's MI300
    for arch in (common.Arch(108, 80, 101376), H100, common.Arch(304, 80, 65536)):
        for M, T in ((1, 1), (16, 1), (64, 1), (256, 1), (300, 1), (8192, 1), (8192, 1024)):
            for ranks in ((1,), (16,) * 8, (256,) * 64):
                for N, size in itertools.product((1024, 4096, 14336), (2, 4)):
                    c = default_config(M, N, 4096, T, ranks, arch, itemsize=size)
                    assert c.shared_bytes(size, 4) <= arch.shared
                    assert c.block_m >= min(M, 64)
                    programs = -(-M // c.block_m) * -(-N // c.block_n) * c.split_k
                    if M <= 16 and size == 2:
                        assert programs >= min(64, 7 * arch.sms // 16)
                    else:
                        assert 4 * programs >= 3 * arch.sms or N == 1024


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
    with pytest.raises(ValueError, match="MixedConfig.split_k is 0"):
        MixedConfig(split_k=0)
