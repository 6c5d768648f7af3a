"""Layers of compressed-tensors, compressed and decompressed: their owner's numbers, fused."""

from __future__ import annotations

import copy
from importlib.util import find_spec, module_from_spec
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern
from peftkern.ops.bases import repack
from peftkern.ops.bases.formats import as_weight, read
from peftkern.ops.bases.linear import frozen_linear
from peftkern.tuners.lora.row_adapters import AdapterNames, mixed_reason
from tests.closeness import assert_same_number

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import (  # noqa: E402
    ModelCompressor,
    compress_module,
    decompress_module,
)
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle import forward as owner  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # noqa: E402


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Any:
    given = None if inputs is None else QuantizationArgs(**inputs)
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=given
    )


INT4 = dict(num_bits=4, type="int", strategy="group", group_size=16)
TOKEN = dict(num_bits=8, type="int", strategy="token", dynamic=True)
SCHEMES: dict[str, Any] = {
    **{
        name: preset_name_to_scheme(name, ["Linear"])
        for name in ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
    },
    "W8A16 a row": scheme(dict(num_bits=8, type="int", strategy="channel")),
    "W8A16 in groups": scheme(dict(INT4, num_bits=8)),
    "W4A16 in groups": scheme(INT4),
    "W4A16 with zero points": scheme(dict(INT4, symmetric=False)),
    "W4A16 a row with zero points": scheme(
        dict(num_bits=4, type="int", strategy="channel", symmetric=False)
    ),
    "W8A8, one scale": scheme(dict(num_bits=8, type="int", strategy="tensor"), TOKEN),
    "W8A8 with zero points": scheme(
        dict(num_bits=8, type="int", strategy="channel", symmetric=False),
        dict(TOKEN, symmetric=False),
    ),
    "fp8 in blocks of 48 x 32": scheme(
        dict(num_bits=8, type="float", strategy="block", block_structure=[48, 32])
    ),
}
FP4 = ("NVFP4A16", "MXFP4A16")  # decompressed to bfloat16, whatever the model's dtype


