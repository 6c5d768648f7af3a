"""Ring 2 through the public layers: adapted modules of any shape on ``PEFTKERN_BACKEND=triton``.

The reference is float64 autograd over the formula, with the masks that the kernels drew.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.kernels.common import Launch
from peftkern.ops import bits, triton_backend
from peftkern.ops import masks as mask_file
from tests.kernels.oracle import assert_as_good_as_torch, few, matrix
from tests.test_ops import assert_rounded

NAMES = ("q_proj", "k_proj", "v_proj")


class Projections(nn.Module):
    """One to three projections of one x, weights as [N, K] or Conv1D's [K, N]."""

    def __init__(self, K, Ns, conv1d, bias):
        super().__init__()
        self.names = NAMES[: len(Ns)]
        for name, n in zip(self.names, Ns, strict=True):
            layer = Conv1D(n, K) if conv1d else nn.Linear(K, n, bias=bias)
            if conv1d:
                nn.init.normal_(layer.bias)
            setattr(self, name, layer)

    def forward(self, x):
        return [getattr(self, name)(x) for name in self.names]


def adapted(K, Ns, r, *, p=0.0, conv1d=False, bias=True, dtype=torch.float32, fp32=True, seed=0):
    torch.manual_seed(seed)
    model = Projections(K, Ns, conv1d, bias).to(dtype)
    config = peftkern.LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=p, init_lora_weights=False, fan_in_fan_out=conv1d,
        target_modules=list(model.names),
    )  # fmt: skip
    return peftkern.get_peft_model(model, config, autocast_adapter_dtype=fp32)


def formula(layer, x, keep, dtype):
    """Y of one layer in ``dtype``, every operation as written."""
    base, A, B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    w = base.weight.T if isinstance(base, Conv1D) else base.weight
    y = x @ w.to(dtype).T
    if base.bias is not None:
        y = y + base.bias.to(dtype)
    scale, dropped = layer.scaling["default"], x
    if keep is not None:
        scale, dropped = scale / (1 - layer.lora_dropout["default"].p), x * keep.to(dtype)
    low = dropped @ A.to(dtype).T * scale
    return y + low @ B.to(dtype).T


@pytest.fixture
def masks(monkeypatch):
    """The words of every mask that is drawn, in order."""
    drawn, draw, to_draw = [], mask_file.words_of, mask_file.to_draw

    def noted(*args):
        words = draw(*args)
        drawn.extend(words)
        return words

    def noted_to_draw(*args):
        words, how = to_draw(*args)
        drawn.extend(words if how is not None else [])  # else they are noted already
        return words, how

    monkeypatch.setattr(mask_file, "words_of", noted)
    monkeypatch.setattr(triton_backend, "to_draw", noted_to_draw)
    return drawn


@settings(few, max_examples=24)
@given(
    rows=st.integers(1, 40),
    K=st.integers(1, 90),
    Ns=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    r=st.integers(1, 33),
    p=st.sampled_from([0.0, 0.25]),
    conv1d=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    fp32=st.booleans(),
    product=st.sampled_from(triton_backend.PRODUCTS),
)
def run_any(masks, rows, K, Ns, r, p, conv1d, bias, dtype, fp32, product):
    model = adapted(K, Ns, r, p=p, conv1d=conv1d, bias=bias, dtype=dtype, fp32=fp32)
    layers = [getattr(model.base_model.model, name) for name in NAMES[: len(Ns)]]
    x = matrix(rows, K, dtype, seed=1).reshape(1, rows, K).requires_grad_()
    masks.clear()
    before, triton_backend.product = triton_backend.product, product
    try:
        with peftkern.use_backend("triton"):
            assert all(row.fused for row in peftkern.explain(model))
            ys = model(x)
            seeds = [matrix(rows, n, dtype, seed=5 + i)[None] for i, n in enumerate(Ns)]
            weights = [w for m in layers for w in (m.lora_A, m.lora_B)]
            weights = [w["default"].weight for w in weights]
            grads = torch.autograd.grad(ys, [x, *weights], seeds)
    finally:
        triton_backend.product = before
    assert len(masks) == (len(Ns) if p > 0 else 0)  # none are asked for where nothing is dropped
    keeps = [bits.unpack_bits(w, K, torch.bool) for w in masks] or [None] * len(Ns)

    def through(dtype):
        xs = x.detach().to(dtype).requires_grad_()
        outs = [formula(m, xs, k, dtype) for m, k in zip(layers, keeps, strict=True)]
        gs = torch.autograd.grad(outs, [xs, *weights], [s.to(dtype) for s in seeds])
        return [*outs, *gs]

    # gradients of A and B leave in their own dtype: the wide ones are rounded by nobody
    exact = [t.detach().double() for t in through(torch.float64)]
    if dtype == torch.float32:  # numpy's BLAS, not the kernel, decides on the last bits
        sizes, terms = through_sizes(layers, x, keeps, seeds), 4 + rows + K + sum(Ns) + r
        for got, right, size in zip([*ys, *grads], exact, sizes, strict=True):
            assert got.dtype == dtype
            assert_rounded(got.detach(), right, size, dtype, terms)
        return
    for got, plain, right in zip([*ys, *grads], through(dtype), exact, strict=True):
        assert got.dtype == plain.dtype
        assert_as_good_as_torch(got.detach(), plain.detach(), right)


