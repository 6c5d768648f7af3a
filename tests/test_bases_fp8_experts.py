"""The experts of fp8 checkpoints, of which only chosen ones are dequantised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import FP8Experts

import peftkern
from peftkern.ops.bases import repack
from tests.test_bases_mx import packed, step

try:
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
except ImportError:  # an older transformers
    _dequantize_fp8_weight = None

NAMES = ("gate_up_proj", "down_proj")
BLOCK = (16, 16)


def fp8(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(float8, scales) of w [E, N, K], whose sizes are multiples of the block's."""
    tiles = w.unflatten(2, (-1, block[1])).unflatten(1, (-1, block[0]))  # [E, n, bn, k, bk]
    scale = tiles.abs().amax((2, 4)) / 448
    q = (tiles / scale[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)
    return q.to(torch.float8_e4m3fn), scale.float()


def models(kind: str) -> tuple[Any, Any]:
    """(a tiny Qwen3-MoE with quantised experts, the same with the dense numbers)."""
    if _dequantize_fp8_weight is None:
        pytest.skip("the experts of this transformers are made in another way")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=32, intermediate_size=64, num_hidden_layers=2,
        num_experts=6, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=48, experts_implementation="eager",
    )  # fmt: skip
    dense = Qwen3MoeForCausalLM(config)
    small = copy.deepcopy(dense)
    for layer, other in zip(small.model.layers, dense.model.layers, strict=True):
        made: Any = FP8Experts(config, block_size=BLOCK, expert_dtype=kind)
        for name in NAMES:
            theirs = other.mlp.experts.get_parameter(name)
            theirs.data.normal_(std=0.2)
            if kind == "fp8":
                q, scale = fp8(theirs.detach(), BLOCK)
                theirs.data.copy_(_dequantize_fp8_weight(q, scale, list(BLOCK), torch.float32))
            else:
                q, powers = packed(theirs.detach())
                q, scale = q.view(torch.int8), torch.exp2(powers.float() - 127)
                from peftkern.ops.bases.mx import Mx4

                each = [Mx4(a, b).dense(torch.float32) for a, b in zip(q, scale, strict=True)]
                theirs.data.copy_(torch.stack(each))
            setattr(made, name, nn.Parameter(q, requires_grad=False))
            setattr(made, f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
        layer.mlp.experts = made
    return small, dense


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_quantised_experts_equal_the_dense_ones(kind: str, p: float) -> None:
    found = []
    for model in models(kind):
        torch.manual_seed(1)
        config = peftkern.LoraConfig(
            r=3, target_modules=["q_proj"], target_parameters="all-experts", lora_dropout=p,
            init_lora_weights=False,
        )  # fmt: skip
        found.append(peftkern.get_peft_model(model, config))
    small, dense = found
    lora = {k: v for k, v in dense.state_dict().items() if ".lora_" in k}
    assert small.load_state_dict(lora, strict=False).unexpected_keys == []
    x = torch.arange(14).view(2, 7)
    (y, grads), (want, wanted) = step(small.train(), x), step(dense.train(), x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    assert grads.keys() == wanted.keys() and len(grads) == 12
    for name, grad in grads.items():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(grad / scale, wanted[name] / scale, rtol=1e-3, atol=1e-4)
    rows = [r for r in peftkern.explain(small) if "experts" in r.name]
    said = "fp8 in blocks of 16 x 16" if kind == "fp8" else "MXFP4"
    assert len(rows) == 4 and all(r.fused and said in r.reason for r in rows)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_a_dense_model_has_the_sum(kind: str) -> None:
    small, dense = models(kind)
    config = peftkern.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters="all-experts", init_lora_weights=False
    )
    model, twin = (peftkern.get_peft_model(m, copy.deepcopy(config)) for m in (small, dense))
    lora = {k: v for k, v in twin.state_dict().items() if ".lora_" in k}
    assert model.load_state_dict(lora, strict=False).unexpected_keys == []
    want, x = twin.merge_and_unload(), torch.arange(14).view(2, 7)
    made: Any = model.merge_and_unload(dequantize=torch.float32)
    for name, p in want.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(made(input_ids=x).logits, want(input_ids=x).logits)


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_merging_quantises_experts_again_and_puts_the_bytes_back(scales: torch.dtype) -> None:
    small, _ = models("fp8")
    experts: Any = small.model.layers[0].mlp.experts
    for name in NAMES:
        held = getattr(experts, f"{name}_scale_inv")
        held.data = held.data.log2().ceil().exp2().to(scales) if scales.itemsize == 1 else held.data
    config = peftkern.LoraConfig(
        r=3, target_modules=[], target_parameters="all-experts", init_lora_weights=False,
        lora_alpha=8,
    )  # fmt: skip
    model: Any = peftkern.get_peft_model(small, config).eval()
    x = torch.arange(14).view(2, 7)
    with torch.no_grad():
        before = model(input_ids=x).logits
    with model.disable_adapter(), torch.no_grad():
        bare = model(input_ids=x).logits
    bytes_of = {n: p.detach().clone() for n, p in small.named_parameters() if "lora_" not in n}
    outer: Any = model.base_model.model.model.layers[0].mlp.experts
    want = repack.dense_value(experts, "down_proj")
    wrapper = outer if outer.parameter_name == "down_proj" else outer.base_layer
    want = want + wrapper.get_delta_weight("default")
    with pytest.warns(peftkern.PeftWarning, match="into 4 quantised weights"):
        model.merge_adapter(safe_merge=True)
    merged = repack.dense_value(experts, "down_proj")
    for e in range(6):  # the loader's rule, one expert at a time
        q, scale = fp8(want[e : e + 1].detach(), BLOCK)
        if scales == torch.float32:
            theirs = _dequantize_fp8_weight(q, scale, list(BLOCK), torch.float32)[0]
            torch.testing.assert_close(merged[e], theirs)
    error = (merged - want).norm() / want.norm()
    assert 0 < error < 0.05 and wrapper.merge_error == pytest.approx(error.item(), rel=1e-3)
    with torch.no_grad():
        after = model(input_ids=x).logits
    assert (after - before).norm() < 0.5 * (bare - before).norm()
    model.unmerge_adapter()
    now = dict(small.named_parameters())
    for name, held in bytes_of.items():
        assert torch.equal(now[name].view(torch.uint8), held.view(torch.uint8)), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=x).logits, before)
    with torch.no_grad():
        wrapper.lora_B["default"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite|NaN"):
        model.merge_adapter()
    now = dict(small.named_parameters())
    for name, held in bytes_of.items():
        assert torch.equal(now[name].view(torch.uint8), held.view(torch.uint8)), name


def test_fp4_experts_are_merged_dense_only() -> None:
    small, _ = models("fp4")
    config = peftkern.LoraConfig(r=2, target_modules=[], target_parameters="all-experts")
    model: Any = peftkern.get_peft_model(small, config)
    with pytest.raises(ValueError, match="no weights in FP4.*dequantize=True"):
        model.merge_adapter()


def test_experts_without_a_dense_class_are_refused_and_nothing_changes() -> None:
    small, _ = models("fp8")
    config = peftkern.LoraConfig(r=2, target_modules=[], target_parameters="all-experts")
    model: Any = peftkern.get_peft_model(small, config)
    small.config.num_attention_heads = 0  # the model cannot be built from this
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="experts.*cannot be made dense: .*cannot be built"):
        model.merge_and_unload(dequantize=True)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: setattr(m, "down_proj_scale_inv", None), "no scales"),
        (
            lambda m: setattr(m, "down_proj_scale_inv", nn.Parameter(torch.ones(6, 3, 1))),
            "scales are of shape",
        ),
        (lambda m: m.to("meta"), "meta device"),
        (
            lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(6, 64, 32))),
            "weights are torch.float32",
        ),
    ],
)
def test_what_cannot_be_read_is_named(change: Any, said: str) -> None:
    small, _ = models("fp8")
    config = peftkern.LoraConfig(r=2, target_modules=[], target_parameters="all-experts")
    model = peftkern.get_peft_model(small, config)
    change(model.base_model.model.model.layers[0].mlp.experts.get_base_layer())
    with pytest.raises(RuntimeError, match=said):
        model(input_ids=torch.arange(4).view(1, 4))


def test_a_cast_of_the_model_is_an_error_with_and_without_adapters() -> None:
    small, _ = models("fp8")
    config = peftkern.LoraConfig(r=2, target_modules=[], target_parameters="all-experts")
    model = peftkern.get_peft_model(small, config).to(torch.bfloat16)
    x = torch.arange(4).view(1, 4)
    with pytest.raises(RuntimeError, match="fp8 numbers are torch.bfloat16 now"):
        model(input_ids=x)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="fp8 numbers are"):
        model(input_ids=x)
