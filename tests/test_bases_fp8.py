"""Weights in fp8 of transformers, torchao and our own layer: equal to their owner's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Linear

import peftkern
from peftkern.ops.bases import fp8_numbers, fp8_products
from peftkern.ops.bases.formats import as_weight, read
from peftkern.ops.bases.fp8_linear import Fp8Linear
from tests.closeness import assert_as_good_as_torch, assert_same_number

try:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
except ImportError:  # an older transformers
    _dequantize_fp8_weight = None

E4M3 = torch.float8_e4m3fn
Build = Callable[[nn.Linear], Any]


def finegrained(
    linear: nn.Linear, block: tuple[int, int] | None = (128, 128), scales: str = "float"
) -> Any:
    """An ``FP8Linear`` of a linear layer's weight, as a checkpoint would fill it."""
    N, K = linear.weight.shape
    made = FP8Linear(K, N, block, scale_fmt=scales, has_bias=linear.bias is not None)
    rows, columns = block or (N, K)
    scale = torch.empty(-(-N // rows), -(-K // columns))
    q = torch.empty(N, K, dtype=E4M3)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            s = linear.weight.detach()[at].abs().max() / 448
            if scales == "ue8m0":
                s = s.log2().ceil().exp2()
            scale[i, j], q[at] = s, (linear.weight.detach()[at] / s).to(E4M3)
    made.weight = nn.Parameter(q, requires_grad=False)
    scale = scale if block else scale.reshape(())
    made.weight_scale_inv = nn.Parameter(scale.to(made.weight_scale_inv.dtype), requires_grad=False)
    made.bias = linear.bias
    return made


def torchao_layer(linear: nn.Linear, granularity: str = "row") -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    kinds = {
        "row": quantization.PerRow(),
        "tensor": quantization.PerTensor(),
        "block": quantization.PerBlock([32, 16]),
    }
    held = quantization.Float8Tensor.from_hp(linear.weight.detach(), granularity=kinds[granularity])
    made = nn.Linear(linear.in_features, linear.out_features, bias=False)
    made.weight = nn.Parameter(held, requires_grad=False)
    made.bias = linear.bias
    return made


def llama(build: Build, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=160, intermediate_size=208, num_hidden_layers=1, vocab_size=64)
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    ).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, build(module))
    return model.requires_grad_(False)


def every_number() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3).view(16, 16)


def test_every_number_of_e4m3_is_converted_as_torch_does() -> None:
    q = every_number()
    finite = q.float().isfinite()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            fp8_numbers.numbers(q, dtype)[finite], q.to(dtype)[finite]
        )  # a NaN is in it
        clean = torch.where(finite, q.float(), 0.0).to(E4M3)
        assert torch.equal(fp8_numbers.numbers(clean, dtype), clean.to(dtype))
        assert torch.equal(fp8_numbers.numbers(clean, dtype).signbit(), clean.to(dtype).signbit())
    assert torch.equal(fp8_numbers.numbers(q, torch.float32).isnan(), ~finite)
    assert fp8_numbers.numbers(q[:0], torch.float32).shape == (0, 16)
    other = q.float().nan_to_num().to(torch.float8_e5m2)
    assert torch.equal(fp8_numbers.numbers(other, torch.float32), other.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [None, (128, 128), (64, 128), (7, 11), (300, 300)], ids=str)
def test_finegrained_weights_are_read_as_transformers_reads_them(
    block: tuple[int, int] | None, scales: str, dtype: torch.dtype
) -> None:
    if block is None and scales == "ue8m0":
        pytest.skip("FP8Linear has no such scale")
    if _dequantize_fp8_weight is None:
        pytest.skip("this transformers has no function that dequantises")
    layer = finegrained(nn.Linear(200, 136), block, scales)
    found = read(layer)
    assert not isinstance(found, str) and found.bias is layer.bias
    owner = _dequantize_fp8_weight(
        layer.weight.detach(), layer.weight_scale_inv.detach(), block, dtype
    )
    dense = found.packed.dense(dtype)
    assert dense.dtype == dtype and torch.equal(dense, owner)
    x = torch.randn(5, 200).to(dtype)
    w = as_weight(found.packed, x)
    assert torch.equal(w.t().product(x), x @ owner.t())
    assert torch.equal(w.product(x @ owner.t()), x @ owner.t() @ owner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["row", "tensor", "block"])
def test_torchao_weights_are_read_as_torchao_reads_them(
    granularity: str, dtype: torch.dtype
) -> None:
    layer = torchao_layer(nn.Linear(64, 96), granularity)
    found = read(layer)
    assert not isinstance(found, str) and "(torchao)" in found.packed.format
    assert torch.equal(found.packed.dense(dtype), layer.weight.dequantize(dtype))


