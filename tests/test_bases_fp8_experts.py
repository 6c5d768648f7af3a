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
