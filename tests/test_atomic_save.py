"""Saving that fails or is killed leaves every file either old or new."""

from __future__ import annotations

import json
import os
import signal

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import peftkern
from tests.tiny import fill, make, pair

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def test_arguments_of_save(tmp_path):
    model, _ = pair("llama")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, AssertionError), match="file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="ghost"):
        model.save_pretrained(tmp_path / "out", selected_adapters=["default", "ghost"])
    with pytest.raises(ValueError, match="nowhere"):
        model.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion="./nowhere"
        )
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert sorted(os.listdir(tmp_path)) == ["file"] and (tmp_path / "file").read_text() == "mine"


def _half_then_raise(tensors, path, metadata=None):
    with open(path, "wb") as file:
        file.write(b"half of it")
    raise OSError(28, "No space left on device")


def _fail_replace(source, target):
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["save_file", "replace", "config"])
def test_a_save_that_fails_leaves_the_old_files(how, tmp_path, monkeypatch):
    """Whenever it stops, each file is the old one or the new one, and no part of one is left."""
    model, _ = pair("llama")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fill(model, seed=6)
    with monkeypatch.context() as patch:
        if how == "save_file":
            patch.setattr(safetensors.torch, "save_file", _half_then_raise)
        elif how == "replace":
            patch.setattr(os, "replace", _fail_replace)
        else:
            patch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises((OSError, KeyboardInterrupt, MemoryError)):
            model.save_pretrained(tmp_path)
    now = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert now.keys() == before.keys()
    changed = {name for name in now if now[name] != before[name]}
    assert changed <= ({WEIGHTS} if how == "config" else set())
    assert peftkern.PeftModel.from_pretrained(make("llama"), tmp_path) is not None
    assert model.peft_config["default"].inference_mode is False
    model.save_pretrained(tmp_path)  # and then it works
    assert torch.equal(
        load_file(tmp_path / WEIGHTS)[KEY], peftkern.get_peft_model_state_dict(model)[KEY]
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_it_saves(tmp_path):
    model, _ = pair("llama")
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    child = os.fork()
    if child == 0:

        def write_half_and_die(tensors, path, metadata=None):
            with open(path, "wb") as file:
                file.write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save_file = write_half_and_die
        try:
            model.save_pretrained(tmp_path)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    peftkern.PeftModel.from_pretrained(make("llama"), tmp_path)


def test_a_first_save_that_fails_leaves_no_adapter(tmp_path, monkeypatch):
    model, _ = pair("llama")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", _half_then_raise)
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path)
    assert not {p.name for p in tmp_path.iterdir()} & {WEIGHTS, CONFIG}
    assert not any(p.name.endswith(".tmp") for p in tmp_path.iterdir())
