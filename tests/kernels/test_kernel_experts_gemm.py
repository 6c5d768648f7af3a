"""The grouped product of a mixture's experts, with descriptors and with pointers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import experts_gemm, experts_reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.experts_gemm import ExpertsGemmConfig
from peftkern.kernels.experts_low_rank import aligned
from peftkern.kernels.experts_route import route, rows_of_tile
from tests.closeness import assert_same_number
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, few, keep_mask, matrix

TMA = ExpertsGemmConfig(32, 32, group_m=2, tma=True, num_warps=4, num_stages=2)
POINTERS = ExpertsGemmConfig(32, 32, group_m=2, num_warps=4, num_stages=2)
H200 = experts_gemm.Arch(132, 90, 232448)


def stacked(E, rows, columns, dtype, seed, scale=0.2):
    return matrix(E * rows, columns, dtype, seed=seed, scale=scale).view(E, rows, columns)


def chosen(T, k, experts, seed):
    """k experts of each token, all different."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(T, experts, generator=g).argsort(1)[:, :k]


def plain(x, r, w, s, bs, bias, keep, gather, scatter):
    """The same in torch, in x's dtype."""
    rows = x[r.pairs.long() // r.k] if gather else x
    y = x.new_zeros((r.P, w.shape[1]))
    for e, adapter, at in experts_reference.groups_of(r):
        y[at] = rows[at] @ w[e].T
        if bs is not None and bs[adapter] is not None:
            b = bs[adapter][e].to(x.dtype)
            low = s[at, : b.shape[1]] @ b.T
            y[at] += low if keep is None else low * keep[at]
        if bias is not None:
            y[at] += bias[e]
    return torch.empty_like(y).index_copy_(0, r.pairs.long(), y) if scatter else y


def check(
    index, E, N, K, ranks=(4,), dtype=torch.float32, low=torch.float32, *,
    gather=True, scatter=False, transposed=False, bias=False, mask=False, choice=None, block_m=16,
    config=POINTERS, offset=0, peft=False,
):  # fmt: skip
    r = route(index, E, block_m, choice, max(1, len(ranks)))
    x = matrix(index.shape[0] if gather else r.P, K, dtype, seed=0, offset=offset)
    w = stacked(E, K, N, dtype, 1).mT if transposed else stacked(E, N, K, dtype, 1)
    s, bs = None, None
    if ranks:
        s = matrix(r.P, max(ranks), dtype, seed=2, offset=offset)
        made = [stacked(E, N, n, low, 3 + i) if n else None for i, n in enumerate(ranks)]
        if peft:  # columns e, e + E … of one matrix are expert e's
            made = [b.permute(1, 2, 0).contiguous().permute(2, 0, 1) for b in made]
        bs = made
    c = matrix(E, N, dtype, seed=40, offset=offset) if bias else None
    keep = keep_mask(r.P, N, 5) if mask else None
    words = pack_bits(keep) if mask else None
    out = experts_gemm.gemm(
        x, r, w, s, bs, gather=gather, scatter=scatter, bias=c, bits=words, config=config
    )
    exact = experts_reference.gemm(
        x, r, w, s, bs, gather=gather, scatter=scatter, bias=c, keep=keep
    )
    assert_as_good_as_torch(out, plain(x, r, w, s, bs, c, keep, gather, scatter), exact)
    pairs = r.pairs.long()
    alone = (index.reshape(-1) >= E)[pairs]  # the sorted rows of no expert here
    assert not out[pairs[alone] if scatter else alone].any()
    return out


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_against_float64(dtype, transposed, config):
    """Up reads by token and writes by row, down reads by row and writes by pair."""
    index, each = chosen(23, 3, 6, 0), dict(transposed=transposed, bias=True, config=config)
    check(index, 5, 72, 40, (8,), dtype, **each)
    check(index, 5, 40, 72, (8,), dtype, gather=False, scatter=True, **each)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_input_against_float64(dtype, config):
    """W and B are transposed views, and the mask is that of the low-rank part alone."""
    index = chosen(23, 3, 6, 1)
    E, N, K, r = 5, 40, 72, 8
    x, s = matrix(69, K, dtype, seed=0), matrix(69, r, dtype, seed=2)
    w, a = stacked(E, K, N, dtype, 1), stacked(E, r, N, torch.float32, 3)
    keep, order = keep_mask(69, N, 4), route(index, E, 16)
    each = dict(gather=False, scatter=True)
    out = experts_gemm.gemm(x, order, w.mT, s, [a.mT], bits=pack_bits(keep), config=config, **each)
    exact = experts_reference.gemm(x, order, w.mT, s, [a.mT], keep=keep, **each)
    want = plain(x, order, w.mT, s, [a.mT], None, keep, **each)
    assert_as_good_as_torch(out, want, exact)


@few
@given(
    T=st.integers(1, 30),
    k=st.integers(1, 8),
    E=st.integers(1, 12),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    r=st.integers(0, 40),
    gone=st.integers(0, 8),
    block_m=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    flags=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_any_shape(T, k, E, N, K, r, gone, block_m, dtype, flags):
    """Some experts may be another process's, and the same expert may be chosen twice."""
    g = torch.Generator().manual_seed(T)
    index = torch.randint(0, E + gone, (T, k), generator=g)
    gather, scatter, transposed, bias, mask, tma, same = flags
    check(
        index, E, N, K, (r,) if r else (), dtype, dtype if same else torch.float32,
        gather=gather, scatter=scatter, transposed=transposed, bias=bias, mask=mask and r > 0,
        block_m=block_m, config=TMA if tma else POINTERS, offset=int(same),
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 16, 17, 100, 256])
def test_ranks(rank):
    check(chosen(20, 2, 4, 2), 4, 33, 40, (rank,), torch.float16, config=TMA)


@pytest.mark.parametrize("config", [TMA, POINTERS], ids=["tma", "pointers"])
def test_all_tokens_on_one_expert_and_experts_without_any(config):
    for e in (0, 3, 6):
        check(torch.full((40, 1), e), 7, 24, 40, config=config)
    check(torch.tensor([[2, 5]]).expand(40, 2), 7, 24, 40, config=config, scatter=True)


def test_many_experts_with_few_tokens():
    check(chosen(9, 8, 512, 3), 512, 16, 16, (3,), gather=False, scatter=True, config=TMA)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("gone", [1, 15, 16, 17, 48])
def test_rows_without_an_expert_are_zero_whatever_was_there(scatter, gone, monkeypatch):
    whole = torch.Tensor.new_empty

    def dirty(t, *args, **kwargs):
        made = whole(t, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", dirty)
    index = torch.arange(48).view(24, 2) % 3
    index.view(-1)[torch.randperm(48, generator=torch.Generator().manual_seed(gone))[:gone]] = 3
    check(index, 3, 40, 32, scatter=scatter, bias=True)


@few
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 70), st.data())
def test_there_are_tiles_for_the_rows_without_an_expert(counts, gone, data):
    """Tiles that are not used, and one more, hold them for any routing."""
    block_m = data.draw(st.sampled_from([16, 32, 64, 128]))
    experts = torch.cat([torch.full((n, 1), e) for e, n in enumerate([*counts, gone])])
    r = route(experts, len(counts), block_m)
    spare = int((r.tile_group < 0).sum()) + 1
    assert spare * block_m >= gone == r.P - int(r.offsets[-1])