def calibrate(module: Any) -> None:
    """Scales and zero points from the weight's extremes, as an observer sets them."""
    a, w = module.quantization_scheme.weights, module.weight.data
    N, K = w.shape
    if a.strategy == "tensor":
        v = w.reshape(1, -1)
    elif a.strategy == "channel":
        v = w
    elif a.strategy == "block":
        rows, columns = a.block_structure
        p = pad(w, (0, -K % columns, 0, -N % rows))
        p = p.view(p.shape[0] // rows, rows, p.shape[1] // columns, columns)
        v = p.transpose(1, 2).flatten(2)
    else:
        v = w.unflatten(1, (-1, a.group_size))
    low, high = v.amin(-1), v.amax(-1)
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = generate_gparam(w.amin(), w.amax())
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(low, high, a, whole)
    module.weight_scale.data.copy_(scale.view(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zero.view(module.weight_zero_point.shape))
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(3 / 448)


def llama(name: str, dtype: torch.dtype, compressed: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=64)
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    ).to(dtype)
    groups = {"all": SCHEMES[name].model_copy(deep=True)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            calibrate(module)
    model.requires_grad_(False)
    if compressed:
        ModelCompressor.from_pretrained_model(model).compress_model(model)
    return model


def layer(name: str, dtype: torch.dtype = torch.float32, compressed: bool = True) -> Any:
    found = llama(name, dtype, compressed=False).model.layers[0].self_attn.k_proj  # 64 x 128
    if compressed:
        compress_module(found)
    return found


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name in FP4 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_read_as_their_owner_decompresses_them(name: str, dtype: torch.dtype) -> None:
    module = layer(name, dtype)
    twin = copy.deepcopy(module)
    found = read(module)
    assert not isinstance(found, str), found
    decompress_module(twin)
    dense = found.packed.dense(dtype)
    assert dense.is_contiguous() and torch.equal(dense, twin.weight.to(dtype))
    again = read(twin)
    assert not isinstance(again, str) and "decompressed" in again.packed.format
    assert torch.equal(again.packed.dense(dtype), dense)


@pytest.mark.parametrize("name", SCHEMES)
def test_outputs_are_those_of_the_owners_forward(name: str) -> None:
    dtype = dtype_of(name)
    module = layer(name, dtype)
    twin = copy.deepcopy(module)
    decompress_module(twin)
    x = torch.randn(2, 5, 128, dtype=dtype) * 2
    expected = twin(x)
    for given in (module, twin):
        found: Any = read(given)
        y = frozen_linear(x, as_weight(found.packed, x), found.bias)
        assert torch.equal(y, expected)
        assert found.packed.quantises_input == (
            twin.quantization_scheme.input_activations is not None
        )
    plain = x.reshape(-1, 128) @ twin.weight.t()
    quantises = not torch.equal(expected.reshape(plain.shape), plain)
    assert quantises == (twin.quantization_scheme.input_activations is not None)


@pytest.fixture
def straight_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's forward with a gradient for X, which it does not give by itself."""
    own = owner.forward_quantize

    def quantise(module: Any, value: Tensor, name: str, args: Any) -> Tensor:
        q = own(module, value, name, args)
        return value + (q - value).detach() if value.requires_grad else q

    monkeypatch.setattr(owner, "forward_quantize", quantise)


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x = torch.arange(18).view(2, 9)
    torch.manual_seed(3)
    out = model.train()(input_ids=x, labels=x)
    out.loss.backward()
    return out.logits.detach(), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize(
    "name",
    [  # not W8A8: half of its tokens have an element at a tie, -127.5, where any rounding decides
        "W8A8 with zero points",
        "W8A16 a row",
        "W4A16 with zero points",
        "FP8",
        "FP8_DYNAMIC",
        "FP8_BLOCK",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_training_equals_hf_pefts(
    name: str, packed: bool, settings: dict[str, Any], straight_through: None
) -> None:
    more = dict(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    base = llama(name, torch.float64)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    if packed:  # else the owner's hook decompresses the model before its first forward
        inner = ours.get_base_model()
        inner.ct_decompress_hook.remove()
        del inner.ct_decompress_hook
    with torch.no_grad():
        base(input_ids=torch.arange(4)[None])  # HF PEFT cannot wrap what is compressed
    theirs = peft.get_peft_model(base, peft.LoraConfig(**more))
    for model in (ours, theirs):
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.data = p.data.double()
    state = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    found, expected = run(ours), run(theirs)
    assert found[1] and found[1].keys() == expected[1].keys()
    dora = "use_dora" in settings
    if dora:  # HF PEFT measures the weight in float32
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    else:
        assert_same_number(found, expected)
    rows = peftkern.explain(ours)
    quantises = SCHEMES[name].input_activations is not None
    if dora and quantises:
        assert all("quantises X" in row.reason for row in rows)
    else:
        assert all(row.fused for row in rows), str(rows)
    words = "compressed-tensors" if packed else "decompressed (compressed-tensors)"
    assert dora or all(words in row.reason for row in rows)
    held = [m for m in ours.modules() if hasattr(m, "quantization_scheme")]
    assert all(("weight_scale" in m._parameters) for m in held)
    assert {str(m.quantization_status.value) for m in held} == {
        "compressed" if packed else "decompressed"
    }


def flat(found: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    return [found[0], *found[1].values()]


def test_hf_pefts_gradients_stop_at_quantised_inputs_and_ours_do_not() -> None:
    module = layer("W8A8")
    decompress_module(module)
    x = torch.randn(1, 3, 128, requires_grad=True)
    assert not module(x).requires_grad
    found: Any = read(module)
    y = frozen_linear(x, as_weight(found.packed, x), None)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.ones(3, 64) @ module.weight)


@pytest.mark.parametrize("name", ["W8A8", "W8A8 with zero points", "W4A16 in groups", "FP8_BLOCK"])
def test_dora_starts_as_the_base_on_compressed_layers(name: str) -> None:
    module = layer(name)
    twin = copy.deepcopy(module)
    decompress_module(twin)
    config = peftkern.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    ours = peftkern.get_peft_model(nn.Sequential(module), config).eval()
    x = torch.randn(2, 5, 128)
    with torch.no_grad():
        y, expected = ours(x), twin(x)
    magnitude = ours.base_model.model[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, twin.weight.norm(dim=1))
    torch.testing.assert_close(y, expected)


def test_other_dimensions_of_x_go_through_the_owners_forward() -> None:
    module = layer("W8A8")
    decompress_module(module)
    adapted = peftkern.get_peft_model(
        nn.Sequential(module), peftkern.LoraConfig(r=2, target_modules=["0"])
    ).eval()
    x = torch.randn(6, 128) * torch.logspace(-2, 2, 6)[:, None]
    with torch.no_grad():
        assert torch.equal(adapted(x), module(x))  # one scale for all rows, the owner's rule
        assert not torch.equal(module(x), module(x[None])[0])
        assert torch.equal(adapted(x[None]), module(x[None]))


def test_what_cannot_be_read_has_a_reason() -> None:
    def reason(change: Any, name: str = "W8A8", compressed: bool = True) -> str:
        module = layer(name, compressed=compressed)
        change(module)
        found = read(module)
        assert isinstance(found, str)
        return found

    assert "in every call (initialized)" in reason(lambda m: None, compressed=False)
    assert "switched off" in reason(lambda m: setattr(m, "quantization_enabled", False))
    assert "own way" in reason(lambda m: setattr(m, "forward", lambda x: x))
    assert "meta" in reason(lambda m: m.to("meta"))
    assert "act-order" in reason(
        lambda m: m.register_parameter("weight_g_idx", nn.Parameter(torch.ones(1)))
    )
    assert "no scales" in reason(lambda m: delattr(m, "weight_scale"))
    assert "would fit" in reason(
        lambda m: setattr(m, "weight_scale", nn.Parameter(torch.ones(3, 1)))
    )

    def puts_out(module: Any) -> None:
        module.quantization_scheme.output_activations = QuantizationArgs(num_bits=8)

    assert "quantises Y" in reason(puts_out)
    five = layer("W4A16 in groups")
    five.quantization_scheme.weights.num_bits = 5
    assert "packed in 5 bits; 4 and 8 are read" in str(read(five))


@torch.no_grad()
def test_a_merge_outlives_the_owners_decompression() -> None:
    """A model is decompressed before its first forward, between merging and unmerging here."""
    base = llama("W8A16 a row", torch.float32)
    config = peftkern.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peftkern.get_peft_model(base, config).eval()
    q_proj: Any = base.model.layers[0].self_attn.q_proj
    W = repack.dense_value(q_proj.base_layer)
    with pytest.warns(peftkern.PeftWarning, match="quantised again"):
        model.merge_adapter()
    x = torch.arange(18).view(2, 9)
    again = model(input_ids=x).logits
    assert q_proj.base_layer.weight.is_floating_point()
    assert torch.equal(q_proj._unmerged_weight(), W)
    model.unmerge_adapter()
    assert torch.equal(q_proj.base_layer.weight, W)
    before = model(input_ids=x).logits
    torch.testing.assert_close(again, before, rtol=0.05, atol=0.05)
    model.merge_adapter()  # into a dense weight now: nothing is quantised again
    torch.testing.assert_close(model(input_ids=x).logits, before, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(input_ids=x).logits, before)


def test_fp8_products_are_chosen_for_compressed_layers_as_well() -> None:
    model = peftkern.get_peft_model(
        llama("FP8_DYNAMIC", torch.float32), peftkern.LoraConfig(target_modules="all-linear")
    )
    peftkern.set_base_compute(model, "fp8")
    assert all("; dequantised: " in row.reason for row in peftkern.explain(model))


@torch.no_grad()
def test_mixed_batches_quantise_x_as_their_owner() -> None:
    base = llama("W8A8", torch.float32).model.layers[0].self_attn.q_proj
    config = peftkern.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model: Any = peftkern.get_peft_model(nn.Sequential(base), config).eval()
    layer, names = model.base_model.model[0], ["default", "__base__", "default"]
    x = torch.randn(3, 2, 128)
    adapted = layer(x)
    layer.enable_adapters(False)
    plain = layer(x)
    layer.enable_adapters(True)
    want = torch.stack([adapted[0], plain[1], adapted[2]])
    torch.testing.assert_close(layer(x, adapter_names=names), want, rtol=1e-5, atol=1e-5)
    numbers: Any = read(base)
    rounded = plain - x @ numbers.packed.dense(torch.float32).t()
    assert rounded.abs().max() > 1e-3
    assert "quantises X" in str(mixed_reason(layer, x, AdapterNames(names)))


def test_tables_of_a_file_that_is_imported_under_a_default_device() -> None:
    spec = find_spec("peftkern.ops.bases.compressed_numbers")
    assert spec is not None and spec.loader is not None
    again = module_from_spec(spec)
    with torch.device("meta"):  # as in a model's construction: formats are imported when needed
        spec.loader.exec_module(again)
    assert again._PAIRS.device.type == "cpu"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_merged_weight_is_compressed_by_the_owner_and_restored(name: str) -> None:
    module = layer(name, dtype_of(name))
    W = repack.dense_value(module)
    held = {n: t.detach().clone() for n, t in module.named_parameters()}

    def same() -> bool:
        return all(
            torch.equal(t.flatten().view(torch.uint8), held[n].flatten().view(torch.uint8))
            for n, t in module.named_parameters()
            if t.dim()
        )

    before, error = repack.write(module, W)
    assert error == 0.0  # a weight that did not change keeps its numbers
    assert same() or name in FP4  # where 0 has two codes
    before.put(module)
    config: Any = dict(r=4, target_modules=["0"], init_lora_weights=False, lora_alpha=2)
    model: Any = peftkern.get_peft_model(torch.nn.Sequential(module), peftkern.LoraConfig(**config))
    inner, x = model.base_model.model[0], torch.randn(1, 5, 128, dtype=dtype_of(name))
    want, y = W + inner.get_delta_weight("default").float(), model.eval()(x)
    with pytest.warns(peftkern.PeftWarning, match="into 1 quantised weights"):
        model.merge_adapter(safe_merge=True)
    merged = repack.dense_value(module)
    twin = copy.deepcopy(module)
    decompress_module(twin)
    assert torch.equal(merged, twin.weight.float())  # what the owner reads of it
    fresh = layer(name, dtype_of(name), compressed=False)
    fresh.weight.data.copy_(want)
    calibrate(fresh)
    compress_module(fresh)
    anew = repack.dense_value(fresh)  # what the owner makes of the sum
    assert (merged - want).norm() <= 1.02 * (anew - want).norm()
    assert inner.merge_error == pytest.approx(((merged - want).norm() / want.norm()).item(), 1e-3)
    model.unmerge_adapter()
    assert same() and torch.equal(model(x), y)
    out = model.merge_and_unload(dequantize=torch.float32)
    torch.testing.assert_close(out[0].weight, want)