def test_what_cannot_be_read_has_a_reason() -> None:
    layer = finegrained(nn.Linear(200, 136))
    layer.weight_scale_inv = nn.Parameter(torch.ones(2, 3))
    assert read(layer) == ("its scales are of shape (2, 3), and (2, 2) would fit its weight")
    for shape in ((), (1,), (1, 1)):  # one scale is not that of four blocks
        layer.weight_scale_inv = nn.Parameter(torch.ones(shape), requires_grad=False)
        assert "(2, 2) would fit its weight" in str(read(layer))
    layer.weight = nn.Parameter(torch.zeros(136, 100, dtype=torch.int8), requires_grad=False)
    assert read(layer) == "its weight is packed in 4 bits (FP4)"
    layer.weight = nn.Parameter(torch.zeros(136, 200))
    assert "dequantised" in str(read(layer))

    class Other(FP8Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input

    assert "its own way" in str(read(Other(8, 8)))
    assert "meta" in str(read(finegrained(nn.Linear(8, 8)).to("meta")))
    ours = Fp8Linear(nn.Linear(8, 8))
    ours._buffers["weight_scale_inv"] = ours.weight_scale_inv.bfloat16()
    assert "another dtype was assigned" in str(read(ours))
    with pytest.raises(RuntimeError, match="another dtype"):
        ours(torch.randn(2, 8))


def dense_twin(model: Any) -> Any:
    """The model with every fp8 layer a dense one of the same numbers."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        found = read(module) if isinstance(module, nn.Linear) else "no linear layer"
        if isinstance(found, str):
            continue
        dense = nn.Linear(module.in_features, module.out_features, bias=False)
        dense.weight = nn.Parameter(found.packed.dense(torch.float64), requires_grad=False)
        dense.bias = module.bias
        twin.set_submodule(name, dense)
    return twin


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.3},
    {"use_dora": True},
    {"use_dora": True, "lora_dropout": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("build", [finegrained, torchao_layer, Fp8Linear])
def test_training_equals_hf_pefts_on_the_dequantised_model(
    build: Build, settings: dict[str, Any]
) -> None:
    """In float64: HF PEFT cannot call an FP8Linear without a GPU, so it gets its numbers."""
    base = llama(build)
    more = dict(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    theirs = peft.get_peft_model(dense_twin(base), peft.LoraConfig(**more))
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            if "lora_" in name or p.dtype == torch.float32:
                p.data = p.data.double()
    state = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    rows = peftkern.explain(ours)
    assert all(row.fused for row in rows), str(rows)
    x = torch.randint(0, 64, (2, 9))
    found = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(3)
        out = model(input_ids=x, labels=x)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.logits.detach(), grads))
    assert found[0][1] and found[0][1].keys() == found[1][1].keys()
    # DoRA measures a quantised weight in float32, here and in HF PEFT
    if "use_dora" in settings:
        for a, b in zip(_flat(found[0]), _flat(found[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    else:
        assert_same_number(*found)


def _flat(found: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
    return [found[0], *found[1].values()]


def test_hf_pefts_numbers_on_torchao_in_float32() -> None:
    base = llama(torchao_layer)
    more = dict(r=4, target_modules="all-linear", init_lora_weights=False)
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**more))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**more))
    exact = peft.get_peft_model(dense_twin(llama(torchao_layer)), peft.LoraConfig(**more)).double()
    state = {k: v for k, v in ours.state_dict().items() if "lora_" in k}
    for model in (theirs, exact):
        model.load_state_dict(state, strict=False)
    x = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        logits = [m.eval()(input_ids=x).logits for m in (ours, theirs, exact)]
    assert_as_good_as_torch(*logits)


# ------------------------------------------------------------------------------ products in fp8


def by_blocks(x: Tensor, w: Any) -> Tensor:
    """The product in fp8 by its formula, in float64: X quantised, W as it is."""
    q, a = fp8_products.quantised_blocks(x)
    exact = (q.double().unflatten(1, (-1, 128)) * a.double()[:, :, None]).flatten(1)
    return exact @ w.dense(torch.float64).t()


def test_quantising_rows_and_blocks_keeps_the_promised_digits() -> None:
    x = torch.randn(7, 256) * torch.logspace(-8, 4, 7)[:, None]
    x[3], x[5, :128] = 0.0, 0.0
    for quantise, width in (
        (fp8_products.quantised_rows, 256),
        (fp8_products.quantised_blocks, 128),
    ):
        q, a = quantise(x)
        assert q.dtype == E4M3 and a.dtype == torch.float32 and a.shape == (7, 256 // width)
        back = (q.float().unflatten(1, (-1, width)) * a[:, :, None]).flatten(1)
        scale = a.repeat_interleave(width, 1)
        # the quotient is rounded to float32 before e4m3: one rounding more than the bound's
        bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
        assert bool(((back - x).abs() <= bound).all())
        assert torch.equal(back[3], x[3])


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_row_products_in_fp8_are_torchs(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies fp8 rows on a CPU as well, slowly: the very call that a GPU gets."""
    if not hasattr(torch.nn.functional, "scaled_mm"):
        pytest.skip("this torch has no scaled_mm")
    layer = torchao_layer(nn.Linear(32, 48, bias=False), granularity)
    peftkern.set_base_compute(layer, "fp8")
    found: Any = read(layer)
    assert "slow on a CPU" in found.packed.format
    x, dy = torch.randn(5, 32), torch.randn(5, 48)
    w = found.packed.dense(torch.float32)
    assert torch.equal(found.packed.product(x, None), x @ w.t())  # it says that it dequantises
    monkeypatch.setattr(fp8_products, "_device_why_not", lambda device, blocks: None)
    assert found.packed.format.endswith("; computes in fp8")
    q, a = fp8_products.quantised_rows(x)
    exact = (q.double() * a.double()) @ found.packed.dense(torch.float64).t()
    y = found.packed.product(x, None)
    assert y.dtype == x.dtype and not torch.equal(y, x @ w.t())
    assert_as_good_as_torch(y, (q.float() * a) @ w.t(), exact)
    base = torch.randn(5, 48)
    assert torch.equal(found.packed.product(x, base.clone()), base + y)
    scale = found.packed.scale.reshape(-1, 1).expand(48, 1)
    q, b = fp8_products.quantised_rows(dy * scale.t())
    w8 = found.packed.q
    exact = (q.double() * b.double()) @ w8.double()
    dx = found.packed.grad_input(dy, None)
    assert_as_good_as_torch(dx, (q.float() * b) @ w8.float(), exact)


def test_block_products_give_torch_the_scales_as_it_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only Hopper multiplies with block scales: the call is replaced by its definition."""
    calls = []

    def multiplied(q: Tensor, w: Tensor, a: Tensor, ka: Any, s: Tensor, ks: Any, **out: Any) -> Any:
        (M, K), N = q.shape, w.shape[1]
        assert (ka.name, ks.name) == ("BlockWise1x128", "BlockWise128x128")
        assert w.stride() == (1, K) and q.is_contiguous()
        assert a.shape == (M, K // 128) and a.stride() == (1, M)
        four = -(-(K // 128) // 4) * 4
        assert s.shape == (four, N // 128) and s.stride() == (1, four)
        calls.append(out)
        left = (q.double().unflatten(1, (-1, 128)) * a.double()[:, :, None]).flatten(1)
        right = w.double() * s[: K // 128].double().repeat_interleave(128, 0).repeat_interleave(
            128, 1
        )
        return (left @ right).to(out["output_dtype"])

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", multiplied)
    monkeypatch.setattr(fp8_products, "_device_why_not", lambda device, blocks: None)
    layer = Fp8Linear(nn.Linear(256, 640, bias=False))
    peftkern.set_base_compute(layer, "fp8")
    x = torch.randn(3, 256, requires_grad=True)
    y = layer(x)
    found: Any = read(layer)
    torch.testing.assert_close(y.double(), by_blocks(x.detach(), found.packed))
    dy = torch.randn_like(y)
    y.backward(dy)
    q, a = fp8_products.quantised_blocks(dy)
    back = (q.double().unflatten(1, (-1, 128)) * a.double()[:, :, None]).flatten(1)
    torch.testing.assert_close(x.grad.double(), back @ found.packed.dense(torch.float64))
    assert len(calls) == 2


def test_shapes_that_fp8_products_do_not_take_are_dequantised_and_said() -> None:
    for layer, words in (
        (Fp8Linear(nn.Linear(200, 128)), "no multiple of 128"),
        (finegrained(nn.Linear(128, 128), (64, 64)), "blocks are 64 x 64"),
        (torchao_layer(nn.Linear(24, 16)), "no multiple of 16"),
    ):
        peftkern.set_base_compute(layer, "fp8")
        found: Any = read(layer)
        assert words in found.packed.format
        peftkern.set_base_compute(layer, "dequantise")
        assert words not in read(layer).packed.format  # type: ignore[union-attr]


def test_the_bound_of_our_blocks_holds() -> None:
    w = torch.randn(200, 300) * torch.logspace(-30, 10, 200)[:, None]
    w[:128, :128] = 0.0
    q, scale = fp8_numbers.quantised(w, (128, 128))
    assert scale.shape == (2, 3) and scale.dtype == torch.float32
    spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    error = (q.float() * spread - w).abs()
    bound = torch.maximum(w.abs() * 2**-4, spread * 2**-10) * (1 + 2**-20)
    assert bool((error <= bound).all())
    assert torch.equal(q.float()[:128, :128], w[:128, :128])
    normal = torch.randn(256, 256)
    q, scale = fp8_numbers.quantised(normal, (128, 128))
    back = fp8_numbers.scale_(q.float(), scale, (128, 128))
    assert 0.02 < float((back - normal).norm() / normal.norm()) < 0.03  # quantize_base's 2.6%
