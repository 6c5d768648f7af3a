"""No value in a configuration, and no name, makes a save write outside its folder."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

import peftkern
from tests.tiny import make

OUT = "../../out"


def everything_below(folder):
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
    }


@pytest.mark.parametrize("name", [OUT, "..", "a/b", "a\\b", "/etc/x", "a.b", "", None, 3])
def test_names_of_adapters_are_no_paths(name, tmp_path):
    config = peftkern.LoraConfig(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter_name"):
        peftkern.get_peft_model(make("llama"), config, adapter_name=name)
    model = peftkern.get_peft_model(make("llama"), config)
    with pytest.raises(ValueError, match="adapter_name"):
        model.add_adapter(name, config)
    model.save_pretrained(tmp_path / "deep" / "er" / "in")
    for load in (
        lambda: peftkern.PeftModel.from_pretrained(make("llama"), tmp_path / "deep/er/in", name),
        lambda: model.load_adapter(tmp_path / "deep/er/in", name),
    ):
        with pytest.raises(ValueError, match="adapter_name"):
            load()
    before = everything_below(tmp_path)
    model.base_model.peft_config[name] = config  # as nobody should
    with pytest.raises(ValueError, match="adapter_name"):
        model.save_pretrained(tmp_path / "deep" / "er" / "in")
    assert everything_below(tmp_path) == before


def test_paths_in_configurations_are_only_noted(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for kind in (peftkern.LoraConfig, peftkern.PromptTuningConfig, peftkern.PrefixTuningConfig):
        needed = {} if kind is peftkern.LoraConfig else {"num_virtual_tokens": 3}
        model = peftkern.get_peft_model(make("llama"), kind(task_type="CAUSAL_LM", **needed))
        model.save_pretrained(folder / "in")
        path = folder / "in" / "adapter_config.json"
        values = json.loads(path.read_text())
        hints = {f.name: str(f.type) for f in dataclasses.fields(kind)}
        for key in values:
            if "str" in hints.get(key, "") and "Type" not in hints[key] and values[key] is None:
                values[key] = OUT
        assert OUT in values.values()
        path.write_text(json.dumps(values))
        try:
            loaded = peftkern.PeftModel.from_pretrained(make("llama"), folder / "in")
            loaded.save_pretrained(folder / "in")
        except (ValueError, NotImplementedError) as exc:
            assert OUT in str(exc)
    assert all(name.startswith("deep/er/in/") for name in everything_below(tmp_path))
