"""Every kernel against float64 on the device, in odd and in real shapes."""

import pytest
import torch

from tests.gpu.ground import (
    DEVICE,
    DTYPES,
    ON_CPU,
    as_good_as_torch,
    bits,
    cut,
    decode,
    expand,
    gemm,
    grad_a,
    grad_sb,
    mixed,
    poison,
    reference,
    shrink,
    some,
    words_of,
)

BF16, FP32 = torch.bfloat16, torch.float32
# (M, K, N, r): odd in everything, just off tiles, and two of Llama-8B
SHAPES = [(37, 341, 41, 5), (129, 264, 1000, 16), (4095, 4096, 4096, 16), (512, 4096, 14336, 64)]
RANKS = [1, 3, 8, 17, 64, 100, 128, 256]


def masked(t, keep):
    return t if keep is None else t * keep


@pytest.mark.parametrize("p", [0.1, 0.5, 0.03])
def test_bits_are_the_reference_words(p):
    M, K = cut(300, 4100)
    got = bits.dropout_bits(M, K, p, 2**40 + 5, groups=2, device=DEVICE)
    for group in (0, 1):
        assert torch.equal(got[group].cpu(), bits.reference_bits(M, K, p, 2**40 + 5, group=group))
    seed = torch.tensor([2**40 + 5], device=DEVICE)
    assert torch.equal(bits.dropout_bits(M, K, p, seed, groups=2, device=DEVICE), got)


@pytest.mark.skipif(ON_CPU, reason="needs many draws")
def test_bits_keep_as_many_as_asked():
    words = bits.dropout_bits(8192, 4096, 0.1, 3, device=DEVICE)
    kept = bits.unpack_bits(words, 4096).double()
    assert abs(kept.mean().item() - 0.9) < 3e-4  # 5 standard deviations of 33 million draws
    assert abs((kept[:, 1:] * kept[:, :-1]).mean().item() - 0.81) < 5e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_low_rank_kernels(shape, dtype, mask):
    M, K, N, r = cut(*shape)
    x, dy = some(M, K, dtype=dtype, gap=3), some(M, N, dtype=dtype, seed=1)
    A, B = some(r, K, dtype=FP32, seed=2, scale=0.1), some(N, r, dtype=FP32, seed=3, scale=0.1)
    words, keep = words_of(M, K) if mask else (None, None)
    low_a, low_b = A.to(dtype), B.to(dtype)

    poison()
    s = shrink.shrink(x, [A, A], [2.0, 0.5], words)
    exact = torch.cat([reference.shrink(x, A, c, keep) for c in (2.0, 0.5)], 1)
    plain = torch.cat([c * (masked(x, keep) @ low_a.T) for c in (2.0, 0.5)], 1)
    as_good_as_torch(s, plain, exact)
    s = s[:, :r]

    y = expand.expand(s, B, some(N, dtype=dtype, seed=4))
    bias = some(N, dtype=dtype, seed=4)
    as_good_as_torch(y, s @ low_b.T + bias, reference.expand(s, B, bias))

    ds, db = grad_sb.grad_sb(dy, B, s, 2.0)
    as_good_as_torch(ds, 2.0 * (dy @ low_b), reference.grad_s(dy, B, 2.0))
    exact_db = reference.grad_b(dy, s)
    assert db.dtype == FP32
    as_good_as_torch(db, (dy.T @ s).float(), exact_db)

    (da,) = grad_a.grad_a(x, [ds], words)
    as_good_as_torch(da, (ds.T @ masked(x, keep)).float(), reference.grad_a(x, ds, keep))

    dx = expand.low_rank_grad_input([ds, s], [A, A], words)
    plain = masked(ds @ low_a, keep) + masked(s @ low_a, keep)
    as_good_as_torch(dx, plain, reference.low_rank_grad_input([ds, s], [A, A], [keep, keep]))


