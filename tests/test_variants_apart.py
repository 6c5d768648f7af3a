"""Variants of LoRA are separate: each has its own file and runs only when a configuration asks.

A variant can also be defined outside of the package.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import peftkern
from peftkern.tuners.lora import variant as variants
from tests.closeness import assert_same_number, differ
from tests.tiny import assert_same, fill, first, make, snapshot

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.arange(3, 17).view(2, 7)
ASIDE = (
    "kasa bdlora monteclora velora alora dora training_variants replication fused_experts".split()
)


def files_called(call):
    """(what the call returns, the package's files of which it ran a function)."""
    files = set()

    def note(frame, event, arg):
        if event == "call":
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        found = call()
    finally:
        sys.setprofile(before)
    package = str(Path(peftkern.__file__).parent)
    return found, {Path(name).stem for name in files if name.startswith(package)}


def test_plain_lora_calls_no_variant(tmp_path):
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    base = make("llama")
    model, made = files_called(lambda: peftkern.get_peft_model(base, config))
    batch = {"input_ids": IDS, "labels": IDS}
    _, trained = files_called(lambda: model.train()(**batch).loss.backward())
    _, called = files_called(lambda: model.eval()(input_ids=IDS))
    _, generated = files_called(lambda: model.generate(input_ids=IDS, max_new_tokens=2))
    _, saved = files_called(lambda: model.save_pretrained(tmp_path))
    _, loaded = files_called(lambda: peftkern.PeftModel.from_pretrained(make("llama"), tmp_path))
    _, merged = files_called(lambda: model.merge_and_unload())
    assert "linear" in made & trained & called & generated and "saving" in saved
    for found in (made, trained, called, generated, saved, merged):
        assert found.isdisjoint(ASIDE), found
    # a file of an older transformers may hold experts one by one
    assert loaded.isdisjoint(set(ASIDE) - {"fused_experts"}), loaded


def test_a_variant_that_is_asked_for_is_seen_to_be_called():
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", r=4, kasa_config={})
    model, made = files_called(lambda: peftkern.get_peft_model(make("llama"), config))
    _, called = files_called(lambda: model(input_ids=IDS))
    assert "kasa" in made & called
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[4])
    model = peftkern.get_peft_model(make("llama"), config)
    assert "alora" in files_called(lambda: model(input_ids=IDS))[1]
    config = peftkern.LoraConfig(task_type="CAUSAL_LM", layer_replication=[[0, 2], [1, 2]])
    _, made = files_called(lambda: peftkern.get_peft_model(make("llama"), config))
    assert "replication" in made


# {words of a variant: its file}
WORDS = {
    "kasa|lora_diag": "kasa",
    "bdlora|blockdiagonal": "bdlora",
    "velora": "velora",
    "monteclora": "monteclora",
    "(?<!q)alora": "alora",
}
# HF PEFT's addresses, and those of the package, where names are listed
LISTS = {"__init__.py", "tuners/__init__.py", "tuners/lora/__init__.py", "tuners/lora/config.py"}
LISTS |= {"tuners/lora/variants.py", "helpers.py", "peft_model.py"}
# which adapters servers read, and what is shown of a saved one, by their settings
LISTS |= {"checkpoint/serving.py", "checkpoint/inspecting.py"}
LISTS |= {"utils/private_names.py"}  # whose register says for whom a name is
OTHERS = {
    # a warning of a setting beside a task type, which both stand in the configuration
    "(?<!q)alora": {"configs/lora_checks.py"},
}


@pytest.mark.parametrize("words", WORDS)
def test_a_variant_stands_in_three_files(words):
    found = set()
    for path in sorted((ROOT / "peftkern").rglob("*.py")):
        name = str(path.relative_to(ROOT / "peftkern"))
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.S)
        if re.search(words, code, re.I) and name not in LISTS:
            found.add(name)
    own = {"configs/lora.py", "tuners/lora/variant_registry.py"}
    own |= {f"tuners/lora/{WORDS[words]}.py"}
    assert found == own | OTHERS.get(words, set())


# -------------------------------------------------------------------- one from outside


@pytest.fixture
def outside(monkeypatch):
    """The names that the example of docs/extending.md defines.

    Its variant is removed from the tables afterwards.
    """
    tables = {kind: dict(table) for kind, table in variants.TABLES.items()}
    settings = dict(variants.SETTINGS)
    text = (ROOT / "docs" / "extending.md").read_text()
    [code] = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "LoraVariant" in c]
    module = types.ModuleType("outside")
    monkeypatch.setitem(sys.modules, "outside", module)  # where dataclasses look
    exec(compile(code, "docs/extending.md", "exec", dont_inherit=True), module.__dict__)
    yield module.__dict__
    for kind, table in tables.items():
        variants.TABLES[kind].clear()
        variants.TABLES[kind].update(table)
    variants.SETTINGS.clear()
    variants.SETTINGS.update(settings)


