"""Tests only for VeLoRA, against HF PEFT: the vector, kept tensors, other layers."""

from __future__ import annotations

import copy

import pytest
import torch

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import fill
from tests.variants import two_layers

KINDS = ["batch_average", "batch_average_once", "random"]


def config(library, kind="batch_average", groups=5, **settings):
    own = library.VeloraConfig(num_groups=groups, scale=0.7, init_type=kind)
    return library.LoraConfig(velora_config=own, **settings)


def models(kind, dropout=0.0, dtype=torch.float64, conv1d=False, **settings):
    """(ours, theirs): 16 inputs, which 5 groups do not divide."""
    settings.update(target_modules=["0", "2"], lora_dropout=dropout, r=4)
    found = two_layers(lambda library: config(library, kind, **settings), dtype, conv1d)
    fill(found[0]), fill(found[1])
    return found


def embeds(model):
    return [
        layer.lora_velora_embed["default"] for layer in (model.base_model.model[i] for i in (0, 2))
    ]


def step(model, x, seed=3):
    """Output, and the gradients of x and of all that trains."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_as_good(dtype, found):
    """(ours, HF PEFT's and, unless ``dtype`` is float64, the exact) numbers."""
    if dtype == torch.float64:
        assert_same_number(*found[:2])
    else:
        assert_as_good_as_torch(*(dict(enumerate(f)) for f in found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation(kind, dtype):
    pair = models(kind, dropout=0.3, dtype=dtype)
    three = *((m, dtype) for m in pair), (copy.deepcopy(pair[1]).double(), torch.float64)
    names = ["lora_velora_embed", "lora_velora_initialized", "lora_velora_num_groups"]
    assert set(names) < set(pair[0].base_model.model[0].other_param_names)
    before = embeds(pair[0])
    for seed in (3, 4):
        x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) + 1
        assert_as_good(dtype, [step(m.train(), x.to(t), seed) for m, t in three])
        assert_as_good(dtype, [embeds(m) for m, _ in three])
        adapter = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(e.dtype == adapter for m in pair for e in embeds(m))
        if seed == 3:
            after = embeds(pair[0])
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(moved) if kind != "random" else not any(moved)
    again = [not torch.equal(a, b) for a, b in zip(after, embeds(pair[0]), strict=True)]
    assert any(again) == (kind == "batch_average")
    # no training: plain LoRA, whose operation runs, and the vector stays
    after = embeds(pair[0])
    assert_as_good(dtype, [step(m.eval(), x.to(t)) for m, t in three])
    assert all(map(torch.equal, after, embeds(pair[0])))
    assert all(row.fused for row in peftkern.explain(pair[0]))
    pair[0].train()
    assert not any(row.fused for row in peftkern.explain(pair[0]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but")  # of the second layer
def test_conv1d_and_autocast():
    for conv1d in (False, True):
        settings = {"conv1d": conv1d, "fan_in_fan_out": conv1d}
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        pair = models("batch_average", **settings)
        assert_same_number(*(step(m.train(), x.double()) for m in pair))
        pair = models("batch_average", dtype=torch.float32, **settings)
        exact = step(copy.deepcopy(pair[1]).double().train(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = [step(m.train(), x) for m in pair]
        assert_as_good(torch.bfloat16, [*found, exact])


def test_the_backward_keeps_less():
    x = torch.randn(64, 16, dtype=torch.float64)
    kept = []
    for groups in (2, 16):
        model, _ = models("random", groups=groups)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            model.train()(x)
        kept.append(sum(saved))
    # 14 more numbers for each of 64 rows in two layers, less 8 - 1 and 6 - 1 of the vectors
    assert kept[1] - kept[0] == 64 * 14 * 2 - 12
