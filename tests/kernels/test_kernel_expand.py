"""The kernel that writes the low-rank part: S Bᵀ forward, the sum of mask (dS A) backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.expand import ExpandConfig, expand, low_rank_grad_input, plan_expand
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)

SMALL = ExpandConfig(block_m=16, block_n=32, block_r=16)


def check_expand(M, N, r, dtype, adapter, bias, config=None):
    group = matrix(M, r + 9, dtype, seed=0)
    s = group[:, 4 : 4 + r]  # as a slice of a group's S: rows not dense
    b = matrix(N, r, adapter, seed=1)
    c = matrix(1, N, dtype, seed=2)[0] if bias else None
    plain = s @ b.to(dtype).T if c is None else s @ b.to(dtype).T + c
    assert_as_good_as_torch(expand(s, b, c, config=config), plain, reference.expand(s, b, c))


def check_grad_input(M, K, ranks, dtype, adapter, masks, config=None):
    ds = [matrix(M, r, dtype, seed=i, offset=1) for i, r in enumerate(ranks)]
    As = [matrix(r, K, adapter, seed=9 + i) for i, r in enumerate(ranks)]
    keeps = [None if c == "n" else keep_mask(M, K, i) for i, c in enumerate(masks)]
    words = [None if k is None else pack_bits(k) for k in keeps]
    out = low_rank_grad_input(ds, As, words, config=config)
    plain = sum(masked(d @ a.to(dtype), k) for d, a, k in zip(ds, As, keeps, strict=True))
    assert_as_good_as_torch(out, plain, reference.low_rank_grad_input(ds, As, keeps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, r", [(9, 341, 8), (41, 100, 37), (1, 33, 256), (70, 5, 1)])
def test_expand_against_float64(M, N, r, dtype):
    check_expand(M, N, r, dtype, torch.float32, bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks, masks", [((8,), "m"), ((5, 16, 100), "mnm"), ((3, 3), "nn")])
def test_grad_input_against_float64(ranks, masks, dtype):
    check_grad_input(41, 341, ranks, dtype, torch.float32, masks)


@few
@given(
    M=st.integers(1, 50),
    N=st.integers(1, 100),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    masks=st.sampled_from(["nnn", "mmm", "nmn"]),
)
def test_any_shape(M, N, ranks, dtype, same, masks):
    adapter = dtype if same else torch.float32
    check_expand(M, N, ranks[0], dtype, adapter, bias=same, config=SMALL)
    check_grad_input(M, N, ranks, dtype, adapter, masks[: len(ranks)], config=SMALL)


def test_add_takes_a_base_output_and_leaves_it_alone():
    s, b, base = (
        matrix(9, 6, torch.float16, seed=0),
        matrix(50, 6, torch.float32, seed=1),
        matrix(9, 50, torch.float16, seed=2),
    )
    kept = base.clone()
    out = expand(s, b, add=base)
    assert_as_good_as_torch(out, base + s @ b.half().T, base.double() + reference.expand(s, b))
    assert torch.equal(base, kept)


def test_offsets_past_int32_in_and_out():
    s, b = far_rows(3, 8, seed=0), matrix(40, 8, torch.float32, seed=1)
    assert_as_good_as_torch(expand(s, b), s @ b.half().T, reference.expand(s, b))
    out = far_rows(3, 40, seed=2)
    near = matrix(3, 8, torch.float16, seed=3)
    for launch in plan_expand(out, [near], [b.T], [None], None, None, SMALL):
        launch.run()
    assert_as_good_as_torch(out, near @ b.half().T, reference.expand(near, b))


def test_empty():
    assert expand(torch.ones(0, 4), torch.ones(7, 4)).shape == (0, 7)
    assert low_rank_grad_input([torch.ones(0, 4)], [torch.ones(4, 9)]).shape == (0, 9)


def test_bad_arguments_are_named():
    s, b, a = torch.ones(5, 4), torch.ones(7, 4), torch.ones(4, 9)
    with pytest.raises(ValueError, match=r"b has shape \(7, 3\); allowed: \(7, 4\)"):
        expand(s, torch.ones(7, 3))
    with pytest.raises(ValueError, match="s has rank 0"):
        expand(torch.ones(5, 0), torch.ones(7, 0))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); allowed: \(7,\)"):
        expand(s, b, torch.ones(4))
    with pytest.raises(ValueError, match=r"add has shape \(5, 4\); allowed: \(5, 7\)"):
        expand(s, b, add=torch.ones(5, 4))
    with pytest.raises(TypeError, match="b has dtype torch.float64"):
        expand(s, b.double())
    with pytest.raises(ValueError, match="ds has 1 entries, As 2"):
        low_rank_grad_input([s], [a, a])
    with pytest.raises(ValueError, match=r"As\[1\] has shape \(3, 9\); allowed: \(4, 9\)"):
        low_rank_grad_input([s, s], [a, torch.ones(3, 9)])
    with pytest.raises(TypeError, match=r"ds\[1\] has dtype torch.float16; allowed: float32"):
        low_rank_grad_input([s, s.half()], [a, a])
    with pytest.raises(ValueError, match=r"bits\[0\] has shape"):
        low_rank_grad_input([s], [a], torch.zeros(5, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="ExpandConfig.block_n is 16"):
        ExpandConfig(block_n=16)
