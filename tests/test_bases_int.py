"""Integer weights of torchao and quanto: their owners' numbers, trained beside HF PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import int8, repack
from peftkern.ops.bases.formats import as_weight, read
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import adapted, assert_steps_are_equal, llama
from tests.quantised_models import quanto as quanto_of

torchao: Any = pytest.importorskip("torchao.quantization")
quanto = quanto_of()

WAYS = ["ao int8", "ao int8 in groups", "ao int4 in groups", "int8", "int4", "int2", "float8"]


def quantised(linear: nn.Linear, way: str = "ao int8", **more: Any) -> Any:
    """The layer with a weight of torchao ("ao ...") or of quanto."""
    holder = nn.Sequential(linear)
    if way.startswith("ao"):
        groups = torchao.PerGroup(32)
        config = {
            "ao int8": lambda: torchao.Int8WeightOnlyConfig(),
            "ao int8 in groups": lambda: torchao.Int8WeightOnlyConfig(granularity=groups),
            "ao int4 in groups": lambda: torchao.IntxWeightOnlyConfig(torch.int4, groups),
            "ao dynamic": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
            "ao dynamic int4": lambda: torchao.Int8DynamicActivationIntxWeightConfig(
                torch.int4, groups
            ),
        }[way]()
        torchao.quantize_(holder, config)
    else:
        quanto.quantize(holder, weights=getattr(quanto, f"q{way}"), **more)
        quanto.freeze(holder)
    return holder[0].requires_grad_(False)


def weight_of(layer: Any) -> Any:
    found = read(layer)
    assert not isinstance(found, str), found
    assert found.bias is layer.bias
    return found.packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_is_read_as_its_owner_reads_it(way: str, dtype: torch.dtype) -> None:
    layer = quantised(nn.Linear(64, 48, dtype=dtype), way)
    packed = weight_of(layer)
    numbers = layer.weight.dequantize()
    assert packed.shape == (48, 64) and torch.equal(packed.dense(dtype), numbers)
    assert all(a is b for a, b in zip(packed.tensors, weight_of(layer).tensors, strict=True))
    wide = numbers.double()
    for rows in (1, 3, 8, 9, 40, 200):  # each way of the products
        x, dy = torch.randn(rows, 64).to(dtype), torch.randn(rows, 48).to(dtype)
        w, given = as_weight(packed, x), x.clone().requires_grad_()
        theirs = nn.functional.linear(given, layer.weight)
        theirs.backward(dy)
        forward, backward = x.double() @ wide.T, dy.double() @ wide
        assert_as_good_as_torch(w.t().product(x), theirs.detach(), forward, average=True)
        assert_as_good_as_torch(w.product(dy), given.grad, backward, average=True)
        for made, start in (
            (w.t().product, torch.ones(rows, 48)),
            (w.product, torch.ones(rows, 64)),
        ):
            start = start.to(dtype)
            used, alone = (x, forward) if start.shape[1] == 48 else (dy, backward)
            dense = numbers.t() if used is x else numbers
            added = torch.addmm(start, used, dense)
            out = start.clone()
            assert made(used, out) is out
            assert_as_good_as_torch(out, added, alone + 1, average=True)


def test_the_ways_of_the_int8_product_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = weight_of(quantised(nn.Linear(64, 48, dtype=torch.bfloat16)))
    calls: list[str] = []
    real = int8.int8_product

    def counted(*args: Any) -> Tensor:
        calls.append("torch's")
        assert real is not None
        return real(*args)

    monkeypatch.setattr(int8, "int8_product", counted)
    for rows, expected in ((8, ["torch's"]), (9, []), (64, [])):
        calls.clear()
        packed.product(torch.randn(rows, 64, dtype=torch.bfloat16), None)
        assert calls == expected
    calls.clear()  # torch's reads past the end of these rows: wrong numbers, or the process ends
    odd = int8.Int8(torch.ones(6, 10, dtype=torch.int8), torch.ones(6, 1), "test")
    assert torch.equal(
        odd.product(torch.ones(1, 10).bfloat16(), None).float(), torch.ones(1, 6) * 10
    )
    assert not calls
    monkeypatch.setattr(int8, "int8_product", None)  # a torch without the name
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    exact = x.double() @ packed.dense(torch.float64).T
    assert_as_good_as_torch(packed.product(x, None), x @ packed.dense(torch.bfloat16).T, exact)


def test_float16_does_not_overflow() -> None:
    linear = nn.Linear(64, 48, bias=False, dtype=torch.float16)
    layer = quantised(linear)
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    layer.weight.qdata.fill_(127)
    layer.weight.scale.fill_(0.001)
    assert weight_of(layer).product(x, None).isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("way", ["ao int8", "ao int4 in groups", "int8", "int4", "float8"])
def test_a_training_step_equals_hf_pefts(way: str, settings: dict[str, Any]) -> None:
    models = adapted(llama(quantised, way=way), **settings)
    rows = peftkern.explain(models[0])
    assert len(rows) == 14 and all(row.fused for row in rows), rows
    owner = "torchao" if way.startswith("ao") else "quanto"
    assert f"({owner})" in rows[0].reason or settings.get("use_dora")
    assert_steps_are_equal(*models, settings)
    x = torch.randint(0, 64, (1, 1))
    with torch.no_grad():  # a token
        found = [m.eval()(input_ids=x).logits for m in models]
    assert_as_good_as_torch(*found)


@pytest.mark.parametrize("way", [w for w in WAYS if w != "ao int8 in groups"])
def test_merging_quantises_with_the_owners_code_and_puts_the_bits_back(way: str) -> None:
    layer = quantised(nn.Linear(64, 48), way)
    held, before = layer.weight, layer.weight.dequantize().clone()
    wanted = before + 0.1 * torch.randn(48, 64)
    state, error = repack.write(layer, wanted)
    assert 0 < error < (0.5 if way == "int2" else 0.2)
    assert type(layer.weight) is type(held)
    assert torch.equal(weight_of(layer).dense(torch.float32), layer.weight.dequantize())
    state.put(layer)
    assert layer.weight is held and torch.equal(held.dequantize(), before)


@pytest.mark.parametrize("way", ["ao dynamic", "ao dynamic int4", "int8"])
def test_layers_whose_owner_quantises_x_are_merged_into_and_made_dense(way: str) -> None:
    """Their products stay the owner's, and their weights are read all the same."""
    more = {"activations": quanto.qint8} if way == "int8" else {}
    layer = quantised(nn.Linear(64, 48), way, **more)
    if more:
        layer.input_scale.fill_(0.03)  # as its calibration would set them
        layer.output_scale.fill_(0.03)
    config: Any = dict(r=2, target_modules=["0"], init_lora_weights=False, lora_alpha=1)
    model: Any = peftkern.get_peft_model(nn.Sequential(layer), peftkern.LoraConfig(**config))
    x = torch.randn(5, 64)
    model, before, held = model.eval(), model.eval()(x), layer.weight
    inner = model.base_model.model[0]
    want = layer.weight.dequantize() + inner.get_delta_weight("default")
    with pytest.warns(peftkern.PeftWarning, match="into 1 quantised weights"):
        model.merge_adapter(safe_merge=True)
    assert type(layer.weight) is type(held) and layer.weight is not held
    error = (layer.weight.dequantize() - want).norm() / want.norm()
    assert 0 < error < 0.12 and inner.merge_error == pytest.approx(error.item(), rel=1e-3)
    for name in ("act_quant_kwargs", "activation_quantization"):  # it still quantises X
        assert getattr(layer.weight, name, None) == getattr(held, name, None)
    assert (model(x) - before).norm() < 0.15 * before.norm()
    model.unmerge_adapter()
    assert layer.weight is held and torch.equal(model(x), before)
    dense = model.merge_and_unload(dequantize=torch.float32)
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(dense[0].weight, want)
    assert (dense(x) - before).norm() < 0.05 * before.norm()


