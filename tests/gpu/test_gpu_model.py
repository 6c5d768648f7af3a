"""A tiny Llama on the device: both backends train alike, checkpointing redraws the same mask."""

import pytest
import torch

from peftkern.ops import masks as mask_file
from tests.closeness import assert_as_good_as_torch
from tests.gpu.ground import DEVICE, ON_CPU, backend, triton_backend
from tests.masks import with_masks
from tests.models import build
from tests.training import adapted, train


def tiny_llama(dtype):
    small = {"width": 64, "inner": 96, "layers": 1}
    sizes = small if ON_CPU else {"width": 256, "inner": 512, "layers": 2}
    model = build("llama", implementation="sdpa", heads=4, kv=2, vocab=60, std=0.02, **sizes)
    return model.to(DEVICE, dtype).train()


@pytest.mark.parametrize("product", triton_backend.PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_backends_train_alike(dtype, product, monkeypatch):
    monkeypatch.setattr(triton_backend, "product", product)
    base = tiny_llama(dtype)
    torch.manual_seed(2)
    ids = torch.randint(0, 60, (2, 9 if ON_CPU else 65), device=DEVICE)
    found = []
    for choice, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        model = adapted(base, r=5)
        model = model.double() if kind == torch.float64 else model
        with backend.use_backend(choice):
            losses = train(model, ids, 5)
            with torch.no_grad():
                logits = model.eval()(ids[:1, :1]).logits
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        found.append({"losses": losses.to(logits.dtype), "logits": logits, **weights})
        found[-1] = {name: t.cpu() for name, t in found[-1].items()}
    assert found[2]["losses"][0] - found[2]["losses"][-1] > 1e-3  # it did learn
    assert_as_good_as_torch(*found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_elements_again(reentrant, monkeypatch):
    ids = torch.randint(0, 60, (2, 9), device=DEVICE)
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

    def gradients(model):
        torch.manual_seed(3)
        drawn.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        return grads

    with backend.use_backend("triton"):
        model = adapted(tiny_llama(torch.float32), r=3, lora_dropout=0.3)
        plain, words = gradients(model), drawn[:]
        by_torch = [gradients(with_masks(model, words, d)) for d in (torch.float32, torch.float64)]
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients(model)
    for ours in (plain, again):
        assert_as_good_as_torch(ours, *by_torch)
