"""The kernel for S = scale * (mask X) Aᵀ of a group, split over K or not, and its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import reference
from peftkern.kernels.bits import pack_bits
from peftkern.kernels.shrink import ShrinkConfig, shrink
from tests.kernels.oracle import (
    DTYPES,
    assert_as_good_as_torch,
    far_rows,
    few,
    keep_mask,
    masked,
    matrix,
)


def check(M, K, ranks, dtype, adapter, masks, config=None, offset=0):
    """``masks``: one letter an adapter, m (own mask), s (the first one's mask) or n (none)."""
    x = matrix(M, K, dtype, seed=1, offset=offset)
    As = [matrix(r, K, adapter, seed=2 + i, scale=0.3) for i, r in enumerate(ranks)]
    keeps = [
        None if c == "n" else keep_mask(M, K, 0 if c == "s" else i) for i, c in enumerate(masks)
    ]
    scales = [2.0 / 0.7 + i for i in range(len(ranks))]
    words = [None if k is None else pack_bits(k) for k in keeps]
    before = [t.clone() for t in (x, *As)]
    out = shrink(x, As, scales, words, config=config)
    exact = torch.cat(
        [reference.shrink(x, a, s, k) for a, s, k in zip(As, scales, keeps, strict=True)], 1
    )
    plain = torch.cat(
        [s * (masked(x, k) @ a.to(dtype).T) for a, s, k in zip(As, scales, keeps, strict=True)], 1
    )
    assert out.dtype == dtype
    assert_as_good_as_torch(out, plain, exact)
    assert torch.equal(out, shrink(x, As, scales, words, config=config)), "two runs differ"
    assert all(torch.equal(t, b) for t, b in zip((x, *As), before, strict=True)), "an input changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, ranks, masks",
    [
        (9, 341, (8,), "m"),
        (41, 341, (5, 16, 3), "mnm"),
        (33, 96, (16, 16), "ms"),
        (1, 1100, (16,), "n"),
        (7, 64, (256,), "m"),
        (3, 40, (130, 1), "nm"),
    ],
)
def test_against_float64(M, K, ranks, masks, dtype):
    check(M, K, ranks, dtype, torch.float32, masks, offset=1)


@few
@given(
    M=st.integers(1, 70),
    K=st.integers(1, 150),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    masks=st.sampled_from(["nnn", "mmm", "mnm"]),
    split=st.integers(1, 4),
)
def test_any_shape(M, K, ranks, dtype, same, masks, split):
    config = ShrinkConfig(block_m=32, block_k=32, split_k=split)
    check(
        M, K, ranks, dtype, dtype if same else torch.float32, masks[: len(ranks)], config, offset=3
    )


def test_transposed_adapter_and_other_output_dtype():
    x, a = matrix(9, 70, torch.bfloat16, seed=0), matrix(70, 6, torch.float32, seed=1)
    out = shrink(x, [a.T], 0.5, out_dtype=torch.float32)
    assert_as_good_as_torch(out, 0.5 * (x @ a.bfloat16()), reference.shrink(x, a.T, 0.5))


def test_columns_transposed_x_is_copied_not_misread():
    x, a = matrix(40, 9, torch.float32, seed=0).T, matrix(4, 40, torch.float32, seed=1)
    assert_as_good_as_torch(shrink(x, [a]), x @ a.T, reference.shrink(x, a, 1.0))


def test_offsets_past_int32():
    x, a = far_rows(3, 64, seed=0), matrix(4, 64, torch.float32, seed=1)
    assert_as_good_as_torch(shrink(x, [a]), x @ a.half().T, reference.shrink(x, a, 1.0))


@pytest.mark.parametrize("M, K", [(0, 64), (5, 0)])
def test_empty(M, K):
    out = shrink(torch.ones(M, K), [torch.ones(3, K), torch.ones(2, K)])
    assert out.shape == (M, 5) and not out.any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.ones(4)}, ValueError, r"x has shape \(4,\); allowed: a matrix"),
        (
            {"x": torch.ones(4, 8, dtype=torch.int32)},
            TypeError,
            "x has dtype torch.int32; allowed: float16",
        ),
        ({"x": torch.ones(4, 8, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
        ({"As": []}, ValueError, "As is empty"),
        ({"As": [torch.ones(0, 8)]}, ValueError, r"As\[0\] has rank 0; allowed: 1 to 256"),
        ({"As": [torch.ones(257, 8)]}, ValueError, r"As\[0\] has rank 257"),
        ({"As": [torch.ones(2, 9)]}, ValueError, r"As\[0\] has shape \(2, 9\); allowed: \(2, 8\)"),
        ({"As": [torch.ones(2, 8).half()]}, TypeError, r"As\[0\] has dtype torch.float16"),
        (
            {"As": [torch.ones(2, 8, device="meta")]},
            ValueError,
            r"As\[0\] is on meta; allowed: cpu",
        ),
        (
            {"bits": torch.zeros(4, 1)},
            TypeError,
            r"bits\[0\] has dtype torch.float32; allowed: torch.int32",
        ),
        (
            {"bits": torch.zeros(4, 2, dtype=torch.int32)},
            ValueError,
            r"bits\[0\] has shape \(4, 2\)",
        ),
        ({"scales": [1.0, 2.0]}, ValueError, "scales has 2 entries; allowed: 1"),
    ],
)
def test_bad_arguments_are_named_before_any_launch(change, error, message):
    good = {"x": torch.ones(4, 8), "As": [torch.ones(2, 8)]}
    with pytest.raises(error, match=message):
        shrink(**{**good, **change})


@pytest.mark.parametrize(
    "field", [{"block_m": 24}, {"block_k": 16}, {"split_k": 0}, {"num_warps": 3}, {"num_stages": 0}]
)
def test_invalid_configs_are_refused(field):
    with pytest.raises(ValueError, match=f"ShrinkConfig.{next(iter(field))} is"):
        ShrinkConfig(**field)
