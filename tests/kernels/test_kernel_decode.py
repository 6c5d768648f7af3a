"""Decoding: one projection and groups, in one launch and in two, one row and up to sixteen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.cases import LLAMA_8B
from benchmarks.kernels.decode import launches
from benchmarks.kernels.table import traffic
from benchmarks.static.run import TARGETS
from peftkern.kernels import decode as module
from peftkern.kernels import reference
from peftkern.kernels.common import cdiv
from peftkern.kernels.decode import MAX_ROWS, DecodeConfig, decode, decode_group, default_config
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, blas, far_rows, few, matrix

H200 = TARGETS["sm_90"].arch


def base(M, K, N, dtype, conv1d, bias, seed=1):
    x = matrix(M, K, dtype, seed=0, offset=1)
    w = (
        matrix(K, N, dtype, seed=seed, scale=0.2).T
        if conv1d
        else matrix(N, K, dtype, seed=seed, scale=0.2)
    )
    return x, w, matrix(1, N, dtype, seed=seed + 1)[0] if bias else None


def assert_right(out, x, w, b, c, s, low):
    """``out`` has no larger error than torch's products; ``low`` is torch's S in x's dtype."""
    M, N, dtype = x.shape[0], w.shape[0], x.dtype
    plain = x @ w.T + low @ b.to(dtype).T
    plain = [plain if c is None else plain + c]
    if dtype == torch.float32:
        # as the kernel's tiles are: W and B on the left, never fewer than 16 rows of x or outputs
        xs = torch.nn.functional.pad(x, (0, 0, 0, 16 - M)).T
        low = torch.nn.functional.pad(low.T, (0, 16 - M))
        wide = 16 * -(-N // 16) // N + 1
        y = (blas(b.repeat(wide, 1), low) + blas(w.repeat(wide, 1), xs))[:N, :M].T
        plain.append(y if c is None else y + c)
    assert_as_good_as_torch(out, plain, reference.linear(x, w, s, b, c))


def torchs_s(x, a, scale):
    dtype = x.dtype
    if dtype != torch.float32:
        return scale * (x @ a.to(dtype).T)
    xs = torch.nn.functional.pad(x, (0, 0, 0, 16 - x.shape[0])).T
    return scale * blas(a, xs)[:, : x.shape[0]].T


def check(M, K, N, r, dtype, adapter, conv1d=False, bias=False, given_s=False, config=None):
    x, w, c = base(M, K, N, dtype, conv1d, bias)
    a, b = matrix(r, K, adapter, seed=3, scale=0.2), matrix(N, r, adapter, seed=4, scale=0.2)
    s, low = reference.shrink(x, a, 2.0), torchs_s(x, a, 2.0)
    if given_s:
        s = low = s.to(dtype)
        out = decode(x, w, None, b, bias=c, s=s, config=config)
    else:
        out = decode(x, w, a, b, 2.0, c, config=config)
        assert torch.equal(out, decode(x, w, a, b, 2.0, c, config=config)), "two runs differ"
    assert_right(out, x, w, b, c, s, low)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, K, N, r",
    [(1, 341, 41, 8), (1, 600, 9, 100), (9, 341, 41, 8), (16, 64, 100, 37), (3, 33, 1, 256)],
)
def test_against_float64(M, K, N, r, dtype):
    check(M, K, N, r, dtype, torch.float32, bias=True)


@pytest.mark.parametrize("split_k", [0, 1, 3])
@pytest.mark.parametrize("M, K, r", [(1, 2500, 9), (1, 70, 65), (5, 300, 130), (16, 300, 3)])
def test_one_launch_and_two(M, K, r, split_k):
    config = DecodeConfig(block_n=16, block_k=64, split_k=split_k)
    check(M, K, 37, r, torch.bfloat16, torch.float32, bias=True, config=config)


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_s_and_conv1d_weight(M, dtype):
    check(M, 100, 70, 12, dtype, dtype, given_s=True)
    check(M, 100, 70, 12, dtype, dtype, conv1d=True)
    check(M, 40, 20, 200, dtype, dtype, given_s=True)


@few
@given(
    M=st.integers(1, 6),
    K=st.integers(1, 150),
    N=st.integers(1, 80),
    r=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    same=st.booleans(),
    split_k=st.integers(0, 2),
)
def test_any_shape(M, K, N, r, dtype, same, split_k):
    adapter = dtype if same else torch.float32
    config = DecodeConfig(block_n=16, block_k=64, split_k=split_k)
    check(M, K, N, r, dtype, adapter, conv1d=same, config=config)


# ------------------------------------------------------------------------------------- groups


