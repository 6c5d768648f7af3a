"""The examples: each runs as a user runs it, without a network, and prints true statements."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import peftkern
from tests.closeness import assert_same_number, differ

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "examples").glob("*.py"))
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a host fails the test: the variable that keeps the hub silent is off."""

    def refuse(host: Any, *_: Any, **__: Any) -> None:
        pytest.fail(f"{host} was asked for")  # no Exception, so that nobody tries again

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def run(
    no_network: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[dict[str, Any], str]]:
    """(The names that a script leaves, what it printed) of a run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
        script = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        left = runpy.run_path(script, run_name="__main__")
        return left, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model and a tokenizer on disk, for --model; in float64, so that sums may be compared."""
    path = tmp_path_factory.mktemp("examples") / "model"
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).double().save_pretrained(path)
    words = transformers.GPT2Tokenizer().train_new_from_iterator(
        ["words"], 259, show_progress=False
    )
    words.save_pretrained(path)
    return str(path)


def names_in(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def losses(printed: str) -> list[float]:
    """Of each step, in their order."""
    found = re.findall(r"^step +(\d+): loss ([\d.]+)$", printed, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(20))
    return [float(loss) for _, loss in found]


def held_out(printed: str) -> tuple[float, float]:
    (found,) = re.findall(r"^loss on held-out text: ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE)
    return float(found[0]), float(found[1])


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_one_file_is_enough_and_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    tree = ast.parse(text)
    assert f"    python examples/{path.name} [--model PATH]" in (ast.get_docstring(tree) or "")
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or "."] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    packages = {"datasets", "peft", "peftkern", "torch", "transformers", "trl"}
    assert imported <= packages | sys.stdlib_module_names


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_pages_list_every_example(page: str) -> None:
    linked = set(re.findall(r"\(\S*?examples/(\w+\.py)\)", (ROOT / page).read_text()))
    assert linked == {path.name for path in FILES} and len(FILES) == 7


def test_a_call_to_the_hub_is_seen(no_network: None) -> None:
    with pytest.raises(pytest.fail.Exception, match="was asked for"):
        transformers.AutoConfig.from_pretrained("owner/name-that-is-nowhere")


# ---------------------------------------------------------------- what they do

FUSED = "14 adapted layers: 14 torch fused"
given = pytest.mark.parametrize("given", [False, True], ids=["default", "--model"])


@given
def test_train_loop(run: Any, folder: str, given: bool) -> None:
    left, printed = run("train_loop.py", *(["--model", folder, "--out", "to"] if given else []))
    out = "to" if given else "runs/loop"
    assert losses(printed)[-1] < losses(printed)[0] and FUSED in printed
    assert names_in(Path(out)) == ADAPTER
    assert f"{out}, loaded again: the same outputs: True" in printed
    assert type(left["merged"]) is transformers.LlamaForCausalLM
    if given:  # in float64
        untrained = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            assert_same_number(left["merged"](**left["batch"]).logits, left["wanted"])
            assert differ(untrained(**left["batch"]).logits, left["wanted"])


@pytest.fixture
def mixture(folder: str, tmp_path: Path) -> str:
    """A mixture on disk for --model, with the tokenizer of the other."""
    path = tmp_path / "mixture"
    shutil.copytree(folder, path)
    config = transformers.Qwen3MoeConfig(
        vocab_size=259,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@given
def test_mixture(run: Any, mixture: str, given: bool) -> None:
    left, printed = run("mixture.py", "--steps", "8", *(["--model", mixture] if given else []))
    before, after = held_out(printed)
    assert after < before
    assert len(re.findall(r"^step +\d+: loss [\d.]+$", printed, re.MULTILINE)) == 8
    rows = [row for row in peftkern.explain(left["model"]) if ".experts" in row.name]
    assert len(rows) == 2 * left["model"].config.num_hidden_layers
    assert all(row.name in printed for row in rows)
    assert names_in(Path("runs/mixture")) == ADAPTER
    written = json.loads(Path("runs/mixture/adapter_config.json").read_text())
    assert written["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@given
@pytest.mark.long
def test_train_with_trainer(run: Any, folder: str, given: bool) -> None:
    left, printed = run("train_with_trainer.py", *(["--model", folder] if given else []))
    before, after = held_out(printed)
    assert after < before and FUSED in printed
    written = names_in(Path("runs/trainer"))
    assert ADAPTER | {"checkpoint-20"} <= written and "model.safetensors" not in written
    left["trainer"].train(resume_from_checkpoint=True)  # as its comment says
    assert left["trainer"].state.global_step == 20


@given
@pytest.mark.long
def test_train_with_trl(
    run: Any, folder: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")  # needs Python 3.11
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # TRL's own
    _, printed = run("train_with_trl.py", *(["--model", folder] if given else []))
    before, after = held_out(printed)
    assert after < before and FUSED in printed
    written = names_in(Path("runs/trl"))
    assert ADAPTER <= written and "model.safetensors" not in written


def test_serve_adapters(run: Any, folder: str) -> None:
    left, printed = run("serve_adapters.py")
    assert [line[-4:] for line in printed.splitlines()] == ["True"] * 3
    answers = {tuple(row.tolist()) for row in (*left["mixed"], left["loaded"][0])}
    assert len(answers) == 4
    for name in "abc":
        assert names_in(Path("runs/serve") / name) == ADAPTER

    left, printed = run("serve_adapters.py", "--model", folder)
    own = [str(Path("runs/serve", name).rename(Path("runs", name))) for name in "abc"]
    again, said = run("serve_adapters.py", "--model", folder, "--adapters", *own)
    assert said == printed and printed.count("True") == 3
    assert torch.equal(again["mixed"], left["mixed"]) and not Path("runs/serve/a").exists()


@given
def test_prefix_tuning(run: Any, folder: str, given: bool) -> None:
    left, printed = run("prefix_tuning.py", *(["--model", folder] if given else []))
    assert losses(printed)[-1] < losses(printed)[0]
    assert names_in(Path("runs/prefix")) == ADAPTER
    assert "runs/prefix, loaded again: generates the same: True" in printed
    with torch.no_grad():
        tuned = left["loaded"](**left["prompt"]).logits
        with left["loaded"].disable_adapter():
            assert not torch.equal(left["loaded"](**left["prompt"]).logits, tuned)


@given
def test_fuse_hf_peft(run: Any, folder: str, given: bool) -> None:
    left, printed = run("fuse_hf_peft.py", *(["--model", folder] if given else []))
    assert FUSED in printed
    assert not any(row.fused for row in peftkern.explain(left["model"]))
    (found,) = re.findall(
        r"^before training: HF PEFT ([\d.]+), fused ([\d.]+)\n"
        r"after 20 steps: fused ([\d.]+), unfused ([\d.]+)$",
        printed,
        re.MULTILINE,
    )
    theirs, ours, trained, unfused = map(float, found)
    assert trained < ours
    if given:  # in float64
        assert_same_number(ours, theirs)
        assert_same_number(unfused, trained)
