"""Forward-mode AD through layers and operations that are fused outside of it: HF PEFT's tangents.

``torch.autograd.forward_ad`` and ``torch.func.jvp`` see torch's own operations alone.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import peftkern
from peftkern.ops import notes
from peftkern.ops.lora_mixed import lora_mixed
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.tuners.lora import linear, mlp, row_adapters
from peftkern.tuners.lora.row_adapters import IN_TRANSFORM
from tests import prefix_cases
from tests.closeness import assert_same_number
from tests.mlps import adapted
from tests.tiny import fill
from tests.variants import CASES, two_layers

T = torch.float64


@pytest.fixture(autouse=True)
def no_fused_operation(monkeypatch):
    """An operation is an error; without gradients some have tangents all the same, on torch."""

    def refuse(*args):
        raise AssertionError("fused within forward-mode AD")

    with monkeypatch.context() as patch:
        for module, name in (
            (linear, "fused_linear"), (mlp, "lora_mlp"), (row_adapters, "lora_mixed"),
        ):  # fmt: skip
            patch.setattr(module, name, refuse)
        yield patch


def draw(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=T)


def dual_level(call, x, dx):
    """[output, its tangent] by the context manager."""
    with forward_ad.dual_level():
        return list(forward_ad.unpack_dual(call(forward_ad.make_dual(x, dx))))


def jvp(call, x, dx):
    return list(torch.func.jvp(call, (x,), (dx,)))


WAYS = pytest.mark.parametrize("way", [dual_level, jvp])


def same_tangents(ours, theirs, x, way, seed=None, **given):
    """The outputs of both models and their tangents, along x and along their adapters' weights."""

    def both(model, call_with):
        if seed is not None:
            torch.manual_seed(seed)
        return way(*call_with(model))

    def along_x(model):
        return lambda z: model(z, **given), x, draw(*x.shape, seed=4)

    found, expected = both(ours, along_x), both(theirs, along_x)
    assert_same_number(found, expected)
    assert torch.count_nonzero(found[1])
    names = [n for n, p in theirs.named_parameters() if p.requires_grad]
    for name in names[:2] + names[-2:]:

        def along_weight(model, name=name):
            weight = model.get_parameter(name).detach()

            def call(w):
                return torch.func.functional_call(model, {name: w}, (x,), given)

            return call, weight, draw(*weight.shape, seed=5)

        assert_same_number(both(ours, along_weight), both(theirs, along_weight), name)


@WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("conv1d", [False, True])
def test_linears(training, conv1d, way):
    def config(library):
        targets = ["0"] if conv1d else ["0", "2"]
        return library.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=conv1d)

    models = two_layers(config, T, conv1d)
    for model in models:
        fill(model.train(training))
    same_tangents(*models, draw(5, 16), way)
    with torch.no_grad():
        same_tangents(*models, draw(5, 16), way)


@pytest.mark.parametrize("name", ["dora", "kasa", "bdlora", "velora_random", "monteclora"])
@WAYS
def test_variants(name, way):
    case = CASES[name]

    def config(library):
        blocks = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}
        own = {case.setting: library.BdLoraConfig(**blocks)} if name == "bdlora" else {}
        found = case.config(library, target_modules=["0", "2"], **own)
        found.task_type = None
        return found

    models = two_layers(config, T)
    for model in models:
        fill(model.eval() if name == "velora_random" else model)
    same_tangents(*models, draw(5, 16), way, seed=7)


