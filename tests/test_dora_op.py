"""DoRA's operation and its norms: values against float64, derivatives, and kept tensors."""

from __future__ import annotations

from functools import partial

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from peftkern.ops import dora_norm
from peftkern.ops.dora import dora_linear, plain
from peftkern.ops.dora_norm import gain, row_norms
from peftkern.ops.projection import Projection
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_ops import case, dtypes, ranks, relaxed, sizes


def exact_norms(w, A, B, scale, transposed=False):
    w = (w.t() if transposed else w).double()
    return torch.linalg.vector_norm(w + scale * (B.double() @ A.double()), dim=1)


@relaxed
@given(sizes, sizes, ranks, dtypes, st.booleans(), st.integers(1, 300))
def test_norms(K, N, r, dtype, transposed, block):
    """In blocks of any size, within what roundings of the sums of w + s B A can amount to."""
    _, w, _, A, B = case(1, K, N, r, 0, *dtype, transposed=transposed)
    before = dora_norm._BLOCK_CPU
    dora_norm._BLOCK_CPU = block
    try:
        found = row_norms(w, A, B, 0.7, transposed)
    finally:
        dora_norm._BLOCK_CPU = before
    exact = exact_norms(w, A, B, 0.7, transposed)
    assert found.dtype == (torch.float64 if w.dtype == torch.float64 else torch.float32)
    # a sum of n products has an error of at most n roundings of the sum of their sizes (Higham)
    eps = torch.finfo(found.dtype).eps
    sizes_of = exact_norms(w.abs(), A.abs(), B.abs(), 0.7, transposed)
    bound = eps * ((r + 3) * sizes_of + (K + 2) * exact)
    assert ((found.double() - exact).abs() <= bound).all()


def test_a_row_of_zeros_has_a_gradient():
    magnitude = torch.ones(3, requires_grad=True)
    found = gain(magnitude, torch.tensor([2.0, 0.0, 4.0]))
    assert found.tolist() == [0.5, 0.0, 0.25]
    assert torch.autograd.grad(found.sum(), magnitude)[0].tolist() == [0.5, 0.0, 0.25]


def test_norms_of_rows_that_the_update_takes_back():
    """‖w‖² + 2 s ⟨w Aᵀ, b⟩ + s² b A Aᵀ bᵀ has no correct digit here."""
    _, noise, _, A, B = case(1, 65, 400, 8, 1, torch.float32)
    w = (-(B.double() @ A.double()) + 1e-4 * noise.double()).float()
    exact = exact_norms(w, A, B, 1.0)
    theirs = peft.tuners.lora.dora.DoraLinearLayer(False).get_weight_norm(w, B @ A, 1.0)
    mine = row_norms(w, A, B, 1.0)
    assert_as_good_as_torch(mine, theirs, exact, average=True)
    squares = w.square().sum(1) + 2 * ((w @ A.t()) * B).sum(1) + ((B @ (A @ A.t())) * B).sum(1)
    assert (squares.clamp_min(0).sqrt() - exact).abs().max() > 100 * (mine - exact).abs().max()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_derivatives_of_both_orders(p, transposed, bias):
    x, w, b, A, B = case((2, 3), 5, 4, 2, 3, bias=bias, transposed=transposed)
    m = torch.rand(4, dtype=torch.float64) + 0.5
    given_ = [t.requires_grad_() for t in (x, w, b, A, B, m) if t is not None]
    norms = row_norms(w, A, B, 0.7, transposed).detach()

    def op(*args):
        torch.manual_seed(1)  # the same mask every time
        x, w, *rest = args
        b = rest.pop(0) if bias else None
        return dora_linear(x, w, b, *rest, 0.7, p, transposed, norms)

    assert torch.autograd.gradcheck(op, given_)
    assert torch.autograd.gradgradcheck(op, given_)
    torch.manual_seed(1)
    mask = (nn.functional.dropout(torch.ones_like(x), p) != 0).double() if p else None
    want = plain(x, Projection(w, b, A, B, 0.7, p, transposed), m, norms, mask)
    assert_same_number(op(*given_), want)
    with torch.no_grad():
        assert_same_number(op(*given_), want)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_a_batch_of_outputs(p, bias):
    x, w, b, A, B = case((2, 3), 5, 4, 2, 3, bias=bias)
    m = torch.linspace(0.2, 0.9, 4).double()
    leaves = [t.requires_grad_() for t in (x, A, B, m)]
    y = dora_linear(x, w, b, A, B, m, 0.7, p)
    dys = torch.eye(y.numel(), dtype=y.dtype).view(y.numel(), *y.shape)
    at_once = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for i, grads in enumerate(zip(*each, strict=True)):
        assert_same_number(at_once[i], torch.stack(grads))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kept", ["mm", "addmm"])