def test_the_last_tile_of_a_group_does_not_touch_the_next():
    """Groups of 1, 15, 16, 17 and 31 rows: each of their rows is that of its own expert."""
    counts = (1, 15, 16, 17, 31)
    index = torch.cat([torch.full((n, 1), e) for e, n in enumerate(counts)])
    check(index, 5, 40, 32, (), config=TMA)


def test_the_formula_is_that_of_each_pair():
    index, E = chosen(9, 3, 6, 9), 5
    r = route(index, E, 16)
    x, w, b = (torch.randn(*n, dtype=torch.float64) for n in ((9, 8), (E, 7, 8), (E, 7, 2)))
    s, bias = torch.randn(27, 2, dtype=torch.float64), torch.randn(E, 7, dtype=torch.float64)
    keep = keep_mask(27, 7, 0)
    want = torch.zeros(27, 7, dtype=torch.float64)
    row_of = r.pairs.long().argsort()
    for pair, e in enumerate(index.flatten()):
        if e < E:
            p = row_of[pair]
            want[pair] = w[e] @ x[pair // 3] + keep[p] * (b[e] @ s[p]) + bias[e]
    each = dict(bias=bias, keep=keep)
    got = experts_reference.gemm(x, r, w, s, [b], gather=True, scatter=True, **each)
    assert_same_number(got, want)
    by_row = experts_reference.gemm(x, r, w, s, [b], gather=True, scatter=False, **each)
    assert_same_number(by_row, want[r.pairs.long()])


@pytest.mark.parametrize("ranks", [(4, 16, 7), (0, 3), (8, 0, 0, 24), (16, 16)])
@pytest.mark.parametrize("peft", [False, True])
def test_adapters_of_their_own_tokens(ranks, peft):
    g = torch.Generator().manual_seed(7)
    choice = torch.randint(0, len(ranks), (30,), generator=g)
    peft = peft and all(ranks)
    check(chosen(30, 2, 5, 4), 4, 40, 24, ranks, torch.float16, choice=choice, peft=peft)
    check(
        chosen(30, 2, 5, 4), 4, 40, 24, ranks, choice=choice, gather=False, scatter=True, mask=True,
        config=TMA,
    )  # fmt: skip


def test_adapters_of_other_layouts():
    """One has the columns of B side by side, one its ranks: no one stride is 1 in both."""
    index, choice = chosen(30, 2, 5, 4), torch.arange(30) % 2
    r = route(index, 4, 16, choice, 2)
    x, w, s = matrix(30, 24, torch.float32, seed=0), torch.ones(4, 32, 24), torch.randn(60, 8)
    bs = [stacked(4, 32, 8, torch.float32, 3), stacked(4, 8, 32, torch.float32, 4).mT]
    both = dict(gather=True, scatter=False)
    out = experts_gemm.gemm(x, r, w, s, bs, **both)
    want = plain(x, r, w, s, bs, None, None, True, False)
    assert_as_good_as_torch(out, want, experts_reference.gemm(x, r, w, s, bs, **both))
    assert aligned(bs[:1], [8]) and aligned(bs[1:], [8]) and not aligned(bs, [8, 8])
    assert not aligned([bs[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)], [8])
    assert not aligned(bs[:1], [7]) and not aligned([bs[0][:, :, 1:]], [8])


def test_peft_keeps_the_columns_of_an_expert_apart():
    check(chosen(20, 2, 5, 5), 4, 40, 24, (6,), torch.bfloat16, peft=True, config=TMA)


def test_no_adapter_at_all():
    order = route(chosen(9, 2, 4, 6), 4, 16, torch.zeros(9, dtype=torch.long), 2)
    x, w = matrix(9, 24, torch.float32, seed=0), stacked(4, 40, 24, torch.float32, 1)
    s = torch.full((18, 3), float("nan"))
    without = experts_gemm.gemm(x, order, w, gather=True, scatter=True)
    none = experts_gemm.gemm(x, order, w, s, [None, None], gather=True, scatter=True)
    assert torch.equal(none, without) and none.isfinite().all()


def test_nothing_of_other_rows_or_experts_comes_in():
    """NaN in the token, the W and the B of one expert stays there."""
    index = torch.arange(24).view(12, 2) % 4
    r = route(index, 4, 16)
    x, w = matrix(24, 32, torch.float32, seed=0), stacked(4, 40, 32, torch.float32, 1)
    s, b = matrix(24, 4, torch.float32, seed=2), stacked(4, 40, 4, torch.float32, 3)
    mine = r.pairs.long() % 4 == 1
    for t in (w[1], b[1]):
        t.fill_(float("nan"))
    x[mine], s[mine] = float("nan"), float("nan")
    for config in (TMA, POINTERS):
        for weight in (w, w.mT.contiguous().mT):
            y = experts_gemm.gemm(x, r, weight, s, [b], gather=False, scatter=False, config=config)
            assert torch.equal(y.isnan().all(1), mine) and torch.equal(y.isnan().any(1), mine)


def test_descriptors_are_used_where_they_can_be():
    index = torch.zeros(16, 1, dtype=torch.long)
    x, y, w = torch.ones(16, 64), torch.ones(16, 48), torch.ones(2, 48, 64)

    def uses(x, w, gather=False):
        (launch,) = experts_gemm.plan_gemm(
            y, x, route(index, 2, 16), w, None, [], None, None, gather, False, H200, TMA
        )
        arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        assert launch.meta["TMA"] == (arguments["w_tiles"] is not None)
        return launch.meta["TMA"], arguments["x_tiles"] is not None

    assert uses(x, w) == (True, True) and uses(x, w, gather=True) == (True, False)
    assert uses(x, torch.ones(2, 64, 48).mT) == (True, True)
    assert uses(torch.ones(16, 65)[:, :64], w) == (True, False)
    assert uses(x, torch.ones(2, 48, 65)[..., :64]) == (False, True)
    assert uses(x, torch.ones(2, 48, 128)[..., ::2]) == (False, True)


def test_tiles_hold_the_rows_of_most_groups():
    for P, groups in ((0, 8), (1, 512), (64, 8), (65, 8), (512, 128), (65536, 128)):
        block_m = rows_of_tile(P, groups)
        assert block_m in experts_gemm.BLOCKS_M
        assert block_m == 128 or block_m * groups >= 2 * P
        assert block_m == 16 or block_m // 2 * groups < 2 * P


def test_every_default_config_runs():
    for arch in (H200, experts_gemm.Arch(128, 89, 101376)):
        for block_m in experts_gemm.BLOCKS_M:
            for itemsize in (2, 4):
                c = experts_gemm.default_config(block_m, 4096, arch, itemsize=itemsize)
                assert c.shared_bytes(block_m, itemsize) <= arch.shared
    check(chosen(80, 2, 4, 8), 3, 300, 72, block_m=128, config=None, dtype=torch.float16)


def test_empty():
    w, kinds = torch.ones(4, 24, 16), dict(gather=True, scatter=True)
    nothing = torch.zeros(0, 2, dtype=torch.long)
    assert experts_gemm.gemm(torch.ones(0, 16), route(nothing, 4, 16), w, **kinds).shape == (0, 24)
    r = route(torch.tensor([[0, 3], [1, 4]]), 4, 16)
    y = experts_gemm.gemm(torch.ones(2, 0), r, w[..., :0], bias=torch.ones(4, 24), **kinds)
    assert y[:3].eq(1).all() and y[3].eq(0).all()


def test_bad_arguments_are_named():
    r = route(torch.tensor([[0, 1], [2, 3]]), 4, 16)
    x, w, s, b = torch.ones(2, 6), torch.ones(4, 7, 6), torch.ones(4, 3), torch.ones(4, 7, 3)

    def gemm(x=x, w=w, s=s, b=(b,), r=r, gather=True, **kwargs):
        experts_gemm.gemm(x, r, w, s, b, gather=gather, scatter=False, **kwargs)

    with pytest.raises(ValueError, match=r"w has shape \(4, 7, 5\); allowed: \(4, 7, 6\)"):
        gemm(w=torch.ones(4, 7, 5))
    with pytest.raises(ValueError, match=r"w has shape \(3, 7, 6\); allowed: \(4, 7, 6\)"):
        gemm(w=w[:3])
    with pytest.raises(ValueError, match=r"w has shape \(7, 6\); allowed: \[E, N, K\]"):
        gemm(w=w[0])
    with pytest.raises(TypeError, match="w has dtype torch.float16; allowed: torch.float32"):
        gemm(w=w.half())
    with pytest.raises(ValueError, match=r"x has shape \(2, 6\); allowed: \(4, 6\)"):
        gemm(gather=False)
    with pytest.raises(ValueError, match="s and b: allowed: both, or neither"):
        gemm(b=None)
    with pytest.raises(ValueError, match="b has 2 entries; allowed: 1, one for each adapter"):
        gemm(b=(b, b))
    with pytest.raises(ValueError, match=r"b\[0\] has shape \(7, 3\); allowed: \[E, N, r\]"):
        gemm(b=(b[0],))
    with pytest.raises(ValueError, match=r"b\[0\] has shape \(4, 6, 3\); allowed: \(4, 7, 3\)"):
        gemm(b=(torch.ones(4, 6, 3),))
    with pytest.raises(ValueError, match=r"b\[0\] has rank 257; allowed: 1 to 256"):
        gemm(b=(torch.ones(4, 7, 257),))
    with pytest.raises(ValueError, match=r"s has shape \(4, 2\); allowed: \(4, 3\)"):
        gemm(s=s[:, :2])
    with pytest.raises(ValueError, match=r"bias has shape \(7,\); allowed: \(4, 7\)"):
        gemm(bias=torch.ones(7))
    with pytest.raises(ValueError, match=r"bits has shape \(4, 2\); allowed: \(4, 1\)"):
        gemm(bits=torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="route has block_m 256; allowed: 16, 32, 64, 128"):
        gemm(r=r._replace(block_m=256))
    with pytest.raises(ValueError, match="w is on meta; allowed: cpu"):
        gemm(w=w.to("meta"))
    with pytest.raises(ValueError, match="config needs 270336 bytes of shared memory; allowed: 2"):
        gemm(config=ExpertsGemmConfig(512, 64, num_stages=2))
    with pytest.raises(ValueError, match="ExpertsGemmConfig.group_m is 0"):
        ExpertsGemmConfig(group_m=0)
