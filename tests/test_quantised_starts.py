"""Every start of an adapter on every quantised format: right, or refused by name.

A start is right when the model's first outputs are the base's: within the format's rounding where
it changes the weight (OLoRA), and to the last digits where it does not.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.ops.bases import repack
from peftkern.tuners.lora.corda import preprocess_corda
from peftkern.tuners.lora.loraga import preprocess_loraga
from tests.quantised_models import quanto
from tests.quantised_zoo import LAYERS

STARTS = (
    True, "gaussian", "orthogonal", "eva", "olora", "mica", "pissa", "pissa_niter_4", "corda",
    "loftq", "lora_ga",
)  # fmt: skip
SAME = (True, "gaussian", "orthogonal", "eva")  # the weight is neither changed nor read
REFUSED = {
    "pissa": "initialize PiSSA under float32.*`linear`",
    "pissa_niter_4": "initialize PiSSA under float32.*`linear`",
    "corda": "initialize CorDA under float32.*`linear`",
    "mica": "initialize MiCA under float32.*`linear`",
    "olora": "Unsupported data type for the base layer.*`linear`",
    "loftq": "LoftQ quantises the weight of `linear` itself",
    "lora_ga": "LoRA-GA does not support quantized models. Found .*'linear'",
}
X = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def config_of(start: Any) -> Any:
    more: dict[str, Any] = {
        "loftq": {"loftq_config": peftkern.LoftQConfig()},
        "corda": {"corda_config": peftkern.CordaConfig()},
        "eva": {"eva_config": peftkern.EvaConfig()},
        "lora_ga": {"lora_ga_config": peftkern.LoraGAConfig()},
    }.get(start, {})
    return peftkern.LoraConfig(r=4, target_modules=["linear"], init_lora_weights=start, **more)


def started(model: Model, start: Any) -> Any:
    config = config_of(start)
    called: Any = lambda: pytest.fail("the model ran, though the start is refused")  # noqa: E731
    if start == "corda":
        preprocess_corda(model, config, run_model=called)
    if start == "lora_ga":
        preprocess_loraga(model, config, train_step=called)
    adapted: Any = peftkern.get_peft_model(model, config)
    if start == "eva":
        peftkern.initialize_lora_eva_weights(
            adapted, [X, X], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, gather_distributed_inputs=False, show_progress_bar=False,
        )  # fmt: skip
    return adapted


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.train()(X)
    return y


def layer_of(name: str) -> Any:
    torch.manual_seed(0)
    if name.startswith("quanto"):
        quanto()
    return LAYERS[name](nn.Linear(64, 32).requires_grad_(False))


@pytest.mark.parametrize("name", LAYERS)
def test_every_start_is_right_or_refused(name: str) -> None:
    base = started(Model(layer_of(name)), True)
    with base.disable_adapter():
        want = outputs(base)
    inner = base.base_model.model.linear.base_layer
    for start in STARTS:
        works = start in SAME
        works |= start == "olora" and repack.why_not(inner) is None
        works |= start == "mica" and name.startswith(("quanto", "torchao"))
        model = Model(layer_of(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not works:
                with pytest.raises((TypeError, ValueError), match=REFUSED[start]):
                    started(model, start)
                assert not hasattr(model.linear, "base_layer")
                continue
            adapted = started(model, start)
        got = outputs(adapted)
        close = 0.1 if start == "olora" else 1e-5
        assert (got - want).norm() <= close * want.norm(), start
        if start in ("olora", "mica", "orthogonal"):
            assert adapted.base_model.model.linear.lora_B["default"].weight.abs().max() > 0


def test_mica_s_b_is_of_the_dequantised_weight() -> None:
    quanto()
    layer = layer_of("quanto int8")
    W = layer.weight.dequantize()
    model = started(Model(layer), "mica")
    B = model.base_model.model.linear.lora_B["default"].weight
    assert torch.equal(B, torch.linalg.svd(W, full_matrices=False)[0][:, -4:])
    assert not B.requires_grad


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_a_layer_that_its_owner_made_dense_starts_as_any(start: str) -> None:
    from compressed_tensors.compressors import decompress_module

    layer = layer_of("compressed-tensors W4A16")
    decompress_module(layer)
    want = outputs(Model(layer))
    before = layer.weight.clone()
    torch.testing.assert_close(outputs(started(Model(layer), start)), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, before) == (start == "mica")