def check_group(M, K, Ns, ranks, dtype, adapter, config=None, conv1d=()):
    parts = []
    for i, (N, r) in enumerate(zip(Ns, ranks, strict=True)):
        x, w, c = base(M, K, N, dtype, i in conv1d, bias=i != 1, seed=10 * i + 1)
        a = matrix(r, K, adapter, seed=10 * i + 3, offset=1, scale=0.2)
        parts.append((w, a, matrix(N, r, adapter, seed=10 * i + 4, offset=1, scale=0.2), c))
    ws, As, Bs, biases = (list(column) for column in zip(*parts, strict=True))
    scales = [0.5 * (i + 1) for i in range(len(Ns))]
    ys = decode_group(x, ws, As, Bs, scales, biases, config=config)
    again = decode_group(x, ws, As, Bs, scales, biases, config=config)
    assert all(torch.equal(y, z) for y, z in zip(ys, again, strict=True)), "two runs differ"
    for y, (w, a, b, c), scale in zip(ys, parts, scales, strict=True):
        assert y.dtype == dtype
        assert_right(y, x, w, b, c, reference.shrink(x, a, scale), torchs_s(x, a, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 7])
def test_a_group_against_float64(M, dtype):
    check_group(M, 130, (41, 8, 70), (8, 3, 20), dtype, torch.float32)
    check_group(M, 64, (9, 33), (100, 5), dtype, dtype, conv1d=(1,))


@few
@given(
    M=st.integers(1, 16),
    K=st.integers(1, 130),
    members=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    split_k=st.integers(0, 2),
)
def test_any_group(M, K, members, dtype, split_k):
    Ns, ranks = zip(*members, strict=True)
    config = DecodeConfig(block_n=8 if M == 1 else 16, block_k=64, split_k=split_k)
    check_group(M, K, Ns, ranks, dtype, torch.float32, config, conv1d=(2,))


@pytest.mark.parametrize("M", [1, 4])
def test_a_group_is_as_each_alone(M):
    """The same tiles give the same bits, whatever else is in the launch."""
    config = DecodeConfig(block_n=16, block_k=64, split_k=2)
    x = matrix(M, 200, torch.float32, seed=0)
    ws = [matrix(n, 200, torch.float32, seed=n) for n in (40, 17)]
    As = [matrix(16, 200, torch.float32, seed=50 + i) for i in range(2)]
    Bs = [matrix(n, 16, torch.float32, seed=60 + n) for n in (40, 17)]
    together = decode_group(x, ws, As, Bs, config=config)
    for y, w, a, b in zip(together, ws, As, Bs, strict=True):
        assert torch.equal(y, decode(x, w, a, b, config=config))


def test_adapters_of_two_dtypes_in_a_group():
    x = matrix(2, 40, torch.bfloat16, seed=0)
    ws = [matrix(24, 40, torch.bfloat16, seed=1 + i) for i in range(2)]
    As = [matrix(4, 40, t, seed=3) for t in (torch.float32, torch.bfloat16)]
    Bs = [matrix(24, 4, t, seed=5) for t in (torch.float32, torch.bfloat16)]
    for y, w, a, b in zip(decode_group(x, ws, As, Bs), ws, As, Bs, strict=True):
        assert_right(y, x, w, b, None, reference.shrink(x, a, 1.0), torchs_s(x, a, 1.0))


# ------------------------------------------------------------------------- memory and launches


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
    a, b = torch.ones(2, 4), torch.ones(7, 2)
    assert decode(torch.ones(0, 4), torch.ones(7, 4), a, b).shape == (0, 7)
    none = decode_group(torch.ones(3, 4), [torch.ones(0, 4), torch.ones(7, 4)], [a, a], [b[:0], b])
    assert none[0].shape == (3, 0)
    assert torch.equal(none[1], decode(torch.ones(3, 4), torch.ones(7, 4), a, b))
    bias = torch.arange(7.0)
    for M in (1, 3):  # nothing to sum
        x = torch.ones(M, 0)
        y = decode(x, torch.ones(7, 0), torch.ones(2, 0), b, bias=bias)
        assert torch.equal(y, bias.expand(M, 7))


def counted(m, ns, k, r, adapter=torch.float32):
    """Bytes that all programs load on an H200, over those of W in bf16."""
    found = launches(m, ns, k, [r] * len(ns), H200, adapter=adapter)
    return sum(traffic(launch).requested for launch in found) / (2 * k * sum(ns))


@pytest.mark.parametrize("r", [16, 64])
def test_a_is_read_once_and_not_by_every_program(r):
    """Counted: with one row at most 1.1 times W's bytes."""
    assert counted(1, [4096], 4096, r) <= 1.1
    for m in (1, 16):
        first, second = launches(m, [4096], 4096, [r], H200)
        assert traffic(first).read == 4 * r * 4096 + 2 * m * 4096
        assert set(second.args[second.kernel.arg_names.index("As")]) == {None}


