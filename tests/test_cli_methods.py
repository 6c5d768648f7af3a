"""``peftkern train --method``: what each trains and takes, and names that a model lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import peftkern
from peftkern.cli import resume
from peftkern.cli.app import run
from peftkern.cli.train import train
from tests.command import command, make_folder, settings
from tests.models import build

# of tests/command.py's settings, those that are for layers
NO_LAYERS = {"lora_r": 16, "lora_dropout": 0.0}
METHODS = [
    ("dora", "llama", {"lora_dropout": 0.0}, {"use_dora": True}),
    ("prefix", "llama", {"prefix_projection": True, "encoder_hidden_size": 8}, {}),
    ("prompt", "llama", {"prompt_tuning_init_text": "w1 w2"}, {"prompt_tuning_init": "TEXT"}),
    ("p-tuning", "llama", {"num_virtual_tokens": 4}, {"num_virtual_tokens": 4}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("methods"), ("llama", "bert"))


@pytest.mark.long
@pytest.mark.parametrize("method, model, given, config", METHODS)
def test_a_method_trains_and_goes_on(
    folder: Path, tmp_path: Path, method: str, model: str, given: Any, config: Any
) -> None:
    out = tmp_path / "out"
    changes = {**(NO_LAYERS if method != "dora" else {}), **given, "lr": 0.05, "steps": 4}
    wanted = settings(folder, out, method=method, **changes)
    whole = train(wanted)
    assert whole["after"]["loss"] < whole["before"]["loss"]
    said = json.loads((out / "adapter_config.json").read_text())
    assert config.items() <= said.items()
    tensors = (out / "adapter_model.safetensors").read_bytes()
    # killed after step 2
    (out / resume.FINISHED).unlink()
    (out / "checkpoint-4" / resume.MANIFEST).unlink()
    again = train(wanted)
    assert again["steps_of_this_call"] == 2
    assert again["losses"] == whole["losses"] and again["after"] == whole["after"]
    assert (out / "adapter_model.safetensors").read_bytes() == tensors


def test_classifying_tokens_with_a_prompt(folder: Path, tmp_path: Path) -> None:
    data = {"model": str(folder / "bert"), "data": str(folder / "tok.jsonl"), "task": "token_cls"}
    made = settings(folder, tmp_path / "out", method="prompt", steps=2, **NO_LAYERS, **data)
    record = train(made)
    assert 0 <= record["after"]["accuracy"] <= 1
    assert record["runs_as"] == "20 virtual tokens before the input"


def test_parameters_are_targets(folder: Path, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    build("qwen3_moe", vocab=63, eos_token_id=1).save_pretrained(model)
    for file in (folder / "llama").glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "out"
    args = command(folder, out, model=str(model), steps=2, target_modules="none", lora_dropout=0.0)
    assert run([*args, "--target-parameters", "experts.down_porj"]) == 2
    error = capsys.readouterr().err
    assert "--target-parameters experts.down_porj: the model has no such name; did you " in error
    assert "mean experts.down_proj? It has " in error and error.count("\n") == 1
    assert not out.exists()
    assert run([*args, "--target-parameters", "experts.down_proj"]) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj"] and not config["target_modules"]


@pytest.mark.parametrize(
    "given, said",
    [
        ("--method lorra", "--method is lorra; it must be one of lora, dora, prefix, prompt"),
        # also where the value is the default
        ("--method prefix --lora-r 16", "--lora-r does not go with --method prefix; it is for"),
        ("--num-virtual-tokens 20", "--num-virtual-tokens does not go with --method lora; it is"),
        ("--method prompt --prefix-projection", "--prefix-projection does not go with --method"),
        ("--method prefix --encoder-hidden-size 8", "--encoder-hidden-size needs --prefix-project"),
        ("--method prompt --packing", "--packing does not go with --method prompt: its virtual"),
        ("--method prefix --load-in fp8", "--load-in fp8 is for adapted layers; prefix has none"),
        ("--method prefix --num-virtual-tokens 0", "--num-virtual-tokens is 0; it must be at"),
        ("--target-modules none", "--target-modules is none; it must be all-linear, or names with"),
        ("--target-modules q_proj,v_porj", "--target-modules v_porj: the model has no such name; "
         "did you mean v_proj? It has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_p"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_by_name(
    folder: Path, tmp_path: Path, capsys: Any, given: str, said: str
) -> None:
    out = tmp_path / "out"
    places = ["--model", str(folder / "llama"), "--data", str(folder / "lm.jsonl")]
    assert run(["train", *places, "--out", str(out), "--cpu", *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"peftkern: {said}") and error.count("\n") == 1
    assert not out.exists()


def test_the_library_names_what_exists() -> None:
    config = peftkern.LoraConfig(target_modules=["q_porj"])
    with pytest.raises(ValueError, match="not found in the base model") as error:
        peftkern.get_peft_model(build("llama"), config)
    assert "did you mean q_proj? It has q_proj, k_proj, v_proj, o_proj" in str(error.value)


def test_a_missing_folder_is_said_before_the_hub_is_asked(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def ask(name: str, **options: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    assert run(command(folder, tmp_path / "out", model="modles/llama")) == 2
    printed = capsys.readouterr()
    hub = "--model modles/llama: no such folder here; asking the Hugging Face hub for this name"
    assert hub in " ".join(printed.out.split())
    assert "--model modles/llama: no such folder here, and from the hub the tokeni" in printed.err
