"""Ring 2 through models on ``PEFTKERN_BACKEND=triton`` in Triton's interpreter."""

import pytest
import torch

import peftkern
from peftkern.ops import backend, bits, notes, torch_backend, triton_backend
from peftkern.ops.dora import dora_linear
from peftkern.ops.lora import lora_linear
from peftkern.ops.projection import Projection, ProjectionGrad
from tests.closeness import assert_as_good_as_torch
from tests.training import adapted, tiny_llama, train


@pytest.fixture(params=triton_backend.PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setattr(triton_backend, "product", request.param)


@pytest.mark.long
def test_a_tiny_llama_trains_as_on_the_torch_backend(product):
    base, ids = tiny_llama(), torch.randint(0, 50, (2, 9))
    found = []
    for choice, dtype in (
        ("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)
    ):  # fmt: skip
        model = adapted(base, r=5).to(dtype)
        with peftkern.use_backend(choice):
            assert peftkern.explain(model)[0].backend == f"{choice} fused"
            losses = train(model, ids, 5)
            with torch.no_grad():
                one = model.eval()(ids[:1, :1]).logits  # the decode kernel
                many = model(ids).logits
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        found.append({"losses": losses.to(dtype), "one": one, "many": many, **weights})
    assert found[2]["losses"][0] - found[2]["losses"][-1] > 1e-3  # it did learn
    assert_as_good_as_torch(*found)


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_elements_again(reentrant):
    ids = torch.randint(0, 50, (2, 9))
    with peftkern.use_backend("triton"):
        model = adapted(tiny_llama(), r=3, lora_dropout=0.3)
        grads = []
        for checkpoint in (False, True):
            if checkpoint:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(3)
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            model.zero_grad()
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_operation_beside_the_torch_backend(product, dtype, p):
    """The same mask given to both backends gives the same products."""
    torch.manual_seed(0)
    M, K, N, r = 21, 70, 33, 6
    x, w = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype) / K**0.5
    bias, A, B = torch.randn(N).to(dtype), torch.randn(r, K) / K**0.5, torch.randn(N, r)
    [(y, s, words)] = triton_backend.forward(x, [Projection(w, bias, A, B, 0.5, p, True)])
    dy = torch.randn(M, N).to(dtype)
    wanted = ProjectionGrad(dy, w, A, B, s, words, 0.5, p, True, True)
    dx, [(da, db)] = triton_backend.backward(x, [wanted], True)
    assert da.dtype == db.dtype == torch.float32
    mask = bits.unpack_bits(words, K, torch.float64) if words is not None else torch.ones(1)

    def formula(dtype):
        xd, wd, bd, ad, Bd, dyd, keep = (t.to(dtype) for t in (x, w, bias, A, B, dy, mask))
        s = (xd * keep) @ ad.T * (0.5 / (1 - p))
        ds = dyd @ Bd * (0.5 / (1 - p))
        return {
            "y": xd @ wd + bd + s @ Bd.T,
            "dx": dyd @ wd.T + ds @ ad * keep,
            "da": ds.T @ (xd * keep),
            "db": dyd.T @ s,
        }

    ours = {"y": y, "dx": dx, "da": da, "db": db}
    assert_as_good_as_torch(ours, formula(dtype), formula(torch.float64))
    if p:
        assert 0.6 < mask.mean() < 0.9


def test_what_the_kernels_do_not_take_goes_to_torch(caplog):
    x = torch.randn(4, 8, dtype=torch.float64)
    w, A, B = x.new_ones(8, 3), x.new_ones(2, 8), x.new_ones(3, 2)
    caplog.set_level("INFO", logger="peftkern")
    notes._said.clear()
    for _ in range(2):
        y = triton_backend.infer(x, w, None, A, B, 1.0, True)
    assert torch.equal(y, torch_backend.infer(x, w, None, A, B, 1.0, True))
    assert caplog.text.count("float64") == 1
    assert triton_backend.why_not(x.float(), A.float()) is None
    assert "rank" in triton_backend.why_not(x.float(), torch.ones(300, 8))


def test_the_choice_is_made_in_one_place(monkeypatch):
    monkeypatch.setattr(backend, "active", None)
    monkeypatch.setenv("PEFTKERN_BACKEND", "triton")
    assert backend.select() is triton_backend and backend.describe()[0] == "triton"
    monkeypatch.setenv("PEFTKERN_BACKEND", "cublas")
    with pytest.raises(ValueError, match="PEFTKERN_BACKEND='cublas'.*auto, torch, triton"):
        backend.select()


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_a_batch_of_outputs_run_on_torch(dora):
    """They come in tensors without memory, which no kernel can read."""

    def grads(choice, dtype, batched):
        g = torch.Generator().manual_seed(0)
        shapes = (3, 16), (8, 16), (2, 16), (8, 2), (8,)
        x, w, A, B, m = (torch.randn(*s, generator=g).to(dtype) for s in shapes)
        leaves = [t.requires_grad_() for t in ((x, A, B, m) if dora else (x, A, B))]
        dys = torch.eye(24, dtype=dtype).view(24, 3, 8)
        with peftkern.use_backend(choice):
            y = (
                dora_linear(x, w, None, A, B, m, 0.7)
                if dora
                else lora_linear(x, w, None, A, B, 0.7)
            )
            if batched:
                found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True)
            else:
                each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
                found = [torch.stack(of_leaf) for of_leaf in zip(*each, strict=True)]
        return dict(enumerate(found))

    assert_as_good_as_torch(
        grads("triton", torch.float32, True),
        grads("torch", torch.float32, False),
        grads("torch", torch.float64, False),
    )
