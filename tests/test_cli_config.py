"""``peftkern train --config``, and the ``run.yaml`` that every run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkern.cli.app import run
from peftkern.cli.config_file import read_config
from peftkern.cli.errors import UserError
from peftkern.cli.resume import CONFIG
from peftkern.cli.settings import TrainSettings
from tests.command import make_folder, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("config"), ("llama",))


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "run.yaml").write_text(text)
    return read_config(str(tmp_path / "run.yaml"), TrainSettings)


def test_keys_are_the_options_names(tmp_path: Path) -> None:
    text = "lora-r: 4\nlr: 2e-4\nepochs: 2\npacking: true\ntarget_modules: [q_proj, v_proj]\n"
    assert read(tmp_path, text + "load_in: 4bit\nsteps:\n") == {
        "lora_r": 4,
        "lr": 2e-4,
        "epochs": 2.0,
        "packing": True,
        "target_modules": "q_proj,v_proj",
        "load_in": "4bit",
        "steps": None,
    }
    assert read(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    "text, said",
    [
        ("lr: 1\nlora_rr: 4\n", ":2: unknown key 'lora_rr'; did you mean lora_r?"),
        ("learning_rate: 1\n", ":1: unknown key 'learning_rate'; did you mean lr?"),
        ("xyzzy: 1\n", ":1: unknown key 'xyzzy'; the keys are model, data, out, task, "),
        ("config: a.yaml\n", ":1: unknown key 'config'; the keys are "),
        ("given: [lr]\n", ":1: unknown key 'given'; "),
        ("lora-r: 1\nlora_r: 2\n", ":2: the key 'lora_r' is there twice"),
        ("lora_r: four\n", ":1: lora_r is 'four'; it must be an integer"),
        ("lora_r: true\n", ":1: lora_r is True; it must be an integer"),
        ("lr: fast\n", ":1: lr is 'fast'; it must be a number"),
        ("packing: 1\n", ":1: packing is 1; it must be true or false"),
        ("model: {a: 1}\n", ":1: model is {'a': 1}; it must be a text"),
        ("lora_r:\n", ":1: lora_r is None; it must be an integer"),
        ("lr: 1\n  x: [\n", ":2: not valid YAML: "),
        ("- lr\n", ":1: must hold keys with values"),
    ],
)
def test_what_is_wrong_names_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"--config {tmp_path / 'run.yaml'}{said}")


@pytest.mark.long
def test_every_run_writes_the_file_that_repeats_it(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "my.yaml").write_text(
        "model: llama\ndata: lm.jsonl\nout: first\nlora-r: 4\nsteps: 9\nmax_length: 32\n"
        "lr: 1e-2\nseed: 5\ncpu: true\nbatch_size: 2\n"
    )
    assert run(["train", "--config", "my.yaml", "--steps", "2"]) == 0
    text = (folder / "first" / CONFIG).read_text()
    written = yaml.safe_load(text)
    assert written["steps"] == 2 and written["seed"] == 5 and written["lora_r"] == 4
    assert written["model"] == "llama" and str(folder) not in text
    assert "epochs" not in written and "num_virtual_tokens" not in written
    assert run(["train", "--config", f"first/{CONFIG}", "--out", "second"]) == 0
    first, second = weights(folder / "first"), weights(folder / "second")
    assert all((second[name] == value).all() for name, value in first.items())
    assert yaml.safe_load((folder / "second" / CONFIG).read_text()) == {**written, "out": "second"}
    # the command line beats the file, also where the two are instead of each other
    assert run(["train", "--config", f"first/{CONFIG}", "--out", "third", "--epochs", "0.1"]) == 0
    written = yaml.safe_load((folder / "third" / CONFIG).read_text())
    assert written["epochs"] == 0.1 and "steps" not in written
    capsys.readouterr()
    assert run(["train", "--config", "my.yaml", "--method", "prefix"]) == 2
    assert "--lora-r does not go with --method prefix" in capsys.readouterr().err


def test_what_is_needed_may_stand_in_either(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\n")
    assert run(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert error == "peftkern: missing option --out: give it, or in --config FILE\n"
