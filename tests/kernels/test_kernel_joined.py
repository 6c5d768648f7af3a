"""The joined kernels: S and S Bᵀ in one launch, dA and the low-rank part of dX in another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import common, reference
from peftkern.kernels import grad_xa as joined_backward
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.common import Arch
from peftkern.kernels.grad_a import GradAConfig, grad_a
from peftkern.kernels.grad_a import default_config as default_grad_a_config
from peftkern.kernels.grad_sb import grad_sb_group
from peftkern.kernels.grad_xa import GradXAConfig, grad_xa
from peftkern.kernels.shrink_expand import ShrinkExpandConfig, fits, shrink_expand
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)


def masks_of(M, K, masks):
    keeps = [None if c == "n" else keep_mask(M, K, i) for i, c in enumerate(masks)]
    return keeps, [None if k is None else pack_bits(k) for k in keeps]


def check_update(M, K, Ns, ranks, dtype, adapter, masks, bias=True, config=None):
    x = matrix(M, K, dtype, seed=0, offset=1)
    As = [matrix(r, K, adapter, seed=1 + i, scale=0.3) for i, r in enumerate(ranks)]
    Bs = [matrix(n, r, adapter, seed=7 + i) for i, (n, r) in enumerate(zip(Ns, ranks, strict=True))]
    biases = [matrix(1, n, dtype, seed=13 + i)[0] if bias and i != 1 else None
              for i, n in enumerate(Ns)]  # fmt: skip
    scales = [0.5 * (i + 1) for i in range(len(ranks))]
    keeps, words = masks_of(M, K, masks)
    s, ys = shrink_expand(x, As, Bs, scales, words, biases, config=config)
    assert s.dtype == dtype and s.shape == (M, sum(ranks))
    parts = zip(ys, s.split(list(ranks), 1), As, Bs, biases, scales, keeps, strict=True)
    for y, own, a, b, c, scale, keep in parts:
        plain = (scale * (masked(x, keep).float() @ a.to(dtype).float().T)).to(dtype)
        assert_as_good_as_torch(own, plain, reference.shrink(x, a, scale, keep))
        written = own @ b.to(dtype).T if c is None else own @ b.to(dtype).T + c
        assert_as_good_as_torch(y, written, reference.expand(own, b, c))
    again = shrink_expand(x, As, Bs, scales, words, biases, config=config)
    assert torch.equal(s, again[0])
    assert all(torch.equal(p, q) for p, q in zip(ys, again[1], strict=True))


def check_pair(M, K, ranks, dtype, adapter, masks, config=None):
    x = matrix(M, K, dtype, seed=0, offset=1)
    ds = [matrix(M, r, dtype, seed=1 + i, offset=1) for i, r in enumerate(ranks)]
    As = [matrix(r, K, adapter, seed=9 + i) for i, r in enumerate(ranks)]
    keeps, words = masks_of(M, K, masks)
    d_out, das = grad_xa(x, ds, As, words, config=config)
    plain = sum(masked(d @ a.to(dtype), k) for d, a, k in zip(ds, As, keeps, strict=True))
    assert_as_good_as_torch(d_out, plain, reference.low_rank_grad_input(ds, As, keeps))
    for da, d, k in zip(das, ds, keeps, strict=True):
        assert da.dtype == torch.float32
        assert_as_good_as_torch(da, d.T @ masked(x, k), reference.grad_a(x, d, k))
    again = grad_xa(x, ds, As, words, config=config)
    assert torch.equal(d_out, again[0]), "two runs differ"
    assert all(torch.equal(a, b) for a, b in zip(das, again[1], strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, Ns, ranks, masks",
    [
        (41, 341, (100,), (8,), "m"),
        (70, 45, (9, 130, 64), (5, 16, 3), "mnm"),
        (9, 64, (33,), (100,), "n"),
        (1, 7, (1,), (1,), "n"),
    ],
)
def test_update_against_float64(M, K, Ns, ranks, masks, dtype):
    check_update(M, K, Ns, ranks, dtype, torch.float32, masks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, ranks, masks",
    [(9, 341, (8,), "m"), (300, 70, (5, 16, 3), "mnm"), (41, 33, (100,), "n"), (1, 7, (1,), "m")],
)
def test_pair_against_float64(M, K, ranks, masks, dtype):
    check_pair(M, K, ranks, dtype, torch.float32, masks)


@pytest.mark.long
@few
@given(
    M=st.integers(1, 90),
    K=st.integers(1, 120),
    N=st.integers(1, 80),
    ranks=st.lists(st.integers(1, 32), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    masks=st.sampled_from(["nnn", "mmm", "nmn"]),
    split=st.integers(1, 3),
)
def test_any_shape(M, K, N, ranks, dtype, same, masks, split):
    adapter, masks = dtype if same else torch.float32, masks[: len(ranks)]
    config = ShrinkExpandConfig(block_m=32, block_k=32, block_n=32)
    check_update(M, K, [N + i for i in range(len(ranks))], ranks, dtype, adapter, masks,
                 config=config)  # fmt: skip
    check_pair(M, K, ranks, dtype, adapter, masks, GradXAConfig(32, 32, split_m=split))


def test_one_launch_each_where_the_device_is_filled(monkeypatch):
    """Without a second stage at the shape of docs/goals.md, on an A100, an H100 and a B200."""
    for sms, capability, shared in ((108, 80, 166912), (132, 90, 232448), (148, 100, 232448)):
        arch = Arch(sms, capability, shared)
        assert joined_backward.default_config(8192, 4096, [16], arch).split_m == 1
        assert default_grad_a_config(8192, 4096, arch).split_m == 1
        assert fits(8192, [16], arch) and not fits(512, [16], arch)
    assert not fits(8192, [64, 64, 16], Arch(132, 90, 232448))
    ran = []
    monkeypatch.setattr(common.Launch, "run", lambda self: ran.append(self.kernel.__name__))
    x, a, b = torch.ones(40, 32), torch.ones(4, 32), torch.ones(8, 4)
    shrink_expand(x, [a, a], [b, b])
    grad_xa(x, [torch.ones(40, 4)], [a], config=GradXAConfig(split_m=1))
    grad_xa(x, [torch.ones(40, 4)], [a], config=GradXAConfig(16, 32, split_m=2))
    assert ran == ["_shrink_expand_kernel", "_grad_xa_kernel", "_grad_xa_kernel", "_sum_kernel"]


def test_a_group_sums_its_partials_in_one_launch_and_in_the_wanted_dtype(monkeypatch):
    parts, exact = [], []
    for i, (n, r) in enumerate(((70, 5), (33, 3), (40, 100))):
        dy, b = matrix(300, n, torch.float32, seed=i), matrix(n, r, torch.float32, seed=9 + i)
        s = matrix(300, r, torch.float32, seed=5 + i)
        parts.append((dy, b, s, 0.5 + i))
        exact.append((reference.grad_s(dy, b, 0.5 + i), reference.grad_b(dy, s)))
    ran, run = [], common.Launch.run
    monkeypatch.setattr(
        common.Launch, "run", lambda self: (ran.append(self.kernel.__name__), run(self))
    )
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    done = grad_sb_group(parts, dtypes)
    assert ran.count("_sum_kernel") == 1 and ran[-1] == "_sum_kernel"
    for (ds, db), (want_s, want_b), dtype, (dy, b, s, c) in zip(
        done, exact, dtypes, parts, strict=True
    ):
        assert db.dtype == dtype
        assert_as_good_as_torch(ds, c * (dy @ b), want_s)
        assert_as_good_as_torch(db, (dy.T @ s).to(dtype), want_b)
    (da,) = grad_a(parts[0][0], [parts[0][2]], out_dtypes=[torch.bfloat16])
    assert torch.equal(da, grad_a(parts[0][0], [parts[0][2]])[0].bfloat16())
    config = GradAConfig(block_m=32, block_k=32, split_m=3)
    (da,) = grad_a(parts[0][0], [parts[0][2]], out_dtypes=[torch.bfloat16], config=config)
    whole = grad_a(parts[0][0], [parts[0][2]], config=config)[0]
    assert torch.equal(da, whole.bfloat16())


def test_offsets_past_int32():
    x, a, b = far_rows(3, 40, seed=0), matrix(8, 40, torch.float32, seed=1), torch.ones(5, 8)
    s, (y,) = shrink_expand(x, [a], [b])
    assert_as_good_as_torch(s, x @ a.half().T, reference.shrink(x, a, 1.0))
    assert_as_good_as_torch(y, s @ b.half().T, reference.expand(s, b))
    d = far_rows(3, 8, seed=2)
    d_out, (da,) = grad_xa(x, [d], [a])
    assert_as_good_as_torch(d_out, d @ a.half(), reference.low_rank_grad_input([d], [a], [None]))
    assert_as_good_as_torch(da, d.T @ x, reference.grad_a(x, d))


def test_empty():
    s, (y,) = shrink_expand(torch.ones(0, 6), [torch.ones(4, 6)], [torch.ones(5, 4)])
    assert s.shape == (0, 4) and y.shape == (0, 5)
    d_out, (da,) = grad_xa(torch.ones(0, 6), [torch.ones(0, 4)], [torch.ones(4, 6)])
    assert d_out.shape == (0, 6) and da.shape == (4, 6) and not da.any()


def test_bad_arguments_are_named():
    x, a, b, d = torch.ones(5, 6), torch.ones(4, 6), torch.ones(3, 4), torch.ones(5, 4)
    for call, error, message in (
        (lambda: shrink_expand(x.long(), [a], [b]), TypeError, "x has dtype torch.int64"),
        (lambda: shrink_expand(x, [], []), ValueError, "As has 0 entries, Bs 0"),
        (lambda: shrink_expand(x, [a], []), ValueError, "As has 1 entries, Bs 0"),
        (lambda: shrink_expand(x, [a.T], [b]), ValueError, r"As\[0\] has shape \(6, 4\)"),
        (lambda: shrink_expand(x, [a], [b.T]), ValueError, r"Bs\[0\] has shape \(4, 3\)"),
        (lambda: shrink_expand(x, [a[:0]], [b[:, :0]]), ValueError, r"As\[0\] has rank 0"),
        (lambda: shrink_expand(x, [a.double()], [b]), TypeError, r"As\[0\] has dtype"),
        (
            lambda: shrink_expand(x, [a] * 9, [b] * 9),
            ValueError,
            "144 with padding; allowed: 128 together",
        ),
        (
            lambda: shrink_expand(x, [a], [b], biases=[torch.ones(4)]),
            ValueError,
            r"biases\[0\] has shape \(4,\); allowed: \(3,\)",
        ),
        (lambda: shrink_expand(x, [a], [b], bits=torch.ones(5, 2, dtype=torch.int32)),
         ValueError, r"bits\[0\] has shape \(5, 2\)"),
        (lambda: grad_xa(x, [], []), ValueError, "ds has 0 entries, As 0"),
        (lambda: grad_xa(x, [d[:4]], [a]), ValueError, r"ds\[0\] has shape \(4, 4\)"),
        (lambda: grad_xa(x, [d], [a.T]), ValueError, r"As\[0\] has shape \(6, 4\)"),
        (lambda: grad_xa(x, [d.half()], [a]), TypeError, r"ds\[0\] has dtype torch.float16"),
        (lambda: grad_xa(x, [d] * 9, [a] * 9), ValueError, "allowed: 128 together"),
        (lambda: GradXAConfig(split_m=0), ValueError, "GradXAConfig.split_m is 0"),
        (lambda: GradXAConfig(block_k=16), ValueError, "GradXAConfig.block_k is 16"),
        (lambda: ShrinkExpandConfig(block_n=8), ValueError, "ShrinkExpandConfig.block_n is 8"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
