"""``quantize_base`` makes a frozen base fp8 in place: what it does, keeps, and refuses."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peftkern
from peftkern.ops.bases.formats import read
from peftkern.ops.bases.fp8_linear import Fp8Linear
from tests.closeness import assert_as_good_as_torch
from tests.quantised_models import dense as as_dense
from tests.test_bases_fp8 import llama

SETTINGS = dict(r=4, target_modules="all-linear", init_lora_weights=False)


def dense() -> Any:
    return llama(lambda module: module)


def adapted(**more: Any) -> Any:
    return peftkern.get_peft_model(dense(), peftkern.LoraConfig(**{**SETTINGS, **more}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(12).view(2, 6)).logits
    return found


def train(model: Any) -> dict[str, Tensor]:
    x = torch.arange(12).view(2, 6)
    torch.manual_seed(5)
    model.train()(input_ids=x, labels=x).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def fp8_layers(model: nn.Module) -> dict[str, Fp8Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}


@pytest.mark.parametrize(
    "settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}, {"use_rslora": True}], ids=str
)
def test_before_and_after_the_adapters_are_the_same_model(settings: dict[str, Any]) -> None:
    after = adapted(**settings)
    assert peftkern.quantize_base(after, "fp8") is after
    before = peftkern.get_peft_model(
        peftkern.quantize_base(dense()), peftkern.LoraConfig(**{**SETTINGS, **settings})
    )
    assert len(fp8_layers(after)) == 7 and fp8_layers(after).keys() == fp8_layers(before).keys()
    state = {k: v for k, v in after.state_dict().items() if "lora_" in k}
    assert not before.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(logits(after), logits(before))
    ours, theirs = train(after), train(before)
    assert ours and ours.keys() == theirs.keys()
    assert all(torch.equal(grad, theirs[name]) for name, grad in ours.items())
    rows = peftkern.explain(after)
    assert all(row.fused and ("use_dora" in settings or "128 x 128" in row.reason) for row in rows)


def test_groups_and_mlps_stay_one_operation() -> None:
    model = adapted()
    text = str(peftkern.explain(model))
    peftkern.quantize_base(model)
    again = str(peftkern.explain(model))
    assert text.count("trains as one operation") == again.count("trains as one operation") > 0
    assert text.count("whole MLP") == again.count("whole MLP")


def test_memory_halves_of_bf16_and_the_layer_alone_is_right() -> None:
    model = adapted().to(torch.bfloat16)
    layers = {n: m for n, m in model.named_modules() if n.endswith("base_layer")}
    before = {n: m.weight.detach().float() for n, m in layers.items()}
    peftkern.quantize_base(model)
    for name, layer in fp8_layers(model).items():
        N, K = before[name].shape
        scales = -(-N // 128) * -(-K // 128)
        assert layer.weight.nbytes + layer.weight_scale_inv.nbytes == N * K + 4 * scales
        assert layer.dtype == layer.compute_dtype == torch.bfloat16
        assert not layer.weight.requires_grad and "e4m3 in blocks of 128 x 128" in repr(layer)
        spread = layer.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]
        w = layer.weight.float() * spread
        error = (w - before[name]).norm() / before[name].norm()
        assert 0.0 < float(error) < 2**-4
        x = torch.randn(2, 3, K, requires_grad=True)
        y = layer(x)
        exact = x.detach().double() @ w.double().t()
        assert_as_good_as_torch(y.detach(), x.detach() @ w.t(), exact)
        y.sum().backward()
        assert x.grad is not None
        assert_as_good_as_torch(x.grad, torch.ones_like(y) @ w, torch.ones_like(exact) @ w.double())


def test_moves_and_casts_keep_the_packed_weight() -> None:
    layer = Fp8Linear(nn.Linear(200, 130))
    x = torch.randn(2, 200)
    held, scale, y = layer.weight.detach().clone(), layer.weight_scale_inv.clone(), layer(x)
    for moved in (layer.half().float(), layer.to(torch.bfloat16).float(), layer.to("cpu")):
        assert torch.equal(moved.weight.view(torch.uint8), held.view(torch.uint8))
        assert torch.equal(moved.weight_scale_inv, scale)
        assert moved.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))
    fresh = Fp8Linear(nn.Linear(200, 130))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and not torch.equal(y, torch.zeros_like(y))


def test_hf_peft_trains_on_a_base_of_ours_with_our_numbers() -> None:
    base = peftkern.quantize_base(dense())
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**SETTINGS))
    ours = peftkern.get_peft_model(base, peftkern.LoraConfig(**SETTINGS))
    state = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    assert all(v.dtype == torch.float32 for v in state.values())
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert_close(logits(ours), logits(theirs))
    found, expected = train(ours), train(theirs)
    assert found and found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name])
    theirs.zero_grad()
    fused = peftkern.fuse(theirs)
    assert all(row.fused and "128 x 128" in row.reason for row in peftkern.explain(fused))
    for name, grad in train(fused).items():
        assert_close(grad, expected[name])
    late = peftkern.quantize_base(peft.get_peft_model(dense(), peft.LoraConfig(**SETTINGS)))
    late.load_state_dict(state, strict=False)
    assert torch.equal(logits(late), logits(peftkern.unfuse(theirs)))


def assert_close(a: Tensor, b: Tensor) -> None:
    """Equal but for float32 sums in another order."""
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_adapters_are_saved_and_loaded_onto_a_quantised_base(tmp_path: Path) -> None:
    model = peftkern.quantize_base(adapted())
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(peftkern.quantize_base(dense()), tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain = peftkern.PeftModel.from_pretrained(dense(), tmp_path)
    assert not torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(peftkern.quantize_base(plain)), logits(model))
    names = [k for k in peftkern.get_peft_model_state_dict(model)]
    assert names == list(peftkern.get_peft_model_state_dict(plain))


def test_optimizers_and_gradients_go_on_after_it() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    kept = [id(p) for p in model.parameters() if p.requires_grad]
    train(model)
    peftkern.quantize_base(model)
    assert kept == [id(p) for p in model.parameters() if p.requires_grad]
    before = logits(model)
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_merging_and_disabling_see_the_fp8_weight() -> None:
    model = peftkern.quantize_base(adapted())
    bare = peftkern.quantize_base(dense())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(bare))
    before = logits(model)
    bits = {n: m.weight.view(torch.uint8).clone() for n, m in fp8_layers(model).items()}
    with pytest.warns(UserWarning, match="quantis"):
        model.merge_adapter()
    assert not torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert all(
        torch.equal(m.weight.view(torch.uint8), bits[n]) for n, m in fp8_layers(model).items()
    )
    assert torch.equal(logits(model), before)


def test_layers_says_what_is_quantised() -> None:
    few = dict(target_modules=["q_proj"])
    assert len(fp8_layers(peftkern.quantize_base(adapted(**few)))) == 1
    every = peftkern.quantize_base(adapted(**few), layers="all-linear")
    assert len(fp8_layers(every)) == 7 and "lm_head" not in " ".join(fp8_layers(every))
    saved = adapted(modules_to_save=["o_proj"], target_modules=["q_proj"])
    names = fp8_layers(peftkern.quantize_base(saved, layers="all-linear"))
    assert len(names) == 6 and "o_proj" not in " ".join(names)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.out.weight = self.embed.weight


def test_bad_input_names_what_is_wrong_and_changes_nothing() -> None:
    def refused(model: Any, words: str, **given: Any) -> None:
        before = {n: type(m) for n, m in model.named_modules()}
        with pytest.raises(ValueError, match=words):
            peftkern.quantize_base(model, **given)
        assert before == {n: type(m) for n, m in model.named_modules()}

    refused(dense(), r"`method` is 'int9'; allowed: 'fp8'", method="int9")
    refused(dense(), r"`compute` is 'fast'; allowed: 'dequantise', 'fp8'", compute="fast")
    refused(dense(), r"`layers` is 'few'; allowed: 'adapted', 'all-linear', None", layers="few")
    refused(dense(), "no base layers under adapters", layers="adapted")
    refused(nn.Embedding(3, 4), "no linear layers")
    refused(peftkern.quantize_base(adapted()), "quantised already")
    refused(Head(), "tied to another module's")
    trained = adapted()
    trained.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)
    refused(trained, "1 of 7 layers cannot be fp8: .*up_proj.base_layer: its weight is trained")
    broken = adapted()
    broken.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.data[3, 4] = torch.nan
    refused(broken, "NaN or infinity")
    merged = adapted()
    merged.merge_adapter()
    refused(merged, "merged into it")
    refused(adapted().to("meta"), "meta")
    hooked = adapted()
    hooked.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(print)
    refused(hooked, "has hooks")
    with pytest.raises(TypeError, match="nn.Module, got str"):
        peftkern.quantize_base("model")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="nn.Module, got str"):
        peftkern.set_base_compute("model", "fp8")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="no linear layers with fp8"):
        peftkern.set_base_compute(dense(), "fp8")


def test_fp8_products_that_this_device_lacks_are_said_and_dequantised() -> None:
    model = adapted()
    expected = logits(peftkern.quantize_base(copy.deepcopy(model)))
    peftkern.quantize_base(model, compute="fp8")
    assert all("; dequantised: " in row.reason for row in peftkern.explain(model))
    assert torch.equal(logits(model), expected)
    peftkern.set_base_compute(model, "dequantise")
    assert not any("; dequantised: " in row.reason for row in peftkern.explain(model))


def test_transformers_trainer_trains_adapters_on_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = peftkern.quantize_base(adapted(lora_dropout=0.1))
    bits = {n: m.weight.view(torch.uint8).clone() for n, m in fp8_layers(model).items()}
    before = peftkern.get_peft_model_state_dict(model)
    before = {name: value.clone() for name, value in before.items()}
    rows = [{"input_ids": list(range(6)), "labels": list(range(6))}] * 4
    settings: dict[str, Any] = dict(per_device_train_batch_size=2, max_steps=2, report_to=[])
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
    )
    Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    after = peftkern.get_peft_model_state_dict(model)
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    for name, layer in fp8_layers(model).items():
        assert torch.equal(layer.weight.view(torch.uint8), bits[name])


def test_a_weight_with_an_adapter_as_a_parameter_is_refused() -> None:
    config = peftkern.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["o_proj.weight"]
    )
    model = peftkern.get_peft_model(dense(), config)
    with pytest.raises(ValueError, match=r"o_proj.*target_parameters"):
        peftkern.quantize_base(model)
    assert not fp8_layers(model)


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "wo"]])
def test_layers_that_transformers_does_not_quantise_stay_dense(
    targets: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=32)
    base = T5ForConditionalGeneration(
        T5Config(dropout_rate=0.0, decoder_start_token_id=0, **sizes)  # type: ignore[arg-type]
    )
    config = peftkern.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = peftkern.get_peft_model(base, config)
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model.eval()(input_ids=x, labels=x).logits
        with caplog.at_level("INFO", logger="peftkern"):
            peftkern.quantize_base(model, layers="all-linear")
        after = model(input_ids=x, labels=x).logits  # T5 casts X to the dtype of this weight
    made = fp8_layers(model)
    assert made and not any(".wo" in name for name in made)
    assert "2 layers stay dense" in caplog.text and "DenseReluDense.wo" in caplog.text
    assert not torch.equal(before, after)
    with torch.no_grad():  # the same numbers in plain layers
        exact = as_dense(model)(input_ids=x, labels=x).logits
        found = model.double()(input_ids=x, labels=x).logits
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
    if "wo" in targets:
        with pytest.raises(ValueError, match="already"):  # of q
            peftkern.quantize_base(model)


@pytest.mark.filterwarnings("ignore:Adapters were merged into")
@pytest.mark.parametrize("way", ["bare", "merged", "unloaded"])
@pytest.mark.parametrize("width", [128, 160])
def test_transformers_loads_what_it_saves_without_adapters(
    way: str, width: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With scales: the e4m3 numbers alone are no weights. On a CPU it makes them dense."""
    sizes: Any = dict(hidden_size=width, intermediate_size=256, num_hidden_layers=1, vocab_size=64)
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes))
    if way == "bare":
        bare: Any = peftkern.quantize_base(llama)
    else:
        config = peftkern.LoraConfig(**{**SETTINGS, "target_modules": ["q_proj", "down_proj"]})
        model = peftkern.quantize_base(peftkern.get_peft_model(llama, config))
        assert getattr(model.config, "quantization_config", None) is None
        bare = model.merge_and_unload() if way == "merged" else model.unload()
    held = {n: m for n, m in bare.named_modules() if isinstance(m, Fp8Linear)}
    assert held and bare.config.quantization_config.weight_block_size == (128, 128)
    assert ("no multiple of 128" in caplog.text) == (width == 160)
    if width == 160:
        return
    bare.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, layer in held.items():
        found: Any = read(layer)
        assert torch.equal(loaded.get_submodule(name).weight, found.packed.dense(torch.float32)), (
            name
        )


def test_a_dense_merge_names_no_quantisation() -> None:
    model = peftkern.quantize_base(adapted())
    merged = model.merge_and_unload(dequantize=True)
    assert getattr(merged.config, "quantization_config", None) is None
