"""``adapter_names`` through adapted experts, and parameters that are weights of linear layers."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from tests import moe
from tests.closeness import assert_same_number
from tests.field import quietly
from tests.moe_models import FLAGS, adapt, alone, fused, ids, numbers, wrappers
from tests.tiny import fill

NAMES = ["b", "__base__", "a", "b"]
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def one_by_one(model: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """The rows of a batch, each with its adapter alone."""
    rows = []
    for row, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]))
        else:
            model.base_model.set_adapter(name)
            rows.append(model(row[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", FLAGS)
@torch.no_grad()
def test_each_row_gets_its_adapter(kind: str) -> None:
    model = alone(("a", "b"), kind)
    for length in (1, 5):
        x = ids(len(NAMES), length)
        got = model(x, adapter_names=NAMES)
        assert_same_number(got, one_by_one(model, x, NAMES))
    none = ["__base__"] * 4
    assert_same_number(model(x, adapter_names=none), one_by_one(model, x, none))


@torch.no_grad()
def test_adapters_that_are_in_some_wrappers_only() -> None:
    for i in range(2):
        model = alone(("a", "b"))
        quietly(wrappers(model)[i].delete_adapter, "a")
        quietly(wrappers(model)[1 - i].delete_adapter, "b")
        x = ids(len(NAMES), 3)
        assert_same_number(model(x, adapter_names=NAMES), one_by_one(model, x, NAMES))
    model = alone(("a", "b"), target_parameters=["experts.down_proj"])
    assert_same_number(model(x, adapter_names=NAMES), one_by_one(model, x, NAMES))


def test_gradients_of_a_mixed_batch() -> None:
    model = alone(("a", "b"))
    x = ids(len(NAMES), 3)
    model.set_requires_grad(["a", "b"])
    model(x, adapter_names=NAMES).cos().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n.rsplit(".", 2)[1] for n in got} == {"a", "b"}
    model.zero_grad()
    for row, name in zip(x, NAMES, strict=True):
        if name != "__base__":
            model.base_model.set_adapter(name)
            model(row[None]).cos().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same_number(got, want)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation(beams: int) -> None:
    """Prefill and decoding; each row's tokens are those that it gets alone."""
    config = {"target_parameters": BOTH, "task_type": "CAUSAL_LM"}
    model = adapt(peftkern, moe.make("qwen3_moe", torch.float64), ("a", "b"), **config)
    assert all(fused(model))
    x = torch.arange(3, 19).view(4, 4)
    how = {"max_new_tokens": 3, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    got = model.generate(input_ids=x, adapter_names=NAMES, **how)
    seen = set()
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(input_ids=x[i : i + 1], **how)
        else:
            model.set_adapter(name)
            want = model.generate(input_ids=x[i : i + 1], **how)
        want = want[0]
        assert torch.equal(got[i, : len(want)], want) and not got[i, len(want) :].any()
        seen.add(tuple(want[4:].tolist()))
    assert len(seen) > 1


@torch.no_grad()
def test_errors_of_mixed_batches() -> None:
    model = alone(("a", "b"))
    x = ids(4, 3)
    experts = model.base_model.model.experts
    flat = torch.randn(7, 8, dtype=torch.float64)
    index, weights = torch.zeros(7, 2, dtype=torch.int64), torch.ones(7, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="4 entries for 7 tokens of experts"):
        experts(flat, index, weights, adapter_names=NAMES)
    want = model(x, adapter_names=NAMES)
    handle = experts.get_base_layer().register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match="mixed adapter batches here: the experts have hooks"):
        model(x, adapter_names=NAMES)
    handle.remove()
    wrappers(model)[1].merge()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=NAMES)
    wrappers(model)[1].unmerge()
    assert_same_number(model(x, adapter_names=NAMES), want)


# ------------------------------------------------------------------------- linear layers' weights


class Products(nn.Module):
    """An ``nn.Linear`` and a ``Conv1D``, of which the weights are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 6)
        self.lin = nn.Linear(6, 10)
        self.conv = Conv1D(8, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.lin(self.embed(input_ids)).tanh())


def products(library: Any, which: str, names: Any = ("a",), **settings: Any) -> Any:
    torch.manual_seed(0)
    targets = {"target_parameters": [f"{which}.weight"]}
    return adapt(library, Products().double(), names, **targets, **settings)


@pytest.mark.parametrize("which", ["lin", "conv"])
def test_a_weight_of_two_dimensions_is_a_lora_linear(which: str) -> None:
    ours, theirs = (products(lib, which, ("a", "b")) for lib in (peftkern, peft))
    for active in ("a", "b", ["a", "b"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        # torch computes a Conv1D's several updates in the weight
        assert fused(ours) == [which == "lin" or active != ["a", "b"]]
        assert_same_number(numbers(ours), numbers(theirs))
    for model in (ours, theirs):
        model.base_model.set_adapter("a")
        model.merge_adapter()
    with torch.no_grad():
        assert_same_number(ours(ids()), theirs(ids()))
        ours.unmerge_adapter()
        hook = getattr(ours.base_model.model, which).get_base_layer().register_forward_hook
        want = ours(ids())
        hook(lambda *call: None)
        assert not any(fused(ours))
        assert_same_number(ours(ids()), want)


def test_a_weight_of_two_dimensions_with_dropout_and_in_mixed_batches() -> None:
    model = products(peftkern, "lin", ("a", "b"), lora_dropout=0.5)
    x = ids(4, 3)
    with torch.no_grad():
        want = one_by_one(model, x, NAMES)
        assert_same_number(model(x, adapter_names=NAMES), want)
    model.base_model.set_adapter("a")
    still = numbers(model)
    model.train()
    assert all(fused(model))
    first, again, other = (numbers(model, seed=seed) for seed in (1, 1, 2))
    assert_same_number(first, again)
    assert not torch.equal(first["output"], other["output"])
    assert not torch.equal(first["output"], still["output"])
    model.base_model.set_adapter(["a", "b"])
    assert not torch.equal(numbers(model, seed=1)["output"], numbers(model, seed=2)["output"])
    conv = products(peftkern, "conv", ("a", "b"))
    with torch.no_grad(), pytest.raises(ValueError, match="the weight is a Conv1D's"):
        conv(x, adapter_names=NAMES)
    fill(conv, seed=3)
