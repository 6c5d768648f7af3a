"""``peftkern inspect``: facts about a saved adapter, checked against the model that saved it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.cli.app import run
from tests.tiny import fill, make


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with an adapter of two ranks and alphas, with a trained head, and its model."""
    folder = tmp_path_factory.mktemp("inspect") / "adapter"
    config = peftkern.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 3},
    )
    model = peftkern.get_peft_model(make("llama", "SEQ_CLS", torch.float64), config)
    fill(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, model


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert run(["inspect", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_norms_and_scales_are_the_models(adapter: Any, capsys: Any) -> None:
    folder, model = adapter
    found = inspected(capsys, str(folder))
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 5
    for name, layer in layers.items():
        module = model.base_model.model.get_submodule(name)
        update = module.get_delta_weight("default").detach().double()
        assert layer["scale"] == module.scaling["default"]
        assert layer["norm_update"] == pytest.approx(float(update.norm()), rel=1e-6)
        assert layer["norm_BA"] * layer["scale"] == pytest.approx(layer["norm_update"])
    assert layers["model.layers.1.mlp.down_proj"]["r"] == 2
    assert layers["model.layers.0.self_attn.q_proj"]["alpha"] == 3
    assert layers["model.embed_tokens"]["kind"] == "embedding"
    state = load_file(folder / "adapter_model.safetensors")
    assert found["parameters"] == sum(t.numel() for t in state.values())
    assert found["bytes"] == sum(t.nbytes for t in state.values())
    assert [other["name"] for other in found["others"]] == ["base_model.model.score.weight"]
    assert found["ranks"] == {"2": 1, "4": 4}


def test_what_loads_it_and_why_not(adapter: Any, capsys: Any) -> None:
    loads = inspected(capsys, str(adapter[0]))["loads"]
    assert {name: entry["reads"] for name, entry in loads.items()} == {
        "peft": True,
        "vllm": True,
        "sglang": False,
        "gguf": False,
    }
    assert any("rsLoRA" in reason for reason in loads["gguf"]["reasons"])
    assert any("score" in reason for reason in loads["gguf"]["reasons"])
    assert not loads["gguf"]["export_mends"]  # the head
    assert not inspected(capsys, str(adapter[0]), "--max-rank", "3")["loads"]["vllm"]["reads"]


def test_the_table_names_layers_and_programs(adapter: Any, capsys: Any) -> None:
    assert run(["inspect", str(adapter[0] / "adapter_model.safetensors"), "--all"]) == 0
    said = capsys.readouterr().out
    for word in (
        "LORA SEQ_CLS",
        "rank_pattern",
        "layers.1.mlp.down_proj",
        "score.weight",
        "vLLM",
        "rsLoRA",
    ):
        assert word in said, word
    # no terminal breaks the lines, so a program finds a layer's norms in its line
    line = next(line for line in said.splitlines() if line.startswith("  layers.1.mlp.down_proj "))
    assert len(line.split()) == 11


def test_experts_share_a_tensor(tmp_path: Path, capsys: Any) -> None:
    model = peftkern.get_peft_model(
        make("qwen3_moe", dtype=torch.float64),
        peftkern.LoraConfig(r=3, target_parameters=["mlp.experts.down_proj"]),
    )
    fill(model)
    model.save_pretrained(tmp_path)
    layer = inspected(capsys, str(tmp_path))["layers"][0]
    name, module = next((n, m) for n, m in model.named_modules() if hasattr(m, "parameter_name"))
    update = module.get_delta_weight("default").detach()
    assert layer["kind"] == "experts" and layer["r"] == 3
    assert layer["norm_update"] == pytest.approx(float(update.double().norm()), rel=1e-6)


def test_what_is_not_finite_is_named(adapter: Any, tmp_path: Path, capsys: Any) -> None:
    state = load_file(adapter[0] / "adapter_model.safetensors")
    name = next(key for key in state if "lora_A" in key)
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "adapter_model.safetensors")
    found = inspected(capsys, str(tmp_path))
    assert found["not_finite"] == [name] and found["loads"] == {}
    assert found["layers"][0]["scale"] is None  # no configuration is beside it


@pytest.mark.parametrize(
    "make_it, said",
    [
        (lambda p: p / "nothing", "no such file or folder"),
        (lambda p: p, "holds neither adapter_model.safetensors nor adapter_model.bin"),
        (lambda p: (p / "x.txt").write_text("") and None or p / "x.txt", "must be a folder"),
    ],
)
def test_no_adapter_is_one_line(make_it: Any, said: str, tmp_path: Path, capsys: Any) -> None:
    assert run(["inspect", str(make_it(tmp_path))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_damaged_file_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12")
    assert run(["inspect", str(tmp_path)]) == 2
    assert "is truncated, damaged" in capsys.readouterr().err
