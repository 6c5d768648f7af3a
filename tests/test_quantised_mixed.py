"""Batches with an adapter name for each row, on quantised bases: each row as in a call of its own.

The reference computes the whole batch once for each adapter, and takes each adapter's rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkern
from peftkern.tuners.lora import plan
from peftkern.tuners.lora.linear import Linear
from peftkern.tuners.lora.row_adapters import AdapterNames, mixed_call, mixed_reason
from tests.quantised_models import bnb4, bnb8

pytest.importorskip("bitsandbytes")

NAMES = ("b", "__base__", "a", "b")
BASES: dict[str, Any] = {
    "LLM.int8": bnb8,
    "LLM.int8 with outliers": lambda linear: bnb8(linear, threshold=2.0),
    "NF4": lambda linear: bnb4(linear, quant_type="nf4"),
    # products in another dtype than x's
    "NF4 in bf16": lambda linear: bnb4(linear, quant_type="nf4", compute_dtype=torch.bfloat16),
}


def layer_on(base: nn.Module) -> Any:
    torch.manual_seed(1)
    layer: Any = Linear(base)
    for name, r in (("a", 2), ("b", 5)):
        config = peftkern.LoraConfig(r=r, target_modules=["x"], init_lora_weights=False)
        layer.update_layer(name, r, r, config)
    return layer.eval()


def by_adapter(layer: Any, x: Tensor) -> Tensor:
    """Each row of ``x`` by a call of the whole batch with that row's adapter alone."""
    rows = []
    for i, name in enumerate(NAMES):
        layer.enable_adapters(name != "__base__")
        layer.set_adapter([name if name != "__base__" else "a"])
        rows.append(layer(x)[i])
    layer.enable_adapters(True)
    return torch.stack(rows)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_rows_are_as_in_calls_with_their_adapter_alone(kind: str, gradients: bool) -> None:
    torch.manual_seed(0)
    layer = layer_on(BASES[kind](nn.Linear(64, 32)))
    x = torch.randn(4, 3, 64, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        found, want = layer(x, adapter_names=[*NAMES]), by_adapter(layer, x)
    if kind != "NF4":  # the product of the numbers themselves is far from what is compared
        assert (want[1] - read_dense(layer)(x)[1]).abs().max() > 1e-3
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    if gradients:
        dy = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, dy), torch.autograd.grad(want, x, dy),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def read_dense(layer: Any) -> Any:
    found: Any = plan.base_weight(layer.base_layer, torch.zeros(1, 64))
    weight, bias = found
    return lambda x: nn.functional.linear(x, weight.dense(), bias)


@torch.no_grad()
def test_a_base_that_quantises_x_declines_and_says_so() -> None:
    layer = layer_on(bnb8(nn.Linear(64, 32)))
    x, names = torch.randn(4, 3, 64), AdapterNames(NAMES)
    assert mixed_call(layer, x, names) is None
    assert "quantises X" in str(mixed_reason(layer, x, names))
    layer.train()  # on a CPU its owner then multiplies with numbers
    assert mixed_reason(layer, x, names) is None and mixed_call(layer, x, names) is not None


@torch.no_grad()
def test_a_mixed_call_reads_its_base_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_on(bnb4(nn.Linear(64, 32), quant_type="nf4"))
    seen, real = [], plan.checked

    def counted(reader: Any, module: nn.Module) -> Any:
        seen.append(module)
        return real(reader, module)

    monkeypatch.setattr(plan, "checked", counted)
    layer(torch.randn(4, 3, 64), adapter_names=[*NAMES])
    assert seen == [layer.base_layer]