@WAYS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_groups_and_mlps(dropout, way):
    ours, theirs = adapted(dropout=dropout)
    for model in (ours, theirs):
        model.config._attn_implementation = "eager"
    batch = {"attention_mask": torch.ones(2, 6, dtype=torch.long), "use_cache": False}

    class Call(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(inputs_embeds=x, **batch).logits

    x = draw(2, 6, ours.config.hidden_size)
    if way is dual_level:
        same_tangents(Call(ours), Call(theirs), x, way, seed=8)
    elif not dropout:  # torch.func wants to be told about random numbers
        same_tangents(Call(ours), Call(theirs), x, way)


@WAYS
def test_mixed_batches(way):
    def config(library, r=4):
        return library.LoraConfig(r=r, target_modules=["0", "2"])

    models = two_layers(config, T)
    for model, library in zip(models, ("peftkern", "peft"), strict=True):
        model.add_adapter("other", config(__import__(library), 2))
        fill(model.eval())
    names = ["other", "__base__", "default", "other"]
    same_tangents(*models, draw(4, 3, 16), way, adapter_names=names)


def test_hf_layers_that_were_fused(no_fused_operation):
    def config(library):
        return library.LoraConfig(r=3, target_modules=["0", "2"])

    _, theirs = two_layers(config, T)
    fill(theirs)
    x, dx = draw(5, 16), draw(5, 16, seed=4)
    expected = dual_level(theirs, x, dx)
    assert_same_number(dual_level(peftkern.fuse(theirs), x, dx), expected)


@WAYS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 5, 3, 8), (2, 4, 4, 1, 6, 3, 8)])
def test_prefix_attention(sizes, training, way):
    tensors = prefix_cases.inputs(*sizes)
    options = {"causal": True, "window": 6}
    for i in range(5):

        def along(call, i=i):
            given = [t if training else t.detach() for t in tensors]
            moved = given[i].detach()
            dt = draw(*moved.shape, seed=i)
            return way(lambda t: call([*given[:i], t, *given[i + 1 :]]), moved, dt)

        found = along(lambda ts: prefix_attention(*ts, scale=prefix_cases.SCALE, **options))
        expected = along(lambda ts: prefix_cases.truth(ts, options))
        assert_same_number(found, expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("trained", [True, False])
def test_the_operation_for_a_linear(p, trained):
    x, w, a, b = draw(4, 6), draw(5, 6, seed=1), draw(2, 6, seed=2), draw(5, 2, seed=4)
    a.requires_grad_(trained)

    def formula(z):
        return z @ w.t() + nn.functional.dropout(z, p) @ a.t() @ b.t() * 2.0

    dx, found = draw(4, 6, seed=9), []
    for call in (lambda z: peftkern.lora_linear(z, w, None, a, b, 2.0, p), formula):
        torch.manual_seed(6)
        found.append(dual_level(call, x, dx))
    assert_same_number(*found)


def test_mixed_products_have_tangents():
    """The operation itself, on torch's products, without gradients and with them."""
    x, w, a, b = draw(3, 2, 6), draw(5, 6, seed=1), draw(2, 6, seed=2), draw(5, 2, seed=4)
    index = row_adapters.SampleIndex([0, -1, 0], 1)
    for trained in (True, False):
        a.requires_grad_(trained)
        found = dual_level(lambda z: lora_mixed(z, w, None, [(a, b, 2.0)], index), x, x)
        assert_same_number(found[1], found[0])  # linear without a bias: its own tangent along x


def test_the_reason_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(notes, "_said", set())
    model, _ = adapted()
    model.config._attn_implementation = "eager"
    x = draw(2, 6, model.config.hidden_size)

    def call(z):
        return model(inputs_embeds=z).logits

    with caplog.at_level(logging.INFO, "peftkern"):
        dual_level(call, x, x)
        said = [r.getMessage() for r in caplog.records]
        assert any("MLP" in line and IN_TRANSFORM in line for line in said)
        layers = [m for m in model.modules() if isinstance(m, linear.Linear)]
        assert sum(line == f"a Linear layer is not fused: {IN_TRANSFORM}" for line in said) == len(
            layers
        )
        caplog.clear()
        dual_level(call, x, x)
        assert not caplog.records


def test_outside_of_a_level_all_is_fused_again():
    model, _ = adapted()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = draw(3, layer.in_features)
    with forward_ad.dual_level():
        assert layer.fused_call(x) is None and layer.product_call(x, "default") is None
    assert layer.fused_call(x) is not None and layer.product_call(x, "default") is not None
