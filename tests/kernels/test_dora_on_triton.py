"""DoRA's operation on ``PEFTKERN_BACKEND=triton``, by kernels that are seen to run."""

import copy

import pytest
import torch
from torch import nn

import peftkern
from peftkern.kernels.common import Launch
from peftkern.ops import dora_torch, triton_backend
from peftkern.ops.dora import dora_linear, plain
from peftkern.ops.projection import Projection
from tests.kernels.oracle import assert_as_good_as_torch, matrix

M, K, N, R = 21, 40, 33, 5


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels, as they are launched."""
    names = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.__name__), run(self)))
    return names


def case(dtype, adapter, transposed, bias):
    x, dy = matrix(M, K, dtype, seed=0, offset=1), matrix(M, N, dtype, seed=1)
    w = matrix(*((K, N) if transposed else (N, K)), dtype, seed=2)
    c = matrix(1, N, dtype, seed=3)[0] if bias else None
    A, B = matrix(R, K, adapter, seed=4), matrix(N, R, adapter, seed=5)
    m = 3 + matrix(1, N, torch.float32, seed=6)[0]
    return [x, w, c, A, B, m], dy


def results(inputs, dy, op):
    leaves = [None if t is None else t.detach().clone() for t in inputs]
    wanted = [leaves[i] for i in (0, 3, 4, 5)]
    for t in wanted:
        t.requires_grad_()
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


@pytest.mark.parametrize("product", triton_backend.PRODUCTS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "float32")], ids=str)
@pytest.mark.parametrize("transposed, bias", [(False, True), (True, False)])
def test_numbers_and_gradients(monkeypatch, launched, product, dtypes, transposed, bias):
    monkeypatch.setattr(triton_backend, "product", product)
    dtype, adapter = (getattr(torch, d) for d in dtypes)
    inputs, dy = case(dtype, adapter, transposed, bias)

    def op(*args):
        return dora_linear(*args, 0.3, 0.0, transposed)

    def formula(x, w, c, A, B, m):
        with torch.no_grad():
            rows = (w.t() if transposed else w) + 0.3 * (B @ A).to(w.dtype)
            norms = torch.linalg.vector_norm(rows, dim=1)
        member = Projection(w, c, A, B, 0.3, 0.0, transposed)
        return plain(x, member, m.to(w.dtype), norms, None)

    wide = [None if t is None else t.double() for t in inputs]
    exact = results(wide, dy, formula)
    # HF PEFT's adapters in the activations' dtype: what matrix units multiply
    narrow = [None if t is None else t.to(dtype) for t in inputs]
    theirs = results(narrow, dy, formula)
    with peftkern.use_backend("triton"):
        found = results(inputs, dy, op)
        again = results(inputs, dy, op)
        with torch.no_grad():
            alone = op(*inputs)
    for mine, other, want in zip(found, theirs, exact, strict=True):
        assert_as_good_as_torch(mine, other.to(mine.dtype), want)
    assert_as_good_as_torch(alone, theirs[0], exact[0])
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "two runs differ"
    assert {"_norm_kernel", "_scale_grad_kernel"} <= set(launched)
    assert ("_gemm_kernel" in launched) == (product == "fused")


def test_the_gain_leaves_with_the_fused_product(monkeypatch):
    """No pass over Y beside it."""
    monkeypatch.setattr(triton_backend, "product", "fused")
    inputs, dy = case(torch.float32, torch.float32, False, True)

    def refuse(*args):
        raise AssertionError("a pass over Y")

    monkeypatch.setattr(dora_torch, "scale_columns", refuse)
    with peftkern.use_backend("triton"):
        results(inputs, dy, lambda *args: dora_linear(*args, 0.3))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_layer_says_what_runs_it(launched, p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N))
    config = peftkern.LoraConfig(
        r=R, use_dora=True, init_lora_weights=False, lora_dropout=p, target_modules=["0"]
    )
    model = peftkern.get_peft_model(model, config)
    x, found = matrix(M, K, torch.float32, seed=0), []
    exact = copy.deepcopy(model).double()
    for choice, one in (("triton", model), ("torch", model), ("torch", exact)):
        with peftkern.use_backend(choice):
            torch.manual_seed(1)
            one.zero_grad()
            y = one(x.double() if one is exact else x)
            y.square().sum().backward()
            found.append({"y": y.detach()})
            found[-1] |= {n: q.grad for n, q in one.named_parameters() if q.requires_grad}
            [said] = peftkern.explain(one)
            assert said.backend == f"{choice} fused"
            if choice == "triton":
                row = said
    assert "_norm_kernel" in launched and ("_scale_grad_kernel" in launched) == (p == 0.0)
    assert row.reason == (
        "DoRA: one operation; with dropout, its products are torch's"
        if p
        else "DoRA: one operation"
    )
    assert_as_good_as_torch(*found)