@pytest.mark.parametrize("r", RANKS)
def test_every_rank(r):
    M, K, N = cut(200, 512, 384)
    x, dy = some(M, K), some(M, N, seed=1)
    A, B = some(r, K, dtype=FP32, seed=2, scale=0.1), some(N, r, dtype=FP32, seed=3, scale=0.1)
    words, keep = words_of(M, K)
    s = shrink.shrink(x, [A], 1.0, words)
    as_good_as_torch(s, masked(x, keep) @ A.bfloat16().T, reference.shrink(x, A, 1.0, keep))
    ds, db = grad_sb.grad_sb(dy, B, s)
    as_good_as_torch(ds, dy @ B.bfloat16(), reference.grad_s(dy, B, 1.0))
    as_good_as_torch(db, (dy.T @ s).float(), reference.grad_b(dy, s))
    (da,) = grad_a.grad_a(x, [ds], words)
    as_good_as_torch(da, (ds.T @ masked(x, keep)).float(), reference.grad_a(x, ds, keep))
    w = some(N, K, seed=5, scale=K**-0.5)
    y = gemm.fused_linear(x, w, s, B)
    as_good_as_torch(y, x @ w.T + s @ B.bfloat16().T, reference.linear(x, w, s, B))
    dx = gemm.fused_grad_input([dy], [w], [ds], [A], words)
    plain = dy @ w + masked(ds @ A.bfloat16(), keep)
    as_good_as_torch(dx, plain, reference.grad_input([dy], [w], [ds], [A], [keep]))
    one = decode.decode(x[:1], w, A, B)
    low = reference.shrink(x[:1], A, 1.0)
    plain = x[:1] @ w.T + (x[:1] @ A.bfloat16().T) @ B.bfloat16().T
    as_good_as_torch(one, plain, reference.linear(x[:1], w, low, B))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_fused_product(shape, dtype, conv1d):
    M, K, N, r = cut(*shape)
    x = some(M, K, dtype=dtype)
    w = some(K, N, dtype=dtype, seed=1, scale=K**-0.5).T if conv1d else None
    w = some(N, K, dtype=dtype, seed=1, scale=K**-0.5) if w is None else w
    s, B = some(M, r, dtype=dtype, seed=2), some(N, r, dtype=FP32, seed=3, scale=0.2)
    bias = some(N, dtype=dtype, seed=4)
    poison()
    y = gemm.fused_linear(x, w, s, B, bias)
    plain = x @ w.T + s @ B.to(dtype).T + bias
    as_good_as_torch(y, plain, reference.linear(x, w, s, B, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_fused_grad_input(shape, mask, group):
    M, K, N, r = cut(*shape)
    dys = [some(M, N, seed=i) for i in range(group)]
    ws = [some(N, K, seed=5 + i, scale=N**-0.5) for i in range(group)]
    ds = [some(M, r, seed=10 + i) for i in range(group)]
    As = [some(r, K, dtype=FP32, seed=15 + i, scale=0.2) for i in range(group)]
    masks = [words_of(M, K, i) if mask else (None, None) for i in range(group)]
    poison()
    dx = gemm.fused_grad_input(dys, ws, ds, As, [w for w, _ in masks])
    keeps = [k for _, k in masks]
    plain = sum(d @ w for d, w in zip(dys, ws, strict=True))
    plain = plain + sum(masked(d @ a.bfloat16(), k) for d, a, k in zip(ds, As, keeps, strict=True))
    as_good_as_torch(dx, plain, reference.grad_input(dys, ws, ds, As, keeps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 7, 16])
def test_decode(M, dtype):
    for K, N, r in (cut(341, 41, 5), cut(4096, 4096, 16), cut(4096, 1024, 64)):
        x, w = some(M, K, dtype=dtype, gap=1), some(N, K, dtype=dtype, seed=1, scale=K**-0.5)
        A, B = some(r, K, dtype=FP32, seed=2, scale=0.1), some(N, r, dtype=FP32, seed=3, scale=0.2)
        bias = some(N, dtype=dtype, seed=4)
        poison()
        y = decode.decode(x, w, A, B, 2.0, bias)
        plain = x @ w.T + (2.0 * (x @ A.to(dtype).T)) @ B.to(dtype).T + bias
        as_good_as_torch(y, plain, reference.linear(x, w, reference.shrink(x, A, 2.0), B, bias))


@pytest.mark.parametrize("M", [1, 7, 16])
def test_decode_group(M):
    (K,), Ns, ranks = cut(4096), cut(4096, 1024, 1000), cut(16, 64, 5)
    x = some(M, K)
    ws = [some(n, K, seed=1 + i, scale=K**-0.5) for i, n in enumerate(Ns)]
    As = [some(r, K, dtype=FP32, seed=5 + i, scale=0.1) for i, r in enumerate(ranks)]
    pairs = enumerate(zip(Ns, ranks, strict=True))
    Bs = [some(n, r, dtype=FP32, seed=9 + i, scale=0.2) for i, (n, r) in pairs]
    biases = [None, some(Ns[1], seed=13), None]
    poison()
    ys = decode.decode_group(x, ws, As, Bs, [2.0, 1.0, 0.5], biases)
    for y, w, A, B, c, scale in zip(ys, ws, As, Bs, biases, [2.0, 1.0, 0.5], strict=True):
        plain = x @ w.T + (scale * (x @ A.bfloat16().T)) @ B.bfloat16().T
        s = reference.shrink(x, A, scale)
        as_good_as_torch(y, plain if c is None else plain + c, reference.linear(x, w, s, B, c))


@pytest.mark.parametrize("M", [1, 16])
def test_decode_sees_what_was_written_just_before(M):
    """Its second launch starts early, and must not read ahead of the work before the first."""
    K, N, r = cut(4096, 4096, 16)
    x, w, A, B = (torch.empty_like(t) for t in (some(M, K), some(N, K), some(r, K), some(N, r)))
    poison()
    for seed in range(3 if ON_CPU else 20):
        x.copy_(some(M, K, seed=seed))
        A.copy_(some(r, K, seed=seed + 1, scale=0.1))
        B.copy_(some(N, r, seed=seed + 2, scale=0.2))
        w.copy_(some(N, K, seed=seed + 3, scale=K**-0.5))
        y, again = decode.decode(x, w, A, B), decode.decode(x, w, A, B)
        assert torch.equal(y, again)
        exact = reference.linear(x, w, reference.shrink(x, A, 1.0), B)
        as_good_as_torch(y, x @ w.T + (x @ A.T) @ B.T, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3, 150])
@pytest.mark.parametrize("index", [[0], [-1], [2, -1, 0, 1, 2, 2, -1, 0, 1]])
def test_a_mixed_batch(index, T, dtype):
    K, N = cut(1024, 520)
    x, w = some(len(index) * T, K, dtype=dtype), some(N, K, dtype=dtype, seed=1, scale=K**-0.5)
    ranks, scales = (8, 20, 64), [0.5, 1.0, 2.0]
    As = [some(r, K, dtype=FP32, seed=2 + r, scale=0.1) for r in ranks]
    Bs = [some(N, r, dtype=FP32, seed=3 + r, scale=0.2) for r in ranks]
    where = torch.tensor(index, dtype=torch.int32, device=DEVICE)
    poison()
    y = mixed.mixed(x, w, As, Bs, scales, where)
    plain = x @ w.T
    for j, i in enumerate(index):
        if i >= 0:
            part = slice(j * T, j * T + T)
            plain[part] += (scales[i] * (x[part] @ As[i].to(dtype).T)) @ Bs[i].to(dtype).T
    as_good_as_torch(y, plain, reference.mixed(x, w, As, Bs, scales, index))


def test_an_index_rewritten_between_replays_of_a_graph():
    K, N = cut(256, 128)
    x, w = some(4, K), some(N, K, seed=1, scale=K**-0.5)
    As, Bs = [some(r, K, seed=r) for r in (4, 16)], [some(N, r, seed=9 + r) for r in (4, 16)]
    index = torch.tensor([0, 1, -1, 0], dtype=torch.int32, device=DEVICE)
    if DEVICE.type == "cuda":
        mixed.mixed(x, w, As, Bs, [1.0, 1.0], index)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mixed.mixed(x, w, As, Bs, [1.0, 1.0], index)
    for choice in ([0, 1, -1, 0], [1, -1, 9, 0]):  # 9 is out of range: the base alone
        index.copy_(torch.tensor(choice, dtype=torch.int32))
        if DEVICE.type == "cuda":
            graph.replay()
            got = y.clone()
        else:
            got = mixed.mixed(x, w, As, Bs, [1.0, 1.0], index)
        fresh = torch.tensor([c if c < 2 else -1 for c in choice], dtype=torch.int32, device=DEVICE)
        assert torch.equal(got, mixed.mixed(x, w, As, Bs, [1.0, 1.0], fresh))


def test_no_rows():
    x, A, B = some(0, 64), some(4, 64), some(32, 4)
    s = shrink.shrink(x, [A])
    assert s.shape == (0, 4) and expand.expand(s, B).shape == (0, 32)
    assert gemm.fused_linear(x, some(32, 64), s, B).shape == (0, 32)
    ds, db = grad_sb.grad_sb(some(0, 32), B, s)
    assert ds.shape == (0, 4) and not db.any()
    assert not grad_a.grad_a(x, [ds])[0].any()
    assert decode.decode(x, some(32, 64), A, B).shape == (0, 32)
    assert bits.dropout_bits(0, 64, 0.1, 1, device=DEVICE).shape == (0, 2)


@pytest.mark.skipif(ON_CPU, reason="4 GB of address space are for the device")
def test_offsets_past_int32():
    storage = torch.empty(2**31 + 2**20, dtype=BF16, device=DEVICE)
    far = storage.as_strided((3, 512), (2**30, 1))  # the third row starts past 2**31 elements
    far.copy_(some(3, 512))
    near = far.contiguous()
    A, B, w = some(16, 512, scale=0.1), some(256, 16, seed=1), some(256, 512, seed=2, scale=0.05)
    words, keep = words_of(3, 512)
    s = shrink.shrink(far, [A], 1.0, words)
    as_good_as_torch(s, (near * keep) @ A.T, reference.shrink(near, A, 1.0, keep))
    for tma in (False, True):
        config = gemm.GemmConfig(64, 64, 32, tma=tma, num_warps=4, num_stages=2)
        y = gemm.fused_linear(far, w, s, B, config=config)
        as_good_as_torch(y, near @ w.T + s @ B.T, reference.linear(near, w, s, B))
    ds, db = grad_sb.grad_sb(far, some(512, 16, seed=3), s)
    as_good_as_torch(db, (near.T @ s).float(), reference.grad_b(near, s))
    (da,) = grad_a.grad_a(far, [ds], words)
    as_good_as_torch(da, (ds.T @ (near * keep)).float(), reference.grad_a(near, ds, keep))
    y = decode.decode(far, w, A, B)
    low = reference.shrink(near, A, 1.0)
    as_good_as_torch(y, near @ w.T + (near @ A.T) @ B.T, reference.linear(near, w, low, B))
    y = decode.decode(near[:2], far[:, :512], A, B[:3])  # and rows of W that far apart
    low = reference.shrink(near[:2], A, 1.0)
    as_good_as_torch(
        y,
        near[:2] @ near.T + (near[:2] @ A.T) @ B[:3].T,
        reference.linear(near[:2], near, low, B[:3]),
    )


@pytest.mark.skipif(ON_CPU, reason="more than 2**31 elements")
def test_outputs_of_more_than_int32_elements():
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    M, N = 2**17 + 8, 2**14 + 64  # 2.1e9 elements
    s, B = some(M, 8), some(N, 8, seed=1)
    y = expand.expand(s, B)
    for rows in (slice(0, 64), slice(M // 2, M // 2 + 64), slice(M - 64, M)):
        as_good_as_torch(y[rows], s[rows] @ B.T, reference.expand(s[rows], B))
    ds, db = grad_sb.grad_sb(y, B, s)
    rows = slice(M - 64, M)
    as_good_as_torch(ds[rows], y[rows] @ B, reference.grad_s(y[rows], B, 1.0))
    assert bool(db.isfinite().all())