def test_one_launch_where_a_is_small():
    assert len(launches(1, [256], 256, [16], H200)) == 1
    assert len(launches(16, [256], 256, [16], H200)) == 1
    assert len(launches(1, [4096], 4096, [16], H200)) == 2
    for n in (64, 256, 384, 512, 1024):
        config = default_config(1, [n], 512, [16], H200)
        again = (cdiv(n, config.block_n) - 1) * 4 * 16 * 512
        assert (config.split_k == 0) == (again <= module.LAUNCH_BYTES), n


LATENCY, BANDWIDTH = 700e-9, 4.3e12  # of an H200's memory: Little's law gives the bytes in flight


@pytest.mark.parametrize("ns", [[4096], [14336], [4096, 1024, 1024], [14336, 14336]], ids=str)
@pytest.mark.parametrize("m", [1, 16])
def test_programs_fill_waves_with_enough_bytes_in_flight(ns, m):
    """Modelled: one resident program an SM, with W's copies ahead, already saturates memory."""
    stream = launches(m, ns, LLAMA_8B.hidden, [16] * len(ns), H200)[-1]
    (programs,), meta = stream.grid, stream.meta
    waves = programs / H200.sms
    assert waves / -(-waves // 1) >= (0.9 if m == 1 else 0.8)
    ahead = (meta["num_stages"] - 1) * 2 * meta["BLOCK_N"] * meta["BLOCK_K"]
    assert ahead * min(programs, H200.sms) >= LATENCY * BANDWIDTH


# ---------------------------------------------------------------------------------- bad input


def test_bad_arguments_are_named():
    x, w, a, b = torch.ones(2, 6), torch.ones(7, 6), torch.ones(3, 6), torch.ones(7, 3)
    with pytest.raises(ValueError, match=f"x has {MAX_ROWS + 1} rows; allowed: at most {MAX_ROWS}"):
        decode(torch.ones(MAX_ROWS + 1, 6), w, a, b)
    with pytest.raises(ValueError, match=r"w has shape \(7, 5\); allowed: \(7, 6\)"):
        decode(x, torch.ones(7, 5), a, b)
    with pytest.raises(ValueError, match=r"b has shape \(6, 3\); allowed: \(7, 3\)"):
        decode(x, w, a, torch.ones(6, 3))
    with pytest.raises(ValueError, match=r"a has shape \(1, 3, 6\); allowed: a matrix"):
        decode(x, w, a[None], b)
    with pytest.raises(ValueError, match="b has rank 0"):
        decode(x, w, torch.ones(0, 6), torch.ones(7, 0))
    with pytest.raises(ValueError, match="a and s: allowed: exactly one"):
        decode(x, w, None, b)
    with pytest.raises(ValueError, match="DecodeConfig.block_k is 8"):
        DecodeConfig(block_k=8)
    with pytest.raises(ValueError, match="DecodeConfig.split_k is 17; allowed: 0 to 16"):
        DecodeConfig(split_k=17)


def test_bad_arguments_of_a_group_are_named():
    x, w, a, b = torch.ones(2, 6), torch.ones(7, 6), torch.ones(3, 6), torch.ones(7, 3)
    with pytest.raises(ValueError, match="ws has 2 entries, As 1; allowed: equal counts"):
        decode_group(x, [w, w], [a], [b])
    with pytest.raises(ValueError, match="ws has 0 entries"):
        decode_group(x, [], [], [])
    with pytest.raises(ValueError, match=r"ws\[1\] has shape \(7, 5\); allowed: \(7, 6\)"):
        decode_group(x, [w, torch.ones(7, 5)], [a, a], [b, b])
    with pytest.raises(ValueError, match=r"As\[1\] has shape \(2, 6\); allowed: \(3, 6\)"):
        decode_group(x, [w, w], [a, a[:2]], [b, b])
    with pytest.raises(TypeError, match=r"Bs\[0\] has dtype torch.float64; allowed: torch.float32"):
        decode_group(x, [w], [a], [b.double()])
    with pytest.raises(TypeError, match=r"ws\[0\] has dtype torch.float16; allowed: torch.float32"):
        decode_group(x, [w.half()], [a], [b])
    with pytest.raises(ValueError, match=r"biases\[0\] has shape \(6,\); allowed: \(7,\)"):
        decode_group(x, [w], [a], [b], 1.0, [torch.ones(6)])
    with pytest.raises(ValueError, match="scales has 2 entries; allowed: 1"):
        decode_group(x, [w], [a], [b], [1.0, 2.0])