def out(model, **call):
    with torch.no_grad():
        return first(model.eval()(input_ids=IDS, **call))


def test_a_variant_from_outside(outside, tmp_path):
    base = make("llama", dtype=torch.float64)
    model = peftkern.get_peft_model(copy.deepcopy(base), outside["config"])
    assert {p for p in outside["config"].to_dict()} >= {"gated"}
    fill(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    gate = layer.lora_gate["default"]
    want = out(model)
    assert differ(want, out(base))
    [reason] = {row.reason for row in peftkern.explain(model)}
    assert reason.startswith("gated LoRA: the base layer")
    # it trains
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert gate.grad.abs().item() > 0
    # it is saved and loaded, with its options
    model.save_pretrained(tmp_path)
    config = outside["GatedConfig"].from_pretrained(tmp_path)
    assert type(config) is outside["GatedConfig"]
    assert config.gated == outside["GatedOptions"](0.25)
    for low in (False, True):
        again = peftkern.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, config=config, low_cpu_mem_usage=low
        )
        assert_same_number(out(again), want)
    # beside another adapter, by rows
    plain = peftkern.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    again.add_adapter("plain", plain)
    rows = out(again, adapter_names=["default", "plain"])
    assert_same_number(rows[0], want[0])
    again.set_adapter("plain")
    assert_same_number(rows[1], out(again)[1])
    # it merges, and goes
    assert_same_number(out(copy.deepcopy(model).merge_and_unload()), want)
    model.merge_adapter()
    assert_same_number(out(model), want)
    model.unmerge_adapter()
    assert_same_number(out(model.unload()), out(base))


def test_a_variant_from_outside_refuses(outside):
    model = make("llama")
    before = snapshot(model)
    for settings, said in (
        ({"gated": {"start": 0.0}}, "`start` of `model.layers.0.self_attn.q_proj` must not be 0"),
        ({"gated": {}, "use_dora": True}, r"variant combination: \('gated', 'use_dora'\)"),
        ({"gated": {}, "target_modules": ["embed_tokens"]}, r"variant combination: \('gated',\)"),
    ):
        with pytest.raises(ValueError, match=said):
            config = outside["GatedConfig"](**{"target_modules": ["q_proj"], **settings})
            peftkern.get_peft_model(model, config)
        assert_same(model, before)
    with pytest.raises(TypeError, match="must be a `GatedOptions`, a dict, or None"):
        outside["GatedConfig"](gated=3)
    # plain LoRA knows nothing of it
    peftkern.get_peft_model(model, peftkern.LoraConfig())


def test_a_setting_asks_for_one_class(outside):
    def define(name):
        body = {"__module__": "outside", "__qualname__": name, "name": name}
        return type(variants.LoraVariant)(
            name, (variants.LoraVariant,), body, setting="gated", layers=("linear",)
        )

    with pytest.raises(ValueError, match="`gated` asks for GatedLinear on 'linear' layers already"):
        define("Another")
    new = define("GatedLinear")  # as when a cell is run again
    assert variants.table_of("linear")[("gated",)] is variants.SETTINGS["gated"] is new


def test_what_another_owns_is_not_taken() -> None:
    from peftkern.configs.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
    from peftkern.tuners.lora.variant import CALL_KWARGS, LoraVariant
    from peftkern.utils.peft_types import PeftType

    owner = CALL_KWARGS["alora_offsets"]
    with pytest.raises(ValueError, match=f"alora_offsets.*{owner.__name__}"):

        class Offsets(LoraVariant, setting="mine", layers=()):
            call_kwargs = ("alora_offsets",)

    for name in ("set_adapter", "forward"):
        with pytest.raises(ValueError, match=name):
            type(
                "Methods",
                (LoraVariant,),
                {"model_methods": {name: print}},
                setting="mine",
            )
    with pytest.raises(ValueError, match="LoraConfig is the configuration of LORA"):

        class Mine(PeftConfig, method=PeftType.LORA):
            pass

    assert CALL_KWARGS["alora_offsets"] is owner
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peftkern.LoraConfig


def test_keywords_of_a_variant_that_comes_later_are_the_models(monkeypatch) -> None:
    model = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setitem(variants.CALL_KWARGS, "later", variants.CALL_KWARGS["alora_offsets"])
    assert model.special_peft_forward_args == {"adapter_names", "alora_offsets", "later"}
