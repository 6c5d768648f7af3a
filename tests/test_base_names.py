"""The base model's name in an adapter's files: no path of this machine, and the GGUF file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import peftkern
from peftkern.files.base_names import (
    is_place,
    name_for_file,
    name_from_file,
    public_name,
    written_to_be_moved,
)
from tests.closeness import assert_same_number
from tests.gguf_files import write_llama
from tests.tiny import fill, inputs, make

DENSE = {"quantization_config": tf.GgufConfig(dequantize=True)} if hasattr(tf, "GgufConfig") else {}


@pytest.mark.parametrize(
    "name, folder, wanted",
    [
        ("owner/name", "/a/b", "owner/name"),
        ("models/llama", "/a/b", "models/llama"),
        ("/a/models/llama", "/a/runs/one", "../../models/llama"),
        ("/a/b/base", "/a/b", "./base"),
        ("/data/models/llama", "/home/me/out", "./llama"),
        ("/x/hub/models--owner--name/snapshots/0a1b", "/x/out", "owner/name"),
    ],
)
def test_names_in_files(name: str, folder: str, wanted: str) -> None:
    assert name_for_file(name, folder) == wanted
    assert not os.path.isabs(public_name(name)) and "snapshots" not in public_name(name)
    assert is_place(name) == is_place(wanted) or "snapshots" in name


def test_a_name_in_a_file_is_seen_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    found = name_from_file("../base", tmp_path / "adapter")
    assert Path(found).samefile(tmp_path / "base")
    for name in ("owner/name", "../elsewhere", "/a/b"):
        assert name_from_file(name, tmp_path / "adapter") == name


def test_a_file_that_will_be_moved_names_what_is_right_there(tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    with written_to_be_moved(tmp_path / "out" / "partial", tmp_path / "out"):
        found = name_for_file(base, tmp_path / "out" / "partial" / "step-1")
        assert found == "../../base"
        assert name_for_file(base, tmp_path / "other") == "../base"
    assert name_for_file(base, tmp_path / "out" / "partial" / "step-1") == "../../../base"


def adapted(folder: Path, **settings: Any) -> Any:
    """A model in float64 read from ``folder``/tiny.gguf, with an adapter that is not zero."""
    base = tf.AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file="tiny.gguf", dtype=torch.float64, **DENSE
    )
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type="CAUSAL_LM", **settings))
    fill(model)
    return model.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/tiny.gguf (among others) and the adapter that was trained on it."""
    root = tmp_path_factory.mktemp("place")
    (root / "base").mkdir()
    write_llama(make("llama"), root / "base" / "tiny.gguf")
    adapted(root / "base").save_pretrained(root / "adapter")
    (root / "base" / "other.gguf").write_bytes(b"")  # the file's name cannot be guessed any more
    return root


def texts(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.rglob("*") if p.suffix in (".md", ".json")}


def test_files_name_the_gguf_file_and_no_path_of_this_machine(place: Path) -> None:
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    assert config["auto_mapping"] == {"gguf_file": "tiny.gguf"}
    for name, text in texts(place / "adapter").items():
        assert str(place) not in text and "/tmp" not in text, name


def test_packed_weights_name_their_file(place: Path) -> None:
    base = make("llama")
    base.config.quantization_config = {"quant_method": "gguf", "gguf_file": "some.gguf"}
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(place / "packed")
    config = json.loads((place / "packed" / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"gguf_file": "some.gguf"}


def test_auto_loads_base_and_adapter_from_anywhere(place: Path, tmp_path: Path) -> None:
    model = peftkern.AutoPeftModelForCausalLM.from_pretrained(
        place / "adapter", dtype=torch.float64
    )
    base = tf.AutoModelForCausalLM.from_pretrained(
        str(place / "base"), gguf_file="tiny.gguf", dtype=torch.float64, **DENSE
    )
    wanted = peft.PeftModel.from_pretrained(base, str(place / "adapter")).eval()
    with torch.no_grad():
        logits = [m(**inputs("llama")).logits for m in (model, wanted)]
    assert_same_number(*logits)
    # saved again, from another folder, it still names its base
    model.save_pretrained(place / "again" / "deep")
    again = peftkern.AutoPeftModelForCausalLM.from_pretrained(
        place / "again" / "deep", dtype=torch.float64
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs("llama")).logits, logits[0])
    config = json.loads((place / "again" / "deep" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base"


@pytest.mark.parametrize("library", ["peftkern", "peft"])
def test_the_cards_own_code_runs(place: Path, library: str, monkeypatch: Any) -> None:
    text = (place / "adapter" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert 'gguf_file="tiny.gguf"' in code and "from peftkern import PeftModel" in code
    monkeypatch.chdir(place / "adapter")
    found: dict[str, Any] = {}
    exec(code.replace("from peftkern import", f"from {library} import"), found)
    assert type(found["model"]).__module__.split(".")[0] == library
    want = adapted(place / "base")
    with torch.no_grad():
        logits = [m.double()(**inputs("llama")).logits for m in (found["model"], want)]
    assert_same_number(*logits)


def test_hf_pefts_auto_class_is_told_the_file(place: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(place / "adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        ".", gguf_file="tiny.gguf", dtype=torch.float64
    )
    with torch.no_grad():
        logits = [m(**inputs("llama")).logits for m in (model, adapted(place / "base"))]
    assert_same_number(*logits)


def test_a_base_that_is_gone_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "moved" / name).write_bytes((place / "adapter" / name).read_bytes())
    with pytest.raises(ValueError, match=r"moved names the base model '\.\./base'.*there is none"):
        peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "moved")


@pytest.mark.parametrize("file", ["../../x.gguf", "/etc/x.gguf", "x.bin", 3])
def test_a_file_outside_the_base_is_refused(place: Path, tmp_path: Path, file: Any) -> None:
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    config["auto_mapping"] = {"gguf_file": file}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be a .gguf file inside the base model's folder"):
        peftkern.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_files_that_a_start_reads_are_named_so_too(tmp_path: Path) -> None:
    start = peftkern.CordaConfig(cache_file=str(tmp_path / "cache.pt"))
    config = peftkern.LoraConfig(
        init_lora_weights="corda", corda_config=start, target_modules=["q"]
    )
    config.save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
