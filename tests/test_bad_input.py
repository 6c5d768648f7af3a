"""Damaged files and wrong arguments: one error that names the cause, and nothing is changed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from tests.tiny import assert_same, fill, first, inputs, make, pair, snapshot

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good adapter for the tiny Llama: (its folder, its logits)."""
    folder = tmp_path_factory.mktemp("adapter")
    ours, _ = pair("llama", modules_to_save=["norm"])
    ours.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "adapter")


class Code:
    """Unpickling this runs code, which leaves a file behind."""

    marker = "executed"

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def edit_config(**values):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        config.update(values)
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return damage


def truncate(name, keep):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def write(name, data, remove=None):
    def damage(folder):
        (folder / name).write_bytes(data)
        if remove:
            os.remove(folder / remove)

    return damage


def write_pickle(name, value, remove=WEIGHTS, plain=False):
    def damage(folder):
        if remove:
            os.remove(folder / remove)
        if plain:
            (folder / name).write_bytes(pickle.dumps(value))
        else:
            torch.save(value, folder / name)

    return damage


def put(key, make_value):
    return edit_tensors(lambda t: t.__setitem__(key, make_value(t.get(key))))


def _with(value):
    def change(tensor):
        tensor[1, 2] = value
        return tensor

    return change


BIN = "adapter_model.bin"
# name: (what is done to the folder, the error, what it says: the file, and the key or the field)
DAMAGE = {
    "half_a_file": (truncate(WEIGHTS, 0.5), ValueError, [WEIGHTS]),
    "last_bytes_missing": (truncate(WEIGHTS, 0.999), ValueError, [WEIGHTS]),
    "a_piece_of_the_header": (truncate(WEIGHTS, 0.05), ValueError, [WEIGHTS]),
    "empty_file": (truncate(WEIGHTS, 0), ValueError, [WEIGHTS]),
    "text_for_weights": (write(WEIGHTS, b"<html>404 not found</html>"), ValueError, [WEIGHTS]),
    "lfs_pointer": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        ValueError,
        [WEIGHTS],
    ),
    "code_in_bin": (write_pickle(BIN, {KEY: Code()}), ValueError, [BIN]),
    "code_in_plain_pickle": (write_pickle(BIN, {KEY: Code()}, plain=True), ValueError, [BIN]),
    "pickle_named_safetensors": (
        write_pickle(WEIGHTS, {KEY: Code()}, remove=None),
        ValueError,
        [WEIGHTS],
    ),
    "plain_pickle_named_safetensors": (
        write_pickle(WEIGHTS, Code(), remove=None, plain=True),
        ValueError,
        [WEIGHTS],
    ),
    "truncated_bin": (write(BIN, b"PK\x03\x04 not much of a zip", WEIGHTS), ValueError, [BIN]),
    "a_list_in_bin": (write_pickle(BIN, [torch.ones(2)]), ValueError, [BIN, "list"]),
    "a_number_in_bin": (write_pickle(BIN, {KEY: 3.5}), ValueError, [BIN, KEY, "float"]),
    "no_weights": (lambda f: os.remove(f / WEIGHTS), ValueError, [WEIGHTS, BIN]),
    "nan": (put(KEY, _with(float("nan"))), ValueError, [WEIGHTS, KEY, "NaN"]),
    "inf": (put(KEY, _with(float("-inf"))), ValueError, [WEIGHTS, KEY]),
    "nan_in_a_trained_module": (
        put("base_model.model.model.norm.weight", lambda t: t * float("nan")),
        ValueError,
        [WEIGHTS, "norm.weight"],
    ),
    "missing_key": (edit_tensors(lambda t: t.pop(KEY)), ValueError, ["adapter", KEY]),
    "missing_trained_module": (
        edit_tensors(lambda t: t.pop("base_model.model.model.norm.weight")),
        ValueError,
        ["norm.weight"],
    ),
    "no_keys": (edit_tensors(lambda t: t.clear()), ValueError, ["missing", "lora_A"]),
    "extra_key": (
        put("base_model.model.extra.lora_A.weight", lambda _: torch.ones(1)),
        ValueError,
        ["extra.lora_A.weight"],
    ),
    "other_names": (
        edit_tensors(
            lambda t: t.update({k.replace("layers", "blocks"): t.pop(k) for k in list(t)})
        ),
        ValueError,
        ["missing", "blocks"],
    ),
    "other_rank": (
        put(KEY, lambda t: t[:, :2].contiguous()),
        RuntimeError,
        [KEY, "(8, 2)", "(8, 4)"],
    ),
    "other_width": (put(KEY, lambda t: t[:-1].contiguous()), RuntimeError, [KEY]),
    "rank_of_the_config": (edit_config(r=5), RuntimeError, ["lora_A.weight"]),
    "no_config": (lambda f: os.remove(f / CONFIG), ValueError, [CONFIG]),
    "half_a_config": (truncate(CONFIG, 0.5), ValueError, [CONFIG, "JSON"]),
    "empty_config": (truncate(CONFIG, 0), ValueError, [CONFIG, "JSON"]),
    "a_list_for_config": (write(CONFIG, b"[1, 2]"), ValueError, [CONFIG, "list"]),
    "binary_config": (write(CONFIG, b"\xff\xfe\x00\x80"), ValueError, [CONFIG]),
    "deep_config": (write(CONFIG, b"[" * 100000), ValueError, [CONFIG]),
    "other_method": (edit_config(peft_type="IA3"), ValueError, [CONFIG, "IA3", "LORA"]),
    "no_method": (edit_config(peft_type="absent"), ValueError, [CONFIG, "peft_type"]),
    "weights_of_another_method": (
        edit_config(peft_type="PROMPT_TUNING", num_virtual_tokens=3),
        ValueError,
        ["adapter"],
    ),
    "unsupported_setting": (
        edit_config(megatron_config={"a": 1}),
        NotImplementedError,
        ["megatron_config"],
    ),
    "rank_zero": (edit_config(r=0), ValueError, [CONFIG, "`r`", "0"]),
    "rank_text": (edit_config(r="four"), ValueError, [CONFIG, "`r`", "four"]),
    "dropout_one": (edit_config(lora_dropout=1.0), ValueError, [CONFIG, "lora_dropout"]),
    "other_task": (edit_config(task_type="POETRY"), ValueError, [CONFIG, "POETRY"]),
    "targets_of_another_model": (edit_config(target_modules=["c_attn"]), ValueError, ["c_attn"]),
}


