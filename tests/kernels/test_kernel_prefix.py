"""The kernels for prefix attention, forward and backward, against float64 autograd.

Every mask, group, head dimension and dtype is tested, and which memory is never read and which
calls are refused. Decoding is in test_kernel_prefix_decode.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkern.kernels import prefix_reference
from peftkern.kernels.prefix_attention import AttendConfig, attend
from peftkern.kernels.prefix_backward import BackwardConfig, attend_backward
from peftkern.kernels.prefix_tile import check
from tests.kernels.oracle import DTYPES, assert_as_good_as_torch, far_rows, few

SMALL = AttendConfig(16, 16, 4, 1)
BACK = BackwardConfig(16, 16, 16, 16, 2, 4, 1, 4, 1)
MASK = ("causal", "q_offset", "window", "keep", "no_prefix")
NAMES = ("q", "k", "v", "prefix_key", "prefix_value", "sinks")


def draw(B, H, H_kv, T, S, P, D, dtype=torch.float32, *, shared=True, seed=0):
    """q, k, v [B, heads, rows, D], in memory [B, rows, heads, D], and a dense prefix."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    q, k, v = (some(B, n, h, D).transpose(1, 2) for n, h in ((T, H), (S, H_kv), (S, H_kv)))
    return [q, k, v, *(some(*(() if shared else (B,)), H_kv, P, D) for _ in range(2))]


