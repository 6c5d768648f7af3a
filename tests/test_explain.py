"""explain(): a row for every adapted layer, with what runs it and why; slow calls log it once."""

from __future__ import annotations

import logging

import pytest
import torch

import peftkern
from peftkern import explain
from tests.changes import CHANGES, KINDS, REASONS, K, N, R, layer_of, layer_pair
from tests.tiny import inputs, pair


def test_rows_are_the_adapted_layers():
    ours, _ = pair("gpt2", target_modules=["c_attn", "wte"], rank_pattern={"wte": 2})
    rows = explain(ours)
    assert [row.name for row in rows] == [
        f"base_model.model.transformer.{n}" for n in ("wte", "h.0.attn.c_attn", "h.1.attn.c_attn")
    ]
    assert [row.kind for row in rows] == ["Embedding", "Conv1D", "Conv1D"]
    assert [row.shape for row in rows] == [(64, 16), (16, 48), (16, 48)]
    assert [row.ranks for row in rows] == [{"default": 2}, {"default": 4}, {"default": 4}]
    assert [row.fused for row in rows] == [False, True, True]
    assert "gather" in rows[0].reason and "torch" in rows[1].backend
    assert [row.name for row in explain(ours.get_base_model())] == [
        row.name.removeprefix("base_model.model.") for row in rows
    ]


def test_table_holds_every_row_and_a_summary():
    ours, _ = pair("llama")
    rows = explain(ours)
    lines = str(rows).splitlines()
    assert len(lines) == len(rows) + 3
    for row in rows:
        line = next(line for line in lines if line.startswith(row.name + " "))
        assert (
            row.backend in line
            and row.reason in line
            and f"{row.shape[0]} x {row.shape[1]}" in line
        )
        assert "default:4" in line
    assert lines[-1].startswith(f"{len(rows)} adapted layers: {len(rows)} ")
    empty = explain(torch.nn.Linear(2, 2))
    assert len(empty) == 0 and "none" in str(empty)


@pytest.mark.parametrize("change", REASONS)
def test_a_call_that_is_not_fused_has_a_reason(change):
    ours, _ = layer_pair()
    ours(torch.ones(1, K))
    assert explain(ours)[0].fused
    CHANGES[change](layer_of(ours))
    row = explain(ours)[0]
    assert not row.fused and REASONS[change] in row.reason and row.backend == "base layer + update"


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("change", CHANGES)
def test_the_operation_runs_exactly_when_explain_says_so(change, monkeypatch):
    """The words of explain() and the way of a call are decided in two places; they must agree."""
    import peftkern.tuners.lora.linear as module

    calls = []
    real = module.fused_linear
    monkeypatch.setattr(module, "fused_linear", lambda *a, **k: calls.append(1) or real(*a, **k))
    ours, _ = layer_pair()
    ours(torch.ones(1, K))
    assert len(calls) == 1
    CHANGES[change](layer_of(ours))
    ours(torch.ones(1, K, dtype=layer_of(ours).weight.dtype))
    assert explain(ours)[0].fused == (change not in REASONS)
    # p = 1 drops everything, which no factor 1 / (1 - p) can express
    assert len(calls) == 1 + (change not in (*REASONS, "dropout_all"))


def test_reasons_of_settings():
    for settings, says in [({"lora_bias": True}, "lora_bias"), ({}, None)]:
        ours, _ = layer_pair(names=("default",), **settings)
        row = explain(ours)[0]
        assert row.fused == (says is None) and (says or "") in row.reason
    ours, _ = layer_pair(dtype=torch.bfloat16)
    assert explain(ours)[0].fused  # float32 adapters under bfloat16
    layer_of(ours).half()
    layer_of(ours).base_layer.float()
    assert "dtypes" in explain(ours)[0].reason
    model = peftkern.get_peft_model(
        torch.nn.Sequential(KINDS["linear"]()),
        peftkern.LoraConfig(target_modules=["0"]),
        low_cpu_mem_usage=True,
    )
    assert "meta" in explain(model)[0].reason


def test_forced_backend_is_the_reason():
    ours, _ = layer_pair()
    with peftkern.use_backend("torch"):
        assert "PEFTKERN_BACKEND=torch" in explain(ours)[0].reason
    row = explain(ours)[0]
    assert row.fused and row.ranks == {"default": R, "other": R} and row.shape == (K, N)


def test_the_reason_is_logged_once(caplog):
    """Once for a reason of a layer, and again when the reason becomes another one."""
    ours, _ = pair("llama")
    batch = inputs("llama")

    def said():
        return [r.getMessage() for r in caplog.records if r.name == "peftkern"]

    with caplog.at_level(logging.INFO, logger="peftkern"):
        ours(**batch)
        assert said() == []
        layer = ours.base_model.model.model.layers[0].self_attn.q_proj
        handle = layer.base_layer.register_forward_hook(lambda *a: None)
        for _ in range(3):
            ours(**batch)
        assert len(said()) == 1 and "hooks" in said()[0]
        handle.remove()
        ours(**batch)
        layer.enable_adapters(False)
        for _ in range(3):
            ours(**batch)
        assert len(said()) == 2 and "disabled" in said()[1]