@pytest.mark.parametrize("frozen", [(), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_selective_checkpoints_may_keep_products(p, kept, frozen, dtype):
    low = torch.promote_types(dtype, torch.float32)
    x, w, b, A, B = case((2, 3), 5, 4, 2, 3, dtype, low, bias=kept == "addmm")
    m = torch.linspace(0.2, 0.9, 4, dtype=low)
    given_ = (x, w, b, A, B, m)
    leaves = [given_[i].requires_grad_() for i in (0, 3, 4, 5) if i not in frozen]
    ops = [getattr(torch.ops.aten, kept).default]
    norms = row_norms(w, A, B, 0.7).detach()

    def step(x):
        return dora_linear(x, w, b, A, B, m, 0.7, p, False, norms)

    contexts = partial(create_selective_checkpoint_contexts, ops)
    selective = partial(checkpoint, step, use_reentrant=False, context_fn=contexts)
    found = []
    for way in (step, selective):
        torch.manual_seed(1)
        y = way(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    if dtype == torch.float64:
        assert_same_number(*found)
    else:  # the operations are the same
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "m"])
def test_only_what_is_wanted(frozen):
    """Frozen inputs get no gradient, the others' stay the same."""
    found = []
    for skip in ("", frozen):
        x, w, b, A, B = case(7, 5, 4, 2, 3)
        tensors = dict(x=x, A=A, B=B, m=torch.linspace(0.2, 0.9, 4).double())
        for name, t in tensors.items():
            t.requires_grad_(name != skip)
        y = dora_linear(x, w, b, A, B, tensors["m"], 0.7)
        y.square().sum().backward()
        found.append({n: t.grad for n, t in tensors.items()})
    assert found[1].pop(frozen) is None
    for name, grad in found[1].items():
        assert_same_number(grad, found[0][name], name)


def kept(call):
    """Bytes that a forward keeps for its backward, each storage once."""
    held = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.__setitem__(t.untyped_storage().data_ptr(), t) or t, lambda t: t
    ):
        y = call()
    return sum(t.untyped_storage().nbytes() for t in held.values()), y


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_kept(p):
    M, K, N, r = 64, 96, 128, 4
    x, w, b, A, B = case(M, K, N, r, 0, torch.float32)
    for t in (A, B):
        t.requires_grad_()
    m = torch.rand(N).requires_grad_()
    mine, _ = kept(lambda: dora_linear(x, w, b, A, B, m, 2.0, p))
    weights = 4 * (N * K + K * r + r * N + 3 * N)
    mask = 4 * M * (K // 32) if p else 0
    assert mine <= weights + 4 * (M * K + M * N + M * r) + mask
    base = nn.Linear(K, N)
    base.weight.data, base.bias.data = w, b
    config = peft.LoraConfig(r=r, use_dora=True, lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    theirs, _ = kept(lambda: layer.train()(x))
    assert mine - weights < 0.8 * (theirs - weights)


def test_autocast():
    """float32 inputs and weights, products in bf16; norms of the weights as they are."""
    x, w, b, A, B = case(9, 33, 20, 4, 0, torch.float32)
    m = torch.rand(20)
    with torch.autocast("cpu", torch.bfloat16):
        y = dora_linear(x, w, b, A, B, m, 0.5)
    norms = row_norms(w, A, B, 0.5)
    narrow = [t.bfloat16() for t in (x, w, b, A, B)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, dora_linear(*narrow, m, 0.5, norms=norms))
