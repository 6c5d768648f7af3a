"""Layers of bitsandbytes in 8 bit (LLM.int8): the owner's numbers in training and in eval mode."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import as_weight, read
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import adapted, assert_steps_are_equal, bnb8, dense, llama

bitsandbytes: Any = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """The owner logs in every eval forward that it casts x to float16."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def weight_of(layer: Any) -> Any:
    found = read(layer)
    assert not isinstance(found, str), found
    return found.packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("rows", [7, 1])
def test_products_are_the_owners(rows: int, threshold: float, dtype: torch.dtype) -> None:
    layer = bnb8(nn.Linear(64, 48, bias=False), threshold)
    x = torch.randn(rows, 64)
    x[-1, 5] = 9.0  # an outlier, so that its column stays a number
    x = x.to(dtype)
    exact: Tensor = layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127

    def same(ours: Tensor, theirs: Tensor, numbers: Tensor | None = None) -> None:
        """Products of float32 with W as numbers scale what is smaller than W."""
        if numbers is None or dtype != torch.float32:
            assert torch.equal(ours, theirs)
        else:
            assert_as_good_as_torch(ours, theirs, numbers, average=True)

    for called in (False, True):  # its first forward moves the statistics
        for training in (True, False):
            layer.train(training)
            packed = weight_of(layer)
            ours, numbers = as_weight(packed, x).t().product(x), x.double() @ exact.T
            if called:
                same(ours, layer(x), numbers if training else None)
            same(ours, copy.deepcopy(layer)(x), numbers if training else None)
    assert torch.equal(x[-1, 5], torch.tensor(9.0, dtype=dtype))
    for one in (x[:1] / 9, torch.zeros(1, 64, dtype=dtype)):  # no outlier, or nothing at all
        assert torch.equal(as_weight(packed, one).t().product(one), layer(one))
    given = x.clone().requires_grad_()
    dy = torch.randn(rows, 48).to(dtype)
    layer(given).backward(dy)
    same(as_weight(packed, x).product(dy), given.grad, dy.double() @ exact)
    torch.testing.assert_close(packed.dense(torch.float32).double(), exact)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_a_training_step_equals_hf_pefts(settings: dict[str, Any]) -> None:
    models = adapted(llama(bnb8, threshold=6.0), **settings)
    rows = peftkern.explain(models[0])
    assert all(row.fused for row in rows), rows
    assert "int8 (bitsandbytes)" in rows[0].reason or settings.get("use_dora")
    assert_steps_are_equal(*models, settings)


@pytest.mark.parametrize("threshold", [0.0, 2.5])
def test_logits_in_eval_mode_are_as_near_to_the_exact_ones_as_hf_pefts(threshold: float) -> None:
    ours, theirs, exact = adapted(llama(bnb8, threshold=threshold))
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        a, b, c = (m.eval()(input_ids=x).logits for m in (ours, theirs, exact))
        alone = [ours(input_ids=x[:1, :1]).logits, theirs(input_ids=x[:1, :1]).logits]
    # both round every x to 255 steps, at other places when x differs by one rounding
    assert not torch.equal(b.double(), c)
    assert_as_good_as_torch(a, b, c, average=True)
    assert_as_good_as_torch(alone[0], alone[1], c[:1, :1], average=True)


def test_eval_mode_with_gradients() -> None:
    ours, theirs, exact = adapted(llama(bnb8))
    found = []
    x = torch.randint(0, 64, (2, 9))
    for model in (ours, theirs, exact):
        out = model.eval()(input_ids=x, labels=x)
        out.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_as_good_as_torch(*found)


def test_merging_quantises_with_the_owners_code_and_puts_the_bits_back() -> None:
    layer = bnb8(nn.Linear(64, 48))
    layer.train()(torch.randn(2, 64))
    held, before = layer.weight, layer.weight.data.clone()
    scales = layer.state.SCB.clone()
    wanted = weight_of(layer).dense(torch.float32) + torch.randn(48, 64)
    state, error = repack.write(layer, wanted)
    assert 0 < error < 0.01
    x = torch.randn(5, 64)

    def multiplies() -> None:
        packed = weight_of(layer)
        y, exact = (
            as_weight(packed, x).t().product(x),
            x.double() @ packed.dense(x.dtype).double().T,
        )
        assert_as_good_as_torch(y, layer(x) - layer.bias, exact, average=True)

    multiplies()
    state.put(layer)
    assert layer.weight is held and torch.equal(layer.weight.data, before)
    assert torch.equal(weight_of(layer).scales, scales)
    multiplies()


def test_weights_that_are_not_read() -> None:
    dense_layer = bitsandbytes.nn.Linear8bitLt(64, 48)
    assert "quantised in every call (has_fp16_weights)" in str(read(dense_layer))
    x = torch.randn(2, 64)
    config = peftkern.LoraConfig(r=2, target_modules=["0"])

    def error(layer: Any) -> str:
        model = peftkern.get_peft_model(nn.Sequential(layer), config)
        assert not peftkern.explain(model)[0].fused
        with pytest.raises(ValueError, match="a Linear8bitLt cannot be called") as raised:
            model(x)
        return str(raised.value)

    assert "no statistics" in error(bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False))
    part = bnb8(nn.Linear(64, 48))
    part.weight.SCB = part.weight.SCB[:40]
    assert "with 40 scales" in error(part)
    gone = bnb8(nn.Linear(64, 48))
    gone.weight = nn.Parameter(torch.empty(48, 64, device="meta"), requires_grad=False)
    assert "on the meta device" in error(gone)


def test_dense_weights_in_the_layer_are_its_owners_work() -> None:
    """With has_fp16_weights the base layer computes; the adapter is added."""
    linear = nn.Linear(64, 48)
    layer = bitsandbytes.nn.Linear8bitLt(64, 48)
    layer.weight.data.copy_(linear.weight)
    layer.requires_grad_(False)
    given: Any = dict(r=2, target_modules=["0"], init_lora_weights=True)
    model = peftkern.get_peft_model(
        nn.Sequential(copy.deepcopy(layer)), peftkern.LoraConfig(**given)
    )
    x = torch.randn(3, 64)
    y: Tensor = model.eval()(x)
    assert torch.equal(y, layer.eval()(x))


def test_replicated_layers_share_the_weight_and_its_statistics() -> None:
    """The first forward of a layer takes them from the weight; in HF PEFT its copies have none."""
    base = llama(bnb8)
    more: Any = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    more["layer_replication"] = [(0, 2), (0, 2)]
    exact: Any = peftkern.get_peft_model(dense(base), peftkern.LoraConfig(**more)).double()
    x = torch.randint(0, 64, (2, 9))
    model: Any = peftkern.get_peft_model(base, peftkern.LoraConfig(**more)).train()
    held = {k: v for k, v in exact.state_dict().items() if "lora_" in k}
    assert not model.load_state_dict(held, strict=False).unexpected_keys
    want = exact(input_ids=x).logits
    assert (model(input_ids=x).logits - want).norm() < 1e-5 * want.norm()
    layers = model.base_model.model.model.layers
    for name in ("q_proj.base_layer", "v_proj"):  # with and without an adapter
        twins = [layers[i].self_attn.get_submodule(name) for i in (0, 2)]
        assert twins[0].weight is twins[1].weight
        assert twins[0].state.CB.data_ptr() == twins[1].state.CB.data_ptr()
    want = exact.unload()(input_ids=x).logits  # of the deeper model
    assert (model.unload()(input_ids=x).logits - want).norm() < 1e-5 * want.norm()
