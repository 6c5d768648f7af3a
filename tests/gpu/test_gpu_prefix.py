"""Prefix attention against float64 on the device, in odd and in real shapes, with every mask.

Decoding also runs in a CUDA graph, and repeated runs give the same bits.
"""

import pytest
import torch

from tests.gpu.ground import (
    DEVICE,
    DTYPES,
    ON_CPU,
    as_good_as_torch,
    poison,
    prefix_attention,
    prefix_backward,
    prefix_decode,
    prefix_reference,
    some,
)

BF16, FP32 = torch.bfloat16, torch.float32
# (B, H, H_kv, T, S, P, D): odd in everything, just off tiles, a Llama's
SHAPES = [(3, 5, 1, 37, 53, 19, 24), (2, 8, 2, 129, 129, 65, 80), (2, 32, 8, 1024, 1024, 128, 128)]


def draw(shape, dtype=BF16, shared=True):
    """q, k, v, the prefix's keys and values, dO; small in the interpreter."""
    B, H, H_kv, T, S, P, D = (min(n, 21) for n in shape) if ON_CPU else shape
    B = min(B, 2) if ON_CPU else B
    H = H_kv * max(1, min(H, 4) // H_kv) if ON_CPU else H
    D = min(D, 16) if ON_CPU else D
    S = max(S, T)
    q, k, v, grad = (
        some(B, n, heads, D, dtype=dtype, seed=i).transpose(1, 2)
        for i, (n, heads) in enumerate(((T, H), (S, H_kv), (S, H_kv), (T, H)))
    )
    lead = () if shared else (B,)
    return [q, k, v, *(some(*lead, H_kv, P, D, dtype=dtype, seed=7 + i) for i in range(2)), grad]


def by_torch(tensors, dtype, options, train=True):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:5]]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().to(dtype).requires_grad_()
        leaves.append(options["sinks"])
    o, lse = prefix_reference.attend(*leaves[:5], dtype=dtype, **options)
    grads = torch.autograd.grad(o, leaves, tensors[5].to(dtype)) if train else ()
    return o.detach(), lse.detach(), grads