def by_torch(tensors, grad_o, dtype, options):
    """(O, LSE, gradients) of the reference formula computed in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    options = dict(options)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].detach().to(dtype).requires_grad_()
        leaves.append(options["sinks"])
    o, lse = prefix_reference.attend(*leaves[:5], dtype=dtype, **options)
    grads = torch.autograd.grad(o, leaves, grad_o.to(dtype)) if grad_o is not None else ()
    return o.detach(), lse.detach(), grads


def by_vendor(tensors, grad_o, options):
    """(O, gradients) by torch's own fused attention on the concatenated sources.

    In fp32 a backward from O and LSE, like the kernel's, has larger errors than autograd through
    the softmax. None when torch's attention cannot compute it.
    """
    mask = {k: v for k, v in options.items() if k in MASK}
    if tensors[0].dtype != torch.float32 or set(options) - set(MASK):
        return None
    q, k, v, pk, pv = leaves = [t.detach().clone().requires_grad_() for t in tensors]
    B, H, T, _ = q.shape
    q = q.contiguous()
    see = prefix_reference.visible(T, k.shape[2], pk.shape[-2], **mask).expand(B, H, -1, -1)
    if not bool(see.any(-1).all()):
        return None
    keys, values = (
        torch.cat([p.expand(B, *p.shape[-3:]), own], 2).repeat_interleave(H // k.shape[1], 1)
        for p, own in ((pk, k), (pv, v))
    )
    bias = torch.zeros(see.shape).masked_fill(~see, float("-inf"))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        o = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    return o.detach(), torch.autograd.grad(o, leaves, grad_o)


def assert_gradient(name, got, by_torch, exact):
    """In the norm: the largest of a few hundred errors behind four products is chance."""
    assert got.shape == exact.shape, name
    error = (got.double() - exact).norm().item()
    theirs = max((t.double() - exact).norm().item() for t in by_torch)
    rounding = torch.finfo(by_torch[0].dtype).eps * exact.norm().item()
    assert error <= max(2 * theirs, rounding), f"{name}: {error:.2e}, torch's {theirs:.2e}"


def assert_lse(lse, tensors, exact, options):
    assert lse.dtype == torch.float32
    seen = exact > float("-inf")
    assert torch.equal(seen, lse > float("-inf"))
    plain = by_torch(tensors, None, torch.float32, options)[1]
    assert_as_good_as_torch(lse[seen], plain[seen], exact[seen])


def verify(tensors, options, config=SMALL, back=BACK, twice=True):
    """Forward and backward against float64; backward again, bit for bit; inputs as they were."""
    q = tensors[0]
    before = [t.clone() for t in tensors]
    o, lse = attend(*tensors, **options, config=config)
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)
    exact = by_torch(tensors, grad_o, torch.float64, options)
    plain = by_torch(tensors, grad_o, q.dtype, options)
    assert o.dtype == q.dtype
    assert_as_good_as_torch(o, plain[0], exact[0])
    assert_lse(lse, tensors, exact[1], options)

    vendor = by_vendor(tensors, grad_o, options)
    grads = attend_backward(grad_o, *tensors, o, lse, **options, config=back)
    for i, (name, got, want) in enumerate(zip(NAMES, grads, exact[2], strict=False)):
        if name != "sinks":
            assert got.dtype == q.dtype
        assert_gradient(name, got, [plain[2][i]] + ([vendor[1][i]] if vendor else []), want)
    if twice:
        again = attend_backward(grad_o, *tensors, o, lse, **options, config=back)
        assert all(a is b or torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def padding(B, S, seed=3):
    keep = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.4
    keep[0, : S // 2] = False  # a whole block of padding on the left
    return keep


MASKS = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "left padded": dict(keep=padding(2, 35)),
    "padded both ways": dict(keep=padding(2, 35).to(torch.int8), causal=False),
    "window": dict(window=25),
    "narrow window": dict(window=3),
    "window, padded": dict(window=30, keep=padding(2, 35)),
    "no prefix in one row": dict(no_prefix=torch.tensor([True, False])),
    "offset": dict(q_offset=4),
    "offsets on the device": dict(q_offset=torch.tensor([0, 11], dtype=torch.int32), window=20),
    "softcap": dict(softcap=2.0, scale=0.5),
    "sinks": dict(sinks=torch.tensor([1.5, -0.5])),
    "all": dict(
        window=40, keep=padding(2, 35), no_prefix=torch.tensor([False, True]), softcap=3.0,
        sinks=torch.tensor([0.5, 2.0]).bfloat16(), q_offset=torch.tensor(9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(mask, dtype):
    # which sums are taken, and in what order, is the same in every dtype
    tensors = draw(2, 2, 1, 18, 35, 19, 24, dtype)
    verify(tensors, MASKS[mask], twice=dtype == torch.float32)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_groups(H_kv, shared):
    verify(
        draw(2, 4, H_kv, 7, 20, 17, 16, shared=shared), dict(no_prefix=torch.tensor([0, 1]).bool())
    )


@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 112, 128, 192, 256])
def test_head_dims(D):
    verify(draw(1, 2, 1, 5, 9, 3, D, torch.float16), {}, back=BackwardConfig(16, 16, 16, 16))


@pytest.mark.long
@few
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    T=st.integers(1, 40),
    more=st.integers(0, 20),
    P=st.integers(0, 40),
    D=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    shared=st.booleans(),
    blocks=st.tuples(*[st.sampled_from([16, 32])] * 4),
    parts=st.integers(1, 4),
)
def test_any_shape(sizes, T, more, P, D, dtype, causal, shared, blocks, parts):
    B, H_kv, group = sizes
    tensors = draw(B, group * H_kv, H_kv, T, T + more, P, D, dtype, shared=shared)
    m, n, key_m, key_n = blocks
    back = BackwardConfig(m, n, key_m, key_n, parts, 4, 1, 4, 1)
    verify(tensors, dict(causal=causal), AttendConfig(m, n, 4, 1), back)


def test_default_configs():
    """Tiles larger than the problem; the batch in parts."""
    verify(draw(3, 2, 2, 9, 11, 5, 16), {}, config=None, back=None)


def test_a_prefix_gradient_in_fp32_is_not_rounded():
    tensors = draw(3, 2, 1, 9, 9, 6, 16, torch.bfloat16)
    o, lse = attend(*tensors, config=SMALL)
    grad_o = torch.ones_like(o)
    grads = attend_backward(grad_o, *tensors, o, lse, prefix_dtype=torch.float32, config=BACK)
    exact = by_torch(tensors, grad_o, torch.float64, {})[2]
    assert grads.prefix_value.dtype == torch.float32 and grads.k.dtype == torch.bfloat16
    # the weights are rounded to bf16 before the product, the sum is not
    error = (grads.prefix_value - exact[4]).abs().max() / exact[4].abs().max()
    assert error < 2**-9
    assert not torch.equal(grads.prefix_value, grads.prefix_value.bfloat16().float())


def test_strided_tensors_are_read_in_place():
    """q, k and v as slices of one fused projection; keys of one head expanded over two."""
    fused = torch.randn(2, 20, 3, 40, generator=torch.Generator().manual_seed(0))
    q, k, v = (fused[:, :, i : i + 1, 3:27].transpose(1, 2) for i in range(3))
    q, k, v = q.expand(2, 2, 20, 24), k.expand(2, 2, 20, 24), v.expand(2, 2, 20, 24)
    prefix = torch.randn(5, 2, 2, 30, generator=torch.Generator().manual_seed(1))
    pk, pv = (prefix[:, :, i, 2:26].transpose(0, 1) for i in range(2))
    problem = check(q, k, v, pk, pv)
    assert problem.q is q and problem.k is k and problem.prefix_value.data_ptr() == pv.data_ptr()
    verify([q, k, v, pk, pv], {})


def test_a_head_dimension_without_unit_stride_is_copied_not_misread():
    q, k, v, pk, pv = draw(1, 2, 2, 6, 9, 5, 16)
    q, pk = q.mT.contiguous().mT, pk.mT.contiguous().mT
    assert q.stride(-1) != 1
    verify([q, k, v, pk, pv], {})


def test_offsets_past_int32():
    q, _, _, pk, pv = draw(1, 1, 1, 3, 3, 2, 16, torch.float16)
    k, v = (far_rows(3, 16, seed=i)[None, None] for i in range(2))
    q = far_rows(3, 16, seed=2)[None, None]
    verify([q, k, v, pk, pv], {})


@pytest.mark.long
def test_padded_keys_may_hold_anything():
    tensors = draw(2, 2, 1, 18, 35, 19, 16)
    keep = padding(2, 35)
    options = dict(keep=keep)
    o, lse = attend(*tensors, **options, config=SMALL)
    grad_o = torch.ones_like(o)
    want = attend_backward(grad_o, *tensors, o, lse, **options, config=BACK)
    for poison in (float("nan"), float("inf")):
        q, k, v, pk, pv = tensors
        k, v = (t.masked_fill(~keep[:, None, :, None], poison) for t in (k, v))
        got = attend(q, k, v, pk, pv, **options, config=SMALL)
        assert torch.equal(got[0], o) and torch.equal(got[1], lse)
        grads = attend_backward(grad_o, q, k, v, pk, pv, o, lse, **options, config=BACK)
        assert all(torch.equal(a, b) for a, b in zip(grads[:5], want[:5], strict=True))
    assert not grads.k[0, :, :17].any() and not grads.v[0, :, :17].any()


def test_blocks_out_of_sight_are_not_loaded():
    """Blocks before the window and blocks of the future hold NaN.

    If they were loaded, the result would show it even with weight 0.
    """
    q, k, v, pk, pv = draw(1, 1, 1, 16, 96, 32, 16)
    options = dict(window=20, q_offset=48)  # rows at 48 to 63 see 29 to 63
    want = attend(q, k, v, pk, pv, **options, config=SMALL)
    assert want[0].isfinite().all()
    nan = float("nan")
    k, v, pk, pv = (t.clone() for t in (k, v, pk, pv))
    pk[:], pv[:] = nan, nan
    for t in (k, v):
        t[:, :, :16], t[:, :, 64:] = nan, nan
    got = attend(q, k, v, pk, pv, **options, config=SMALL)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    grad_o = torch.ones_like(q)
    grads = attend_backward(grad_o, q, k, v, pk, pv, *got, **options, config=BACK)
    assert grads.q.isfinite().all() and not grads.prefix_key.any()
    assert grads.k.isfinite().all() and not grads.v[:, :, :16].any()


@pytest.mark.parametrize("options", [{}, dict(sinks=torch.zeros(2)), dict(softcap=1.0)])
def test_a_row_that_sees_nothing_gives_zero(options):
    tensors = draw(2, 2, 1, 5, 20, 6, 16)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0] = False
    options = dict(options, keep=keep, no_prefix=torch.tensor([True, True]))
    o, lse = attend(*tensors, **options, config=SMALL)
    assert not o[0].any() and o[1].all()
    assert torch.equal(lse[0], torch.full((2, 5), 0.0 if "sinks" in options else float("-inf")))
    grads = attend_backward(torch.ones_like(o), *tensors, o, lse, **options, config=BACK)
    assert all(t is None or bool(t.isfinite().all()) for t in grads)
    assert not grads.q[0].any() and not grads.k[0].any() and grads.k[1].any()
    assert not grads.prefix_key.any() and not grads.prefix_value.any()


@pytest.mark.parametrize("B, T, S, P", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 0, 0)])
def test_empty(B, T, S, P):
    tensors = draw(B, 2, 1, T, S, P, 16)
    options = dict(causal=False)
    o, lse = attend(*tensors, **options)
    exact = by_torch(tensors, None, torch.float64, options)
    assert o.shape == (B, 2, T, 16) and lse.shape == (B, 2, T)
    assert_as_good_as_torch(o, by_torch(tensors, None, torch.float32, options)[0], exact[0])
    grads = attend_backward(torch.ones_like(o), *tensors, o, lse, **options)
    assert all(g.shape == t.shape for g, t in zip(grads, tensors, strict=False))
    if B == 0 or T == 0:
        assert not any(g.any() for g in grads[1:5])


GOOD = dict(
    zip(("q", "k", "v", "prefix_key", "prefix_value"), draw(2, 4, 2, 3, 5, 6, 16), strict=True)
)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(q=torch.ones(4)), ValueError, r"q has shape \(4,\); allowed: a tensor of 4 dim"),
        (dict(prefix_key=torch.ones(4, 2)), ValueError, r"prefix_key has .* of 3 or 4 dimensions"),
        (dict(q=torch.ones(2, 4, 3, 16).double()), TypeError, "q has dtype torch.float64; allowed"),
        (dict(v=torch.ones(2, 2, 5, 16).half()), TypeError, "v has dtype torch.float16; allo"),
        (dict(prefix_value=torch.ones(2, 6, 16).bfloat16()), TypeError, "prefix_value has dtype"),
        (dict(k=torch.ones(2, 2, 5, 8)), ValueError, r"k has shape \(2, 2, 5, 8\); allowed"),
        (dict(v=torch.ones(2, 2, 4, 16)), ValueError, r"v has shape \(2, 2, 4, 16\)"),
        (dict(k=torch.ones(2, 3, 5, 16), v=torch.ones(2, 3, 5, 16)), ValueError, "q has 4 heads"),
        (dict(prefix_key=torch.ones(3, 6, 16)), ValueError, r"prefix_key has shape \(3, 6, 16\)"),
        (dict(prefix_key=torch.ones(1, 2, 6, 16)), ValueError, r"allowed: \(2, 2, 6, 16\)"),
        (dict(prefix_value=torch.ones(2, 7, 16)), ValueError, r"prefix_value has shape \(2, 7, 16"),
        (dict(window=0), ValueError, "window is 0; allowed: 1 or more"),
        (dict(window=4, causal=False), ValueError, "window is 4 with causal=False; allowed"),
        (dict(softcap=-1.0), ValueError, "softcap is -1.0; allowed: more than 0"),
        (dict(sinks=torch.ones(2)), ValueError, r"sinks has shape \(2,\); allowed: \(4,\)"),
        (dict(sinks=torch.ones(4).int()), TypeError, "sinks has dtype torch.int32"),
        (dict(q_offset=-1), ValueError, "q_offset is -1; allowed: 0 or more"),
        (dict(q_offset=torch.ones(2)), TypeError, "q_offset has dtype torch.float32"),
        (dict(q_offset=torch.ones(3).int()), ValueError, r"q_offset has shape \(3,\); allowed"),
        (dict(keep=torch.ones(2, 5)), TypeError, "keep has dtype torch.float32; allowed"),
        (dict(keep=torch.ones(2, 4).bool()), ValueError, r"keep has shape \(2, 4\); allowed"),
        (dict(no_prefix=torch.ones(3).bool()), ValueError, r"no_prefix has shape \(3,\)"),
        (dict(v=torch.ones(2, 2, 5, 16, device="meta")), ValueError, "v is on meta; allowed: cpu"),
        (dict(q=torch.ones(2, 4, 6, 16)), ValueError, "q_offset is -1; .* S - T, 5 - 6 here"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_any_launch(change, error, message):
    with pytest.raises(error, match=message):
        attend(**{**GOOD, **change})


def test_a_head_too_wide_is_refused():
    with pytest.raises(ValueError, match="q has head dimension 257; allowed: 1 to 256"):
        attend(*draw(1, 1, 1, 2, 2, 2, 257))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(grad_o=torch.ones(2, 4, 3, 8)), ValueError, r"grad_o has shape \(2, 4, 3, 8\)"),
        (dict(o=torch.ones(2, 4, 3, 16).half()), TypeError, "o has dtype torch.float16; allowed"),
        (dict(lse=torch.ones(2, 4)), ValueError, r"lse has shape \(2, 4\); allowed: \(2, 4, 3\)"),
        (dict(lse=torch.ones(2, 4, 3).half()), TypeError, "lse has dtype torch.float16"),
        (dict(window=0), ValueError, "window is 0"),
    ],
)
def test_bad_arguments_of_the_backward(change, error, message):
    o = torch.ones(2, 4, 3, 16)
    given = {**GOOD, "grad_o": o, "o": o, "lse": torch.ones(2, 4, 3)}
    with pytest.raises(error, match=message):
        attend_backward(**{**given, **change})


@pytest.mark.parametrize(
    "make, field",
    [
        (AttendConfig, {"block_m": 24}), (AttendConfig, {"block_n": 8}),
        (AttendConfig, {"num_warps": 3}), (AttendConfig, {"num_stages": 0}),
        (BackwardConfig, {"key_m": 8}), (BackwardConfig, {"parts": 0}),
        (BackwardConfig, {"key_warps": 3}), (BackwardConfig, {"key_stages": 0}),
    ],
)  # fmt: skip
def test_invalid_configs_are_refused(make, field):
    with pytest.raises(ValueError, match=f"{make.__name__}.{next(iter(field))} is"):
        make(**field)