def test_merging_into_quanto_keeps_the_adapter() -> None:
    """HF PEFT's merge writes to a dequantised copy, and the adapter is gone."""
    ours, _, _ = adapted(llama(quantised, way="int8"))
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = ours.eval()(input_ids=x).logits
        with pytest.warns(UserWarning, match="quantis"):
            merged = ours.merge_and_unload()
        after = merged(input_ids=x).logits
        bare = llama(quantised, way="int8").eval()(input_ids=x).logits
    assert (after - before).norm() < 0.1 * (bare - before).norm()


def test_an_int4_tensor_is_read_by_its_published_layout() -> None:
    """Its owner's kernels need a GPU; HF PEFT refuses it."""
    N, K, group = 48, 64, 32
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    packed = (codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4)
    scale, zero = (torch.randn(K // group, N).bfloat16() for _ in range(2))
    tensor = torchao.Int4Tensor(packed, scale, zero, [1, group], torch.Size((N, K)))
    layer = nn.Linear(K, N, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    found = weight_of(layer)
    of = torch.arange(K) // group
    expected = codes.float() * scale.float()[of].T + zero.float()[of].T
    assert found.shape == (N, K) and torch.equal(found.dense(torch.float32), expected)
    model: Any = peftkern.get_peft_model(
        nn.Sequential(layer), peftkern.LoraConfig(r=2, target_modules=["0"])
    )
    x = torch.randn(3, K, dtype=torch.bfloat16)
    exact = x.double() @ expected.double().T + layer.bias.double()
    theirs = nn.functional.linear(x, expected.bfloat16(), layer.bias)
    assert_as_good_as_torch(model(x).detach(), theirs.detach(), exact.detach())


def test_weights_that_are_not_read_are_their_owners_work() -> None:
    def reason(layer: Any) -> str:
        config: Any = dict(r=2, target_modules=["0"], init_lora_weights=True)
        model: Any = peftkern.get_peft_model(nn.Sequential(layer), peftkern.LoraConfig(**config))
        [row] = peftkern.explain(model)
        assert not row.fused
        x = torch.randn(3, 64)  # B starts at 0
        assert torch.equal(model.eval()(x), layer.eval()(x))
        return str(row.reason)

    assert "asks for quantised activations" in reason(quantised(nn.Linear(64, 48), "ao dynamic"))
    assert "quantised activations" in reason(quantised(nn.Linear(64, 48), "ao dynamic int4"))
    holder = nn.Sequential(nn.Linear(64, 48))
    quanto.quantize(holder, weights=quanto.qint8)
    assert "it is not frozen" in reason(holder[0])
    layer = quantised(nn.Linear(64, 48), "int8", activations=quanto.qint8)
    assert "the activations too, to qint8" in str(read(layer))

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(2 * input, self.weight)

    own = Own(64, 48)
    own.weight = quantised(nn.Linear(64, 48)).weight
    assert "a Own computes its product in its own way" in reason(own)
    meta = quantised(nn.Linear(64, 48))
    meta.weight = nn.Parameter(meta.weight.to("meta"), requires_grad=False)
    assert "on the meta device" in str(read(meta))