def verify(tensors, options):
    """Forward and backward, twice to the bit."""
    poison()
    q, grad = tensors[0], tensors[5]
    o, lse = prefix_attention.attend(*tensors[:5], **options)
    exact, plain = (by_torch(tensors, t, options) for t in (torch.float64, q.dtype))
    as_good_as_torch(o, plain[0], exact[0])
    seen = exact[1] > float("-inf")
    assert torch.equal(seen, lse > float("-inf"))
    assert (lse[seen] - exact[1][seen]).abs().max().item() < 1e-2  # tf32 is off, fp32 sums
    grads = prefix_backward.attend_backward(grad, *tensors[:5], o, lse, **options)
    for got, rough, want in zip(grads, plain[2], exact[2], strict=False):
        if want.norm() == 0:
            assert not got.any()
        else:
            as_good_as_torch(got, rough, want)
    again = prefix_attention.attend(*tensors[:5], **options)
    assert torch.equal(o, again[0]) and torch.equal(lse, again[1])
    repeated = prefix_backward.attend_backward(grad, *tensors[:5], o, lse, **options)
    assert all(a is b or torch.equal(a, b) for a, b in zip(grads, repeated, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_causal(shape, dtype, shared):
    if dtype == FP32 and shape[-1] > 64 and not ON_CPU:
        assert prefix_backward.declines(dtype, shape[-1])
        shape = (*shape[:-1], 64)
    verify(draw(shape, dtype, shared), {})


def masks(tensors):
    q, k = tensors[:2]
    B, H, T, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    keep = torch.arange(S, device=DEVICE)[None] >= torch.arange(B, device=DEVICE)[:, None] * (
        S // 3
    )
    none = torch.arange(B, device=DEVICE) % 2 == 1
    return {
        "both ways": dict(causal=False),
        "padded": dict(keep=keep),
        "window": dict(window=S // 2),
        "no prefix": dict(no_prefix=none),
        "offset": dict(q_offset=torch.full((B,), S - T, dtype=torch.int32, device=DEVICE)),
        "softcap": dict(softcap=5.0),
        "sinks": dict(sinks=torch.linspace(-1, 1, H, device=DEVICE)),
        "all": dict(
            keep=keep, window=S // 2 + 1, no_prefix=none, softcap=20.0,
            q_offset=torch.tensor(S - T, device=DEVICE),
            sinks=torch.linspace(-1, 1, H, device=DEVICE),
        ),
    }  # fmt: skip


MASKS = ("both ways", "padded", "window", "no prefix", "offset", "softcap", "sinks", "all")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_every_mask(mask, D):
    tensors = draw((2, 8, 2, 300, 333, 70, D))
    verify(tensors, masks(tensors)[mask])


@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 112, 128, 192, 256])
def test_head_dims(D):
    verify(draw((1, 4, 2, 70, 90, 33, D), torch.float16), {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_decode(D, shared, T, dtype):
    tensors = draw((8, 32, 8, T, 512, 128, D), dtype, shared)
    for name in ("padded", "window", "all"):
        options = masks(tensors)[name]
        poison()
        o, _ = prefix_decode.decode(*tensors[:5], **options)
        exact, plain = (
            by_torch(tensors, t, options, train=False)[0] for t in (torch.float64, dtype)
        )
        as_good_as_torch(o, plain, exact)
        assert torch.equal(o, prefix_decode.decode(*tensors[:5], **options)[0])


def test_decode_merges_what_its_own_first_launch_wrote():
    """The merge is started early, and must not read the parts of the call before."""
    q, k, v, pk, pv, _ = draw((8, 32, 8, 1, 512, 128, 128))
    drawn = [(q, k, v, pk, pv), (q, k, -v, pk, -pv)]
    want = [prefix_decode.decode(*tensors)[0].clone() for tensors in drawn]
    assert not torch.equal(*want)
    for i in range(4 if ON_CPU else 200):
        assert torch.equal(prefix_decode.decode(*drawn[i % 2])[0], want[i % 2])


def test_keys_past_the_offset_and_padding_may_hold_anything():
    q, k, v, pk, pv, _ = draw((2, 8, 2, 1, 200, 30, 64))
    S = k.shape[2]
    at = torch.full((1,), S // 2, dtype=torch.int32, device=DEVICE)
    keep = torch.arange(S, device=DEVICE)[None].expand(2, S) > 3
    run = prefix_decode.decode
    want, _ = run(q, k, v, pk, pv, q_offset=at, keep=keep)
    k, v = k.clone(), v.clone()
    for t in (k, v):
        t[:, :, S // 2 + 1 :], t[:, :, :4] = float("nan"), float("nan")
    assert torch.equal(run(q, k, v, pk, pv, q_offset=at, keep=keep)[0], want)


@pytest.mark.skipif(ON_CPU, reason="needs CUDA graphs")
def test_a_graph_follows_the_offset_on_the_device():
    tensors = draw((8, 32, 8, 1, 512, 128, 128))[:5]
    at = torch.full((1,), 3, dtype=torch.int32, device=DEVICE)
    prefix_decode.decode(*tensors, q_offset=at)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = prefix_decode.decode(*tensors, q_offset=at)
    for offset in (3, 100, 511):
        at.fill_(offset)
        graph.replay()
        want, _ = prefix_decode.decode(*tensors, q_offset=offset)
        assert torch.equal(o, want)


@pytest.mark.skipif(ON_CPU, reason="needs 8 GiB")
def test_offsets_past_int32():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB free")
    storage = torch.zeros(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, 1, 3, 64), (0, 0, 2**30, 1))
    far.copy_(some(1, 1, 3, 64, dtype=torch.float16))
    prefix = [some(1, 5, 64, dtype=torch.float16, seed=i) for i in range(2)]
    near = [far.contiguous()] * 3
    for run in (prefix_attention.attend, prefix_decode.decode):
        assert torch.equal(run(far, far, far, *prefix)[0], run(*near, *prefix)[0])