def attempt(call, error, says):
    """``call`` raises ``error``, in one message that holds everything in ``says``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as raised:
            call()
    missing = [words for words in says if words not in str(raised.value)]
    assert not missing, (missing, str(raised.value))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters_change_nothing(name, folder, monkeypatch):
    """The base model, or the model that had adapters, is as it was; and no code was run."""
    damage, error, says = DAMAGE[name]
    monkeypatch.chdir(folder.parent)
    damage(folder)
    files = {p: p.read_bytes() for p in folder.iterdir()}

    base = make("llama").train()
    base.lm_head.weight.requires_grad_(False)
    before = snapshot(base)
    attempt(lambda: peftkern.PeftModel.from_pretrained(base, folder), error, says)
    assert_same(base, before)
    assert not hasattr(base, "peft_config")

    model, _ = pair("llama", modules_to_save=["lm_head"])
    model.train()
    before, batch = snapshot(model), inputs("llama")
    logits = first(model(**batch)).detach()
    attempt(lambda: model.load_adapter(folder, "second"), error, says)
    assert_same(model, before)
    assert torch.equal(first(model(**batch)), logits)
    # it can be used as if nothing had been, that name included
    model.add_adapter("second", peftkern.LoraConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    model(**batch).loss.backward()
    assert not os.path.exists(Code.marker)
    assert {p: p.read_bytes() for p in folder.iterdir()} == files


@pytest.mark.parametrize("name", ["half_a_file", "missing_key", "extra_key", "other_rank", "nan"])
def test_damaged_weights_do_not_touch_the_adapter_they_were_for(name, folder):
    damage, error, says = DAMAGE[name]
    damage(folder)
    model, _ = pair("llama", modules_to_save=["norm"])
    fill(model, seed=4)
    before = snapshot(model)
    attempt(lambda: model.load_adapter(folder, "default"), error, says)
    assert_same(model, before)


def test_mismatched_sizes_can_be_left_out(folder):
    put(KEY, lambda t: t[:-1].contiguous())(folder)
    with pytest.warns(UserWarning, match="v_proj.lora_B"):
        model = peftkern.PeftModel.from_pretrained(
            make("llama"), folder, ignore_mismatched_sizes=True
        )
    state = peftkern.get_peft_model_state_dict(model)
    saved = load_file(folder / WEIGHTS)
    assert all(torch.equal(state[k], v) for k, v in saved.items() if k != KEY)
    assert not state[KEY].any()


def test_set_state_dict_checks_all_shapes_first():
    model, _ = pair("llama")
    before = snapshot(model)
    state = {k: v + 1 for k, v in peftkern.get_peft_model_state_dict(model).items()}
    state[KEY] = state[KEY][:, :1]
    with pytest.raises(RuntimeError, match="v_proj.lora_B"):
        peftkern.set_peft_model_state_dict(model, state)
    assert_same(model, before)


@pytest.mark.parametrize("name", ["a.b", "", None, 3, "a/b", "..", "a\\b"])
def test_adapter_names_that_cannot_be(name, saved):
    base = make("llama")
    before = snapshot(base)
    for call in (
        lambda: peftkern.get_peft_model(base, peftkern.LoraConfig(), name),
        lambda: peftkern.PeftModel.from_pretrained(base, saved, name),
        lambda: peftkern.inject_adapter_in_model(peftkern.LoraConfig(), base, name),
    ):
        with pytest.raises(ValueError, match="adapter_name"):
            call()
        assert_same(base, before)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig())
    before = snapshot(model)
    for call in (
        lambda: model.add_adapter(name, peftkern.LoraConfig()),
        lambda: model.load_adapter(saved, name),
    ):
        with pytest.raises(ValueError, match="adapter_name"):
            call()
        assert_same(model, before)


def test_adapter_names_that_exist_or_do_not():
    model, _ = pair("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'default' already exists"):
        model.add_adapter("default", peftkern.LoraConfig(r=2))
    for call in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="ghost"):
            call("ghost")
    with pytest.raises(ValueError, match="ghost"):
        model.eval()(**inputs("llama"), adapter_names=["default", "ghost", "__base__"])
    with pytest.raises(ValueError, match="PREFIX_TUNING|peft type"):
        model.add_adapter("other", peftkern.PrefixTuningConfig(num_virtual_tokens=2))
    model.train()
    before["training"] = snapshot(model)["training"]
    assert_same(model, before)


def test_only_one_adapter_may_train_biases():
    model, _ = pair("bert", "SEQ_CLS", bias="all")
    before = snapshot(model)
    with pytest.raises(ValueError, match="bias"):
        model.add_adapter("second", peftkern.LoraConfig(bias="lora_only", task_type="SEQ_CLS"))
    assert_same(model, before)


def test_folders_that_are_not_there():
    """A path is not a repository: it is said to be missing, and no hub is asked."""
    base = make("llama")
    before = snapshot(base)
    for where in ("./no/such/folder", "/no/such/folder"):
        with pytest.raises(ValueError, match=f"{CONFIG}.*{where}"):
            peftkern.PeftModel.from_pretrained(base, where)
        with pytest.raises(ValueError, match=CONFIG):
            peftkern.PeftConfig.from_pretrained(where)
    assert_same(base, before)


@pytest.mark.parametrize("config", [peft.LoraConfig(), {"peft_type": "LORA"}, None], ids=str)
def test_configurations_of_others_are_named(config):
    model = make("llama")
    before = snapshot(model)
    adapted = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig())
    for door in (
        lambda: peftkern.get_peft_model(model, config),
        lambda: peftkern.PeftModel(model, config),
        lambda: peftkern.inject_adapter_in_model(config, model),
        lambda: adapted.add_adapter("other", config),
    ):
        with pytest.raises(TypeError, match=f"peft_config.*{type(config).__name__}"):
            door()
    assert_same(model, before)
    assert list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("model", ["path/to/model", None, make], ids=["path", "None", "function"])
def test_models_that_are_no_modules_are_named(model, folder):
    """HF PEFT's error is of an attribute that a str has not."""
    for door in (
        lambda: peftkern.get_peft_model(model, peftkern.LoraConfig()),
        lambda: peftkern.get_peft_model(model, peftkern.PrefixTuningConfig(task_type="CAUSAL_LM")),
        lambda: peftkern.inject_adapter_in_model(peftkern.LoraConfig(), model),
        lambda: peftkern.PeftModel.from_pretrained(model, folder),
    ):
        with pytest.raises(TypeError, match="`model` must be a torch.nn.Module, got"):
            door()
