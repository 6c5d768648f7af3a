"""Adapter gradients: dS and dB from one pass over dY or two, dA of a group from one pass over X.

Repeated runs give the same bits.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.common import Arch
from peftkern.kernels.grad_a import GradAConfig, grad_a
from peftkern.kernels.grad_sb import GradSBConfig, default_config, grad_sb
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)


def check_grad_output(M, N, r, dtype, adapter, config=None):
    dy = matrix(M, N, dtype, seed=0, offset=1)
    b = matrix(N, r, adapter, seed=1)
    s = matrix(M, r, dtype, seed=2, offset=2)
    ds, db = grad_sb(dy, b, s, 1.5, config=config)
    assert ds.dtype == dtype and db.dtype == torch.float32
    assert_as_good_as_torch(ds, 1.5 * (dy @ b.to(dtype)), reference.grad_s(dy, b, 1.5))
    assert_as_good_as_torch(db, dy.T @ s, reference.grad_b(dy, s))
    again = grad_sb(dy, b, s, 1.5, config=config)
    assert torch.equal(ds, again[0]) and torch.equal(db, again[1]), "two runs differ"


def check_grad_a(M, K, ranks, dtype, masks, config=None):
    x = matrix(M, K, dtype, seed=0, offset=1)
    ds = [matrix(M, r, dtype, seed=1 + i, offset=1) for i, r in enumerate(ranks)]
    keeps = [None if c == "n" else keep_mask(M, K, i) for i, c in enumerate(masks)]
    words = [None if k is None else pack_bits(k) for k in keeps]
    out = grad_a(x, ds, words, config=config)
    for o, d, k in zip(out, ds, keeps, strict=True):
        assert o.dtype == torch.float32
        assert_as_good_as_torch(o, d.T @ masked(x, k), reference.grad_a(x, d, k))
    again = grad_a(x, ds, words, config=config)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N, r", [(9, 341, 8), (41, 100, 37), (300, 64, 3), (33, 40, 200), (1, 7, 1)]
)
def test_grad_output_against_float64(M, N, r, dtype):
    check_grad_output(M, N, r, dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, ranks, masks",
    [(9, 341, (8,), "m"), (300, 70, (5, 16, 3), "mnm"), (41, 33, (200, 2), "nm")],
)
def test_grad_a_against_float64(M, K, ranks, masks, dtype):
    check_grad_a(M, K, ranks, dtype, masks)


@few
@given(
    M=st.integers(1, 90),
    N=st.integers(1, 120),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    masks=st.sampled_from(["nnn", "mmm", "nmn"]),
    split=st.integers(1, 3),
)
def test_any_shape(M, N, ranks, dtype, same, masks, split):
    config = GradSBConfig(block_m=32, block_n=32, split_n=split)
    check_grad_output(M, N, ranks[0], dtype, dtype if same else torch.float32, config)
    check_grad_a(
        M, N, ranks, dtype, masks[: len(ranks)], GradAConfig(block_m=32, block_k=32, split_m=split)
    )


def test_large_ranks_take_two_passes_and_small_ones_one():
    h100 = Arch(132, 90, 232448)
    assert default_config(8192, 4096, 16, h100) is not None
    assert default_config(8192, 4096, 128, h100) is None
    check_grad_output(300, 64, 100, torch.float32, torch.float32)


def test_offsets_past_int32():
    dy, b, s = far_rows(3, 40, seed=0), matrix(40, 8, torch.float32, seed=1), far_rows(3, 8, seed=2)
    ds, db = grad_sb(dy, b, s)
    assert_as_good_as_torch(ds, dy @ b.half(), reference.grad_s(dy, b, 1.0))
    assert_as_good_as_torch(db, dy.T @ s, reference.grad_b(dy, s))
    assert_as_good_as_torch(grad_a(dy, [s])[0], s.T @ dy, reference.grad_a(dy, s))


def test_empty():
    ds, db = grad_sb(torch.ones(0, 6), torch.ones(6, 4), torch.ones(0, 4))
    assert ds.shape == (0, 4) and db.shape == (6, 4) and not db.any()
    assert not grad_a(torch.ones(0, 6), [torch.ones(0, 4)])[0].any()


def test_bad_arguments_are_named():
    dy, b, s = torch.ones(5, 6), torch.ones(6, 4), torch.ones(5, 4)
    with pytest.raises(TypeError, match="dy has dtype torch.int64"):
        grad_sb(dy.long(), b, s)
    with pytest.raises(TypeError, match="s has dtype torch.float16; allowed: float32"):
        grad_sb(dy, b, s.half())
    with pytest.raises(ValueError, match=r"b has shape \(5, 4\); allowed: \(6, 4\)"):
        grad_sb(dy, torch.ones(5, 4), s)
    with pytest.raises(ValueError, match=r"s has shape \(4, 4\); allowed: \(5, 4\)"):
        grad_sb(dy, b, torch.ones(4, 4))
    with pytest.raises(ValueError, match="s has rank 0"):
        grad_sb(dy, torch.ones(6, 0), torch.ones(5, 0))
    with pytest.raises(ValueError, match="ds is empty"):
        grad_a(dy, [])
    with pytest.raises(ValueError, match=r"ds\[0\] has shape \(4, 4\)"):
        grad_a(dy, [torch.ones(4, 4)])
    with pytest.raises(ValueError, match="bits has 2 entries; allowed: 1"):
        grad_a(dy, [s], [None, None])
    with pytest.raises(ValueError, match="GradSBConfig.split_n is 0"):
        GradSBConfig(split_n=0)
    with pytest.raises(ValueError, match="GradAConfig.block_k is 16"):
        GradAConfig(block_k=16)
