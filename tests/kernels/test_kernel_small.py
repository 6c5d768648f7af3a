"""Decode in one launch: one row, up to sixteen, and mixed batches whose rows name adapters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import reference
from peftkern.kernels.small import MAX_ROWS, SmallConfig, decode
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, blas, far_rows, few, matrix


def base(M, K, N, dtype, conv1d, bias):
    x = matrix(M, K, dtype, seed=0, offset=1)
    w = (
        matrix(K, N, dtype, seed=1, scale=0.2).T
        if conv1d
        else matrix(N, K, dtype, seed=1, scale=0.2)
    )
    return x, w, matrix(1, N, dtype, seed=2)[0] if bias else None


def check(M, K, N, r, dtype, adapter, conv1d=False, bias=False, given_s=False, config=None):
    x, w, c = base(M, K, N, dtype, conv1d, bias)
    a, b = matrix(r, K, adapter, seed=3, scale=0.2), matrix(N, r, adapter, seed=4, scale=0.2)
    s = reference.shrink(x, a, 2.0)
    low = 2.0 * (x @ a.to(dtype).T)
    if given_s:
        s = low = s.to(dtype)
        out = decode(x, w, None, b, bias=c, s=s, config=config)
    else:
        out = decode(x, w, a, b, 2.0, c, config=config)
    plain = x @ w.T + low @ b.to(dtype).T
    plain = [plain if c is None else plain + c]
    if dtype == torch.float32:
        # as the kernel's tiles are: W and B on the left, never fewer than 16 rows of x or outputs
        xs = torch.nn.functional.pad(x, (0, 0, 0, 16 - M)).T
        low = low.T if given_s else 2.0 * blas(a, xs)[:, :M]
        low = torch.nn.functional.pad(low, (0, 16 - M))
        wide = 16 * -(-N // 16) // N + 1
        y = (blas(b.repeat(wide, 1), low) + blas(w.repeat(wide, 1), xs))[:N, :M].T
        plain.append(y if c is None else y + c)
    assert_as_good_as_torch(out, plain, reference.linear(x, w, s, b, c))


def check_mixed(M, K, N, ranks, index, dtype, adapter, bias=False, config=None):
    """Adapters of different rank, padded with zeros to the largest."""
    x, w, c = base(M, K, N, dtype, False, bias)
    a = torch.zeros(len(ranks), max(ranks), K, dtype=adapter)
    b = torch.zeros(len(ranks), N, max(ranks), dtype=adapter)
    for i, r in enumerate(ranks):
        a[i, :r] = matrix(r, K, adapter, seed=5 + i, scale=0.2)
        b[i, :, :r] = matrix(N, r, adapter, seed=9 + i, scale=0.2)
    scales = torch.arange(1, len(ranks) + 1, dtype=torch.float32) / 4
    index = torch.tensor(index)
    out = decode(x, w, a, b, bias=c, index=index, scales=scales, config=config)
    plain = x @ w.T if c is None else x @ w.T + c
    for m, i in enumerate(index.tolist()):
        if i >= 0:
            plain[m] += (float(scales[i]) * (x[m] @ a[i].to(dtype).T)) @ b[i].to(dtype).T
    assert_as_good_as_torch(out, plain, reference.decode_mixed(x, w, a, b, scales, index, c))
    alone = [
        decode(x[m : m + 1], w, a, b, bias=c, index=index[m : m + 1], scales=scales)
        for m in range(M)
    ]
    assert_as_good_as_torch(
        torch.cat(alone), plain, reference.decode_mixed(x, w, a, b, scales, index, c)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, N, r",
    [(1, 341, 41, 8), (1, 600, 9, 100), (9, 341, 41, 8), (16, 64, 100, 37), (3, 33, 1, 256)],
)
def test_against_float64(M, K, N, r, dtype):
    check(M, K, N, r, dtype, torch.float32, bias=True)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_s_and_conv1d_weight(M, dtype):
    check(M, 100, 70, 12, dtype, dtype, given_s=True)
    check(M, 100, 70, 12, dtype, dtype, conv1d=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [[0], [-1], [1, -1, 0, 1, 2, 0, -1]])
def test_mixed_batch_against_float64(index, dtype):
    check_mixed(len(index), 100, 41, (4, 16, 7), index, dtype, torch.float32, bias=True)


@few
@given(
    K=st.integers(1, 150),
    N=st.integers(1, 80),
    index=st.lists(st.integers(-1, 1), min_size=1, max_size=6),
    ranks=st.tuples(st.integers(1, 30), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
)
def test_any_shape(K, N, index, ranks, dtype, same):
    adapter = dtype if same else torch.float32
    config = SmallConfig(block_n=16, block_k=64)
    check(len(index), K, N, ranks[0], dtype, adapter, conv1d=same, config=config)
    check_mixed(len(index), K, N, ranks, index, dtype, adapter, config=config)


def test_base_rows_do_not_see_an_adapter_of_nan():
    x, w, _ = base(2, 40, 20, torch.float32, False, False)
    a, b = torch.full((1, 4, 40), torch.nan), torch.full((1, 20, 4), torch.nan)
    scales = torch.ones(1)
    for rows in (1, 2):
        out = decode(x[:rows], w, a, b, index=torch.full((rows,), -1), scales=scales)
        assert_as_good_as_torch(out, x[:rows] @ w.T, reference.linear(x[:rows], w))


def test_offsets_past_int32():
    w = far_rows(3, 40, seed=0)
    x, a, b = (
        matrix(2, 40, torch.float16, seed=1),
        matrix(4, 40, torch.float32, seed=2),
        matrix(3, 4, torch.float32, seed=3),
    )
    for rows in (1, 2):
        exact = reference.linear(x[:rows], w, reference.shrink(x[:rows], a, 1.0), b)
        plain = x[:rows] @ w.T + (x[:rows] @ a.half().T) @ b.half().T
        assert_as_good_as_torch(decode(x[:rows], w, a, b), plain, exact)


def test_empty():
    assert decode(torch.ones(0, 4), torch.ones(7, 4), torch.ones(2, 4), torch.ones(7, 2)).shape == (
        0,
        7,
    )


def test_bad_arguments_are_named():
    x, w, a, b = torch.ones(2, 6), torch.ones(7, 6), torch.ones(3, 6), torch.ones(7, 3)
    stack = {"index": torch.tensor([0, 1]), "scales": torch.ones(2)}
    with pytest.raises(ValueError, match=f"x has {MAX_ROWS + 1} rows; allowed: at most {MAX_ROWS}"):
        decode(torch.ones(MAX_ROWS + 1, 6), w, a, b)
    with pytest.raises(ValueError, match=r"w has shape \(7, 5\); allowed: \(7, 6\)"):
        decode(x, torch.ones(7, 5), a, b)
    with pytest.raises(ValueError, match=r"b has shape \(1, 6, 3\); allowed: \(1, 7, 3\)"):
        decode(x, w, a, torch.ones(6, 3))
    with pytest.raises(ValueError, match="b has rank 0"):
        decode(x, w, torch.ones(0, 6), torch.ones(7, 0))
    with pytest.raises(ValueError, match="a and s: allowed: exactly one"):
        decode(x, w, None, b)
    with pytest.raises(ValueError, match=r"a has shape \(3, 6\); allowed: a, b of \[L, r, K\]"):
        decode(x, w, a, b, **stack)
    two_a, two_b = a.expand(2, 3, 6), b.expand(2, 7, 3)
    assert decode(x, w, two_a, two_b, **stack).shape == (2, 7)
    for bad in (2, -2):
        with pytest.raises(ValueError, match=f"index holds {bad}; allowed: -1"):
            decode(x, w, two_a, two_b, index=torch.tensor([0, bad]), scales=torch.ones(2))
    with pytest.raises(TypeError, match="index has dtype torch.float32"):
        decode(x, w, two_a, two_b, index=torch.zeros(2), scales=torch.ones(2))
    with pytest.raises(ValueError, match=r"index has shape \(3,\); allowed: \(2,\)"):
        decode(x, w, two_a, two_b, index=torch.zeros(3, dtype=torch.int64), scales=torch.ones(2))
    with pytest.raises(TypeError, match="scales is None"):
        decode(x, w, two_a, two_b, index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="SmallConfig.block_k is 8"):
        SmallConfig(block_k=8)
