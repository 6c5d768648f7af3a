"""Merging into quantised weights, making them dense, and starts that change them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from tests.quantised_models import llama

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
SETTINGS = dict(r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)


def adapted(base: nn.Module, **more: Any) -> Any:
    config = peftkern.LoraConfig(**{**SETTINGS, **more})
    return peftkern.get_peft_model(copy.deepcopy(base), config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(12).view(2, 6)).logits
    return found


def bits(model: nn.Module) -> list[Any]:
    """The packed weights, statistics and biases of every layer in 4 bits."""
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    return [
        (m.weight.data.view(torch.uint8).clone(), m.weight.quant_state.absmax.clone())
        for m in layers
    ]


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def base() -> Any:
    return llama(quant_type="nf4")


@pytest.fixture(autouse=True)
def never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own forward may pack weights anew, so layers with adapters never call it."""
    own = bitsandbytes.nn.Linear4bit.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        assert not hasattr(self, "under_adapter"), "a base layer under an adapter was called"
        result: Tensor = own(self, x)
        return result

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)


def mark(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.under_adapter = True
    return model.train()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_rounds_once_and_unmerging_restores_the_bits(base: Any, more: Any) -> None:
    model = mark(adapted(base, **more))
    before, packed = logits(model), bits(model)
    with model.disable_adapter():
        without = logits(model)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    W = repack.dense_value(layer.base_layer)
    with pytest.warns(peftkern.PeftWarning, match="into 6 quantised weights"):
        model.merge_adapter(safe_merge=True)
    merged = repack.dense_value(layer.base_layer)
    if not more:
        exact = W + layer.get_delta_weight("default")
        state = layer.base_layer.weight.quant_state
        owner = bitsandbytes.functional.quantize_4bit(
            exact, blocksize=state.blocksize, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(merged, bitsandbytes.functional.dequantize_4bit(*owner))
        error = (merged - exact).norm() / exact.norm()
        assert layer.merge_error == pytest.approx(error.item(), rel=1e-4)
    assert not equal(bits(model), packed)
    # what rounding does to 4-bit weights of this size, far from what losing the adapter does
    after = logits(model)
    assert (after - before).norm() < 0.6 * (without - before).norm()
    model.unmerge_adapter()
    assert equal(bits(model), packed) and torch.equal(logits(model), before)
    assert layer.merge_error == 0.0


def test_several_merges_are_undone_in_turn(base: Any) -> None:
    model = mark(adapted(base))
    model.add_adapter("other", peftkern.LoraConfig(**SETTINGS))
    packed = bits(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    W = repack.dense_value(layer.base_layer)
    with pytest.warns(peftkern.PeftWarning, match="quantised again"):
        model.merge_adapter(["default"])
        once = bits(model)
    with pytest.warns(UserWarning, match="Already following|quantised again"):
        model.merge_adapter(["other"])
    assert torch.equal(layer._unmerged_weight(), W)
    assert layer.merged_adapters == ["default", "other"]
    layer._unmerge_last()
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.base_layer.weight.data, once[7][0])
    model.unmerge_adapter()
    assert equal(bits(model), packed)


def test_an_error_leaves_every_layer_as_it_was(base: Any) -> None:
    model = mark(adapted(base))
    packed = bits(model)
    last = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        last.lora_B["default"].weight.fill_(float("inf"))
    for merge in (
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True, dequantize=True),
    ):
        with pytest.raises(ValueError, match="NaN|not finite"):
            merge()
        assert equal(bits(model), packed)
        assert not any(getattr(m, "merged_adapters", None) for m in model.modules())


def test_dense_weights_are_those_of_the_base_plus_the_update(base: Any) -> None:
    model = mark(adapted(base))
    model.base_model.model.is_loaded_in_4bit = True
    model.base_model.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    before = logits(model)
    dense = model.merge_and_unload(dequantize=torch.float64)
    kinds = {type(m) for m in dense.modules() if isinstance(m, nn.Linear)}
    assert kinds == {nn.Linear}
    linears = [m for n, m in dense.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    assert {m.weight.dtype for m in linears} == {torch.float64}
    assert not dense.is_loaded_in_4bit and not hasattr(dense.config, "quantization_config")
    dense.to(torch.float32)
    torch.testing.assert_close(logits(dense), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "given, said", [(torch.int8, "at least 16 bits"), ("bf16", "at least 16 bits")]
)
def test_a_wrong_dtype_is_refused(base: Any, given: Any, said: str) -> None:
    model = mark(adapted(base))
    with pytest.raises(ValueError, match=said):
        model.merge_and_unload(dequantize=given)
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())


def test_merged_adapters_are_not_made_dense(base: Any) -> None:
    model = mark(adapted(base))
    with pytest.warns(peftkern.PeftWarning, match="quantised again"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.merge_and_unload(dequantize=True)


def test_disabled_and_several_adapters_do_not_call_the_owner(base: Any) -> None:
    model = mark(adapted(base))
    model.add_adapter("other", peftkern.LoraConfig(**SETTINGS))
    model.base_model.set_adapter(["default", "other"])
    plain, x = logits(base.train()), torch.arange(12).view(2, 6)
    model.train()
    model(input_ids=x).logits.square().sum().backward()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**SETTINGS))
    theirs.add_adapter("other", peft.LoraConfig(**SETTINGS))
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.base_model.set_adapter(["default", "other"])
    theirs.train()
    theirs(input_ids=x).logits.square().sum().backward()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    grads = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, grads[name].grad, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)


# ------------------------------------------------------------------------------------- starts


def test_olora_changes_the_packed_weight_as_in_hf_peft(base: Any) -> None:
    more = {**SETTINGS, "init_lora_weights": "olora"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**more))
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    assert equal(bits(ours), bits(theirs))
    torch.testing.assert_close(logits(ours.train()), logits(theirs.train()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "corda", "loftq", "mica"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_other_starts_refuse_a_quantised_weight(init: str, storage: torch.dtype) -> None:
    model = llama(quant_type="nf4", quant_storage=storage)
    packed = bits(model)
    more: dict[str, Any] = {**SETTINGS, "init_lora_weights": init}
    if init == "loftq":
        more["loftq_config"] = peftkern.LoftQConfig()
    with warnings.catch_warnings(), pytest.raises(TypeError, match="NF4"):
        warnings.simplefilter("ignore")
        peftkern.get_peft_model(model, peftkern.LoraConfig(**more))
    assert equal(bits(model), packed)


def test_an_injection_that_fails_puts_packed_weights_back(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(base)
    packed, write, calls = bits(model), repack.write, []

    def failing(module: Any, weight: Tensor) -> Any:
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("no memory")
        return write(module, weight)

    monkeypatch.setattr(repack, "write", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        peftkern.get_peft_model(
            model, peftkern.LoraConfig(**{**SETTINGS, "init_lora_weights": "olora"})
        )
    assert len(calls) == 4 and equal(bits(model), packed)