def through_sizes(layers, x, keeps, seeds):
    """The sums of the sizes of all terms of outputs and gradients."""
    layers = [copy.deepcopy(m) for m in layers]
    with torch.no_grad():
        for parameter in (p for m in layers for p in m.parameters()):
            parameter.abs_()
    xs = x.detach().double().abs().requires_grad_()
    outs = [formula(m, xs, k, torch.float64) for m, k in zip(layers, keeps, strict=True)]
    weights = [w["default"].weight for m in layers for w in (m.lora_A, m.lora_B)]
    gs = torch.autograd.grad(outs, [xs, *weights], [s.double().abs() for s in seeds])
    return [t.detach().double() for t in (*outs, *gs)]


@pytest.mark.long
def test_any_shape_mask_group_dtype_and_order(masks):
    run_any(masks)


def test_no_launch_more_for_a_mask_and_the_vendor_adds(monkeypatch):
    """Launches of ours through the layer: forward 1, with dropout too, backward 3, joined."""
    ran, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (ran.append(self.kernel.__name__), run(self)))
    monkeypatch.setattr(triton_backend, "product", "joined")
    with peftkern.use_backend("triton"):
        for p in (0.0, 0.1):
            model = adapted(64, [48, 40, 32], 8, p=p)
            x = torch.randn(300, 64, requires_grad=True)
            ran.clear()
            ys = model(x)
            assert ran == ["_shrink_expand_kernel"]  # for three projections
            ran.clear()
            sum(y.sum() for y in ys).backward()
            assert ran == ["_grad_sb_kernel"] * 3 + [
                "_sum_kernel",
                "_grad_xa_kernel",
                "_sum_kernel",
            ]


@pytest.mark.parametrize("wants", ["x", "A", "B", "xA", "xB", "AB", "xAB"])
def test_any_subset_of_gradients_and_one_input_used_twice(wants):
    with peftkern.use_backend("triton"):
        model = adapted(40, [24, 24], 5)
        layers = [getattr(model.base_model.model, n) for n in NAMES[:2]]
        for m in layers:
            m.lora_A["default"].weight.requires_grad_("A" in wants)
            m.lora_B["default"].weight.requires_grad_("B" in wants)
        x = matrix(21, 40, torch.float32, seed=1).requires_grad_("x" in wants)
        kept = x.detach().clone()
        q, k = model(x)
        again = layers[0](x)  # the same X and the same projection a second time
        tensors = [x] if "x" in wants else []
        tensors += [m.lora_A["default"].weight for m in layers] if "A" in wants else []
        tensors += [m.lora_B["default"].weight for m in layers] if "B" in wants else []
        loss = (q * k).sum() + again.square().sum()
        first = torch.autograd.grad(loss, tensors, retain_graph=True)
        second = torch.autograd.grad(loss, tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(x.detach(), kept)
    found = [dict(enumerate(first))]
    for dtype in (torch.float32, torch.float64):
        outs = [formula(m, x.to(dtype), None, dtype) for m in layers]
        loss = (outs[0] * outs[1]).sum() + outs[0].square().sum()
        grads = torch.autograd.grad(loss, tensors)
        found.append({i: g.to(dtype) for i, g in enumerate(grads)})
    assert_as_good_as_torch(*found)


def test_autocast_runs_the_kernels_in_its_dtype():
    with peftkern.use_backend("triton"):
        model = adapted(40, [24], 5)
        x = matrix(21, 40, torch.float32, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            (y,) = model(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        layer = model.base_model.model.q_proj
        assert layer.lora_A["default"].weight.grad.dtype == torch.float32
        exact = formula(layer, x.double(), None, torch.float64)
        plain = formula(layer, x.bfloat16(), None, torch.bfloat16)
        assert_as_good_as_torch(y.detach(), plain.detach(), exact.detach())


def test_no_rows_and_strided_rows():
    with peftkern.use_backend("triton"):
        model = adapted(40, [24, 8], 5, p=0.25)
        q, k = model(torch.empty(0, 40, requires_grad=True))
        assert q.shape == (0, 24) and k.shape == (0, 8)
        (q.sum() + k.sum()).backward()
        model.eval()
        wide = matrix(9, 120, torch.float32, seed=1)
        for x in (wide[:, 10:50], wide[:, ::3], wide.T[:40].T):
            (y, _) = model(x)
            layer = model.base_model.model.q_proj
            plain, exact = (
                formula(layer, x.to(d), None, d).detach() for d in (torch.float32, torch.float64)
            )
            assert_as_good_as_torch(y.detach(), plain, exact, average=True)


@pytest.mark.parametrize(
    "x, error, said",
    [
        (torch.ones(3, 41), ValueError, r"has shape \(\d+, 40\); allowed: \(\d+, 41\)"),
        (torch.ones(3, 40, device="meta"), ValueError, "meta"),
        (torch.ones(3, 40, dtype=torch.int64), (RuntimeError, TypeError), "dtype|same type|Long"),
        (torch.ones(3, 40, dtype=torch.float64), (RuntimeError, TypeError), "dtype|Double"),
    ],
    ids=["columns", "device", "integers", "float64"],
)
def test_a_wrong_input_is_one_error_before_any_launch(x, error, said, monkeypatch):
    model = adapted(40, [24], 5)
    launched = []
    monkeypatch.setattr(Launch, "run", lambda self: launched.append(self))
    with peftkern.use_backend("triton"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(error, match=said):
                model(x)
    assert not launched
