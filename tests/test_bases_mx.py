"""MXFP4: the format, and gpt-oss' experts kept in it, of which only chosen ones are dequantised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors

import peftkern
from peftkern.ops.bases.mx import VALUES, Mx4

NAMES = ("gate_up_proj", "down_proj")
SETTINGS: dict[str, Any] = dict(
    r=3, target_modules=[], target_parameters="all-experts", init_lora_weights=False
)


def packed(w: Tensor) -> tuple[Tensor, Tensor]:
    """(bits uint8 [..., K / 2], scales uint8 [..., K / 32]) of w [..., K], by rounding."""
    blocks = w.double().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    exponent = largest.log2().floor() - 2
    codes = (blocks / 2.0**exponent)[..., None] - torch.tensor(VALUES, dtype=torch.float64)
    nearest = codes.abs().argmin(-1).to(torch.uint8).flatten(-2)
    bits = nearest[..., ::2] | (nearest[..., 1::2] << 4)
    return bits.contiguous(), (exponent[..., 0] + 127).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_is_read_as_transformers_reads_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bits, scale = packed(torch.randn(6, 96))
    owner = convert_moe_packed_tensors(
        bits.view(1, 6, 3, 16), scale.view(1, 6, 3), dtype=dtype
    )  # [1, K, N]
    assert torch.equal(Mx4(bits, scale).dense(dtype), owner[0].t())
    if hasattr(torch, "float8_e8m0fnu"):
        e8m0 = Mx4(bits.view(torch.int8), scale.view(torch.float8_e8m0fnu))
        assert torch.equal(e8m0.dense(dtype), owner[0].t())


def test_every_code_and_power_is_exact() -> None:
    bits = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for exponent in (1, 127, 254):
        scale = torch.full((16, 1), exponent, dtype=torch.uint8)
        w = Mx4(bits, scale).dense(torch.float64)
        low = torch.tensor([VALUES[b & 15] for b in range(256)], dtype=torch.float64)
        high = torch.tensor([VALUES[b >> 4] for b in range(256)], dtype=torch.float64)
        want = torch.stack([low, high], 1).view(16, 32) * 2.0 ** (exponent - 127)
        assert torch.equal(w, want)
    broken = torch.full((16, 1), 255, dtype=torch.uint8)
    assert Mx4(bits, broken).dense(torch.float32).isnan().all()


def models() -> tuple[Any, Any]:
    """(a tiny gpt-oss whose experts are packed, the same with the dense numbers), in float64."""
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_local_experts=6,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=48, max_position_embeddings=64, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    dense = GptOssForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in dense.model.layers:
            for name in NAMES:
                layer.mlp.experts.get_parameter(name).normal_(std=0.3)
                layer.mlp.experts.get_parameter(f"{name}_bias").normal_(std=0.1)
    small = copy.deepcopy(dense)
    for layer, other in zip(small.model.layers, dense.model.layers, strict=True):
        made: Any = Mxfp4GptOssExperts(config)
        for name in NAMES:
            theirs = other.mlp.experts.get_parameter(name)  # [E, K, N]
            bits, scale = packed(theirs.detach().transpose(1, 2))
            setattr(made, name, nn.Parameter(bits, requires_grad=False))
            made.register_parameter(f"{name}_scales", nn.Parameter(scale, requires_grad=False))
            bias = other.mlp.experts.get_parameter(f"{name}_bias")
            setattr(made, f"{name}_bias", nn.Parameter(bias.detach().clone(), requires_grad=False))
            of = [Mx4(b, s).dense(torch.float64).t() for b, s in zip(bits, scale, strict=True)]
            theirs.data.copy_(torch.stack(of))
        layer.mlp.experts = made.eval()
    return small, dense


def adapted(model: Any, **more: Any) -> Any:
    torch.manual_seed(1)
    config = peftkern.LoraConfig(**{**SETTINGS, **more})
    return peftkern.get_peft_model(model, config, autocast_adapter_dtype=False).double()


def pair(*names: str, **more: Any) -> tuple[Any, Any]:
    """The two models with equal adapters of these names, or one called default; training."""
    small, dense = (adapted(m, **more) for m in models())
    for name in names[1:]:
        for model in (small, dense):
            model.add_adapter(name, peftkern.LoraConfig(**{**SETTINGS, **more}))
            model.double()
    lora = {k: v for k, v in dense.state_dict().items() if ".lora_" in k}
    assert small.load_state_dict(lora, strict=False).unexpected_keys == []
    return small.train(), dense.train()


def step(model: Any, x: Tensor, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(2)
    out = model(input_ids=x, **more)
    out.logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_packed_experts_equal_the_dense_ones(p: float) -> None:
    small, dense = pair(lora_dropout=p)
    x = torch.arange(14).view(2, 7)
    (y, grads), (want, wanted) = step(small, x), step(dense, x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-12)
    assert grads.keys() == wanted.keys() and len(grads) == 8
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-14)
    rows = peftkern.explain(small)
    assert all(r.fused and "only chosen experts are dequantised, MXFP4" in r.reason for r in rows)


def test_experts_without_a_token_are_not_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = models()
    model = adapted(small).eval()
    read: list[int] = []
    dense = Mx4.dense

    def counted(self: Mx4, dtype: torch.dtype) -> Tensor:
        read.append(self.bits.data_ptr())
        return dense(self, dtype)

    monkeypatch.setattr(Mx4, "dense", counted)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    # 2 layers of 2 linears, of which one token chooses 2 experts
    assert len(read) == len(set(read)) == 8


def test_adapters_are_disabled_and_mixed_without_the_owner() -> None:
    small, dense = (m.eval() for m in pair("default", "other"))
    x = torch.arange(12).view(3, 4)
    for names in (None, ["default", "__base__", "other"]):
        more = {} if names is None else {"adapter_names": names}
        with torch.no_grad():
            found, want = (m(input_ids=x, **more).logits for m in (small, dense))
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    with torch.no_grad(), small.disable_adapter(), dense.disable_adapter():
        torch.testing.assert_close(small(input_ids=x).logits, dense(input_ids=x).logits)


def test_files_are_those_of_the_dense_model(tmp_path: Any) -> None:
    small, dense = models()
    model = adapted(small).eval()
    model.save_pretrained(tmp_path)
    again = peftkern.PeftModel.from_pretrained(dense, tmp_path).double().eval()
    x = torch.arange(8).view(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=x).logits, model(input_ids=x).logits)


def test_what_cannot_be_done_is_said_before_anything_changes() -> None:
    small, _ = models()
    model = adapted(small)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="into a Mxfp4GptOssExperts: .*kernels for a GPU.*dequantize=True"
        ):
            merge()
    experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
    scales = experts.down_proj_scales
    experts.down_proj_scales = None
    with pytest.raises(RuntimeError, match="down_proj: it has no scales"):
        model(input_ids=torch.arange(4).view(1, 4))
    experts.down_proj_scales = nn.Parameter(scales[:, :, :0], requires_grad=False)
    with pytest.raises(RuntimeError, match=r"scales are of shape .* need \(6, 64, 1\)"):
        model(input_ids=torch.arange(4).view(1, 4))
    rows = peftkern.explain(model)
    assert [r.fused for r in rows] == [True, True, False, False]


def test_a_dense_model_has_the_sum() -> None:
    small, dense = pair()
    for model in (small, dense):
        model.base_model.model.config.use_cache = False
    x = torch.arange(14).view(2, 7)
    before, want = step(small, x)[0], dense.merge_and_unload()
    with pytest.raises(ValueError, match="dequantize=True"):
        small.merge_adapter()
    made = small.merge_and_unload(dequantize=torch.float64)
    experts = made.model.layers[0].mlp.experts
    assert type(experts) is type(want.model.layers[0].mlp.experts)
    assert experts.config is made.config or experts.config is made.config.get_text_config()
    for name, p in want.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made(input_ids=x).logits, before, rtol=1e-10, atol=1e-12)


class Swizzled:
    """Stands for triton_kernels' tensor, by which transformers replaces a parameter on a GPU."""


@pytest.mark.parametrize("targets", ["all-experts", ["mlp.experts.down_proj"]], ids=str)
def test_the_layout_of_gpu_kernels_is_declined_by_name(targets: Any) -> None:
    small, _ = models()
    for layer in small.model.layers:
        for name in NAMES:  # as transformers' swizzle_mxfp4_convertops does
            del layer.mlp.experts._parameters[name]
            setattr(layer.mlp.experts, name, Swizzled())
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts`.*triton_kernels.*dequantize=True"):
        adapted(small, target_parameters=targets)
    # attention layers beside such experts take adapters
    config = peftkern.LoraConfig(r=2, target_modules=["q_proj"])
    model: Any = peftkern.get_peft_model(small, config)
    assert len(peftkern.explain(model)) == 2
    with pytest.raises(ValueError, match="experts` cannot be made dense: gate_up_proj: .*triton"):
        model.merge_and_unload(dequantize=True)
