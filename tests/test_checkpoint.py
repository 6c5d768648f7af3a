"""Checkpoints: the exact tensors go from peftkern to HF PEFT and back, whatever was trained."""

from __future__ import annotations

import copy
import json
import os

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peftkern
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_parity import SETTINGS
from tests.tiny import CASES, assert_same, fill, first, inputs, make, pair, snapshot

DOUBLE = {"dtype": torch.float64}
WEIGHTS = "adapter_model.safetensors"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")
    for said in (
        "`lora_bias=True` was passed but the targeted layer of type Linear has no bias",
        "Model has `tie_word_embeddings=True` and a tied layer",
        "Setting `save_embedding_layers` to `True`",
        "`shared` is adapted, but the model never calls it",
        r"Adapter 'default'. 4 LoRA tensor\(s\) have invalid shape. .*lora_B.bias",  # HF PEFT's
    )
]


def perturb(*models):
    """Random numbers in all that trains, so that a file which left a part out shows."""
    for model in models:
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(
                        0.1 * torch.randn(parameter.shape, generator=g).to(parameter.dtype)
                    )


def both_directions(tmp_path, family, task, **settings):
    settings = {**DOUBLE, **settings}
    dtype, double = settings["dtype"], settings["dtype"] is torch.float64
    ours, theirs = pair(family, task, **settings)
    perturb(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved, expected = (
        load_file(tmp_path / "ours" / WEIGHTS),
        load_file(tmp_path / "theirs" / WEIGHTS),
    )
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(saved[key], value) and saved[key].dtype == value.dtype, key
    batch = inputs(family, task)
    how = {"autocast_adapter_dtype": settings.get("autocast_adapter_dtype", True)}
    logits = first(theirs.eval()(**batch))
    exact = logits if double else first(copy.deepcopy(theirs).double()(**batch))
    for folder in ("ours", "theirs"):
        for library in (peftkern, peft):
            model = library.PeftModel.from_pretrained(
                make(family, task, dtype), tmp_path / folder, **how
            )
            assert not model.training and not any(
                p.requires_grad for n, p in model.named_parameters() if "lora_" in n
            )
            if double:
                assert_same_number(first(model(**batch)), logits)
            else:
                assert_as_good_as_torch(first(model(**batch)), logits, exact, average=True)
            if library is peftkern:
                model.save_pretrained(tmp_path / "again")
                again = load_file(tmp_path / "again" / WEIGHTS)
                assert (
                    all(torch.equal(again[k], v) for k, v in expected.items())
                    and again.keys() == expected.keys()
                )


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_task_in_both_directions(tmp_path, family, task):
    both_directions(tmp_path, family, task)


@pytest.mark.parametrize(
    "name", [n for n in SETTINGS if n not in ("no_init", "gaussian", "inference_mode")]
)
def test_every_setting_in_both_directions(tmp_path, name):
    family, task, settings = SETTINGS[name]
    both_directions(tmp_path, family, task, **settings)


def test_configs_in_the_folder_are_equal(tmp_path):
    for family, task in [("llama", "CAUSAL_LM"), ("bert", None)]:
        read = []
        for name, model in zip(("ours", "theirs"), pair(family, task), strict=True):
            model.save_pretrained(tmp_path / name)
            read.append(json.loads((tmp_path / name / "adapter_config.json").read_text()))
            read[-1]["target_modules"].sort()
            assert model.peft_config["default"].inference_mode is False  # only the file says True
        assert read[0] == read[1] and read[0]["inference_mode"] is True


def test_the_file_is_plain_safetensors(tmp_path):
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert all(os.stat(tmp_path / n).st_mode & 0o044 == 0o044 for n in os.listdir(tmp_path))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()


def test_other_adapters_go_to_folders_of_their_names(tmp_path):
    both = pair("llama", **DOUBLE)
    for library, model in zip((peftkern, peft), both, strict=True):
        model.add_adapter(
            "second", library.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
        )
        fill(model)
        model.save_pretrained(tmp_path / library.__name__)
        model.save_pretrained(tmp_path / f"{library.__name__}_one", selected_adapters=["second"])
    for kind in ("", "_one"):
        seen = [
            {
                p.relative_to(tmp_path / f"{n}{kind}"): load_file(p)
                for p in (tmp_path / f"{n}{kind}").rglob(WEIGHTS)
            }
            for n in ("peftkern", "peft")
        ]
        assert seen[0].keys() == seen[1].keys() and len(seen[0]) == (1 if kind else 2)
        for path, tensors in seen[1].items():
            assert seen[0][path].keys() == tensors.keys()
            assert all(torch.equal(seen[0][path][k], v) for k, v in tensors.items())
    model = peft.PeftModel.from_pretrained(
        make("llama", **DOUBLE), tmp_path / "peftkern" / "second", "x"
    )
    ours = peftkern.PeftModel.from_pretrained(
        make("llama", **DOUBLE), tmp_path / "peft" / "second", "y"
    )
    batch = inputs("llama")
    both[0].set_adapter("second")
    expected = first(both[0].eval()(**batch))
    for loaded in (model, ours):
        assert_same_number(first(loaded(**batch)), expected)


@pytest.mark.parametrize("trainable", [True, False])
def test_is_trainable(tmp_path, trainable):
    both = pair("bert", "SEQ_CLS", bias="lora_only", lora_dropout=0.1)
    both[1].save_pretrained(tmp_path)
    ours, theirs = (
        library.PeftModel.from_pretrained(make("bert", "SEQ_CLS"), tmp_path, is_trainable=trainable)
        for library in (peftkern, peft)
    )
    flags = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert flags[0] == flags[1] and bool([n for n in flags[0] if "lora_" in n]) == trainable
    assert ours.training == theirs.training
    assert ours.peft_config["default"].inference_mode is (not trainable)
    assert type(ours) is peftkern.PeftModelForSequenceClassification


def test_config_given_by_the_caller(tmp_path):
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path)
    config = peftkern.PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 80
    model = peftkern.PeftModel.from_pretrained(make("llama"), tmp_path, config=config)
    assert next(m for n, m in model.named_modules() if n.endswith("q_proj")).scaling == {
        "default": 20.0
    }
    with pytest.raises(ValueError, match="PeftConfig.*dict"):
        peftkern.PeftModel.from_pretrained(make("llama"), tmp_path, config={"r": 4})


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_take_the_place_or_are_copied(tmp_path, low_cpu_mem_usage):
    ours, _ = pair("llama", modules_to_save=["norm"], **DOUBLE)
    perturb(ours)
    ours.save_pretrained(tmp_path)
    how = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = peftkern.PeftModel.from_pretrained(
        make("llama", **DOUBLE), tmp_path, is_trainable=True, **how
    )
    model.load_adapter(tmp_path, "second", **how)
    batch = inputs("llama")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not any(p.is_meta for p in model.parameters())
        assert_same_number(first(model.eval()(**batch)), first(ours.eval()(**batch)))
    model.train()(**batch).loss.backward()


def test_state_dict_functions_speak_with_pefts():
    ours, theirs = pair("bert", "SEQ_CLS", bias="all", **DOUBLE)
    perturb(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    missing, unexpected = peftkern.set_peft_model_state_dict(ours, state)
    expected = peft.set_peft_model_state_dict(theirs, state)
    assert not unexpected and set(missing) == set(expected.missing_keys)
    assert len(missing) == len(set(missing)) and not any("lora_" in key for key in missing)
    mine = peftkern.get_peft_model_state_dict(ours)
    assert mine.keys() == state.keys() and all(torch.equal(mine[k], v) for k, v in state.items())
    perturb(ours)
    peft.set_peft_model_state_dict(theirs, peftkern.get_peft_model_state_dict(ours))
    batch = inputs("bert", "SEQ_CLS")
    assert_same_number(first(theirs(**batch)), first(ours(**batch)))
    # names of the adapter are left out on disk, so it may be loaded under another
    ours.add_adapter("other", peftkern.LoraConfig(r=4, task_type="SEQ_CLS"))
    peftkern.set_peft_model_state_dict(
        ours, {k: v for k, v in state.items() if "lora_" in k}, "other"
    )
    again = peftkern.get_peft_model_state_dict(ours, adapter_name="other")
    assert all(torch.equal(v, state[k]) for k, v in again.items() if "lora_" in k)
    with pytest.raises(ValueError, match=r"nobody.*default"):
        peftkern.get_peft_model_state_dict(ours, adapter_name="nobody")


def test_save_from_a_state_dict_of_the_callers(tmp_path):
    """A given state dict is saved, as accelerate gathers it, not the tensors in this process."""
    ours, _ = pair("llama")
    gathered = {k: v.clone() + 1 for k, v in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, state_dict=gathered)
    for key, value in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(value, gathered[key.replace(".weight", ".default.weight")])


def test_compiled_models_save_the_same_keys(tmp_path):
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path / "plain")
    base = ours.get_base_model()
    base.model.layers[0] = torch.compile(base.model.layers[0], backend="eager")
    assert any("_orig_mod" in k for k in ours.state_dict())
    ours.save_pretrained(tmp_path / "compiled")
    a, b = (load_file(tmp_path / n / WEIGHTS) for n in ("plain", "compiled"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_adapter_named_like_a_module_loses_nothing(tmp_path):
    """HF PEFT drops tensors when the adapter has the name of a module."""
    model = peftkern.get_peft_model(
        make("llama", **DOUBLE), peftkern.LoraConfig(task_type="CAUSAL_LM"), "q_proj"
    )
    fill(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "q_proj" / WEIGHTS)) == 8
    again = peftkern.PeftModel.from_pretrained(make("llama", **DOUBLE), tmp_path / "q_proj")
    batch = inputs("llama")
    assert_same_number(first(again(**batch)), first(model(**batch)))


def test_a_torch_pickle_of_tensors_is_read(tmp_path):
    ours, _ = pair("llama", **DOUBLE)
    ours.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    os.remove(tmp_path / WEIGHTS)
    model = peftkern.PeftModel.from_pretrained(make("llama", **DOUBLE), tmp_path)
    assert_same_number(first(model(**inputs("llama"))), first(ours.eval()(**inputs("llama"))))


def test_embeddings_are_saved_when_asked_or_resized(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    import transformers

    for how, resized, expected in [
        (True, 0, 10),
        (False, 0, 8),
        ("auto", 0, 8),
        ("auto", 5, 10),
        (False, 5, 8),
    ]:
        counts = []
        for library in (peftkern, peft):
            base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            if resized:
                base.resize_token_embeddings(64 + resized, mean_resizing=False)
            model = library.get_peft_model(base, library.LoraConfig(r=2, task_type="CAUSAL_LM"))
            model.save_pretrained(tmp_path / "out", save_embedding_layers=how)
            counts.append(load_file(tmp_path / "out" / WEIGHTS).keys())
        assert counts[0] == counts[1] and len(counts[0]) == expected, (how, resized)


def test_key_mapping(tmp_path):
    ours, _ = pair("llama", **DOUBLE)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(
        {k.replace(".layers.", ".blocks."): v for k, v in tensors.items()}, tmp_path / WEIGHTS
    )
    model = peftkern.PeftModel.from_pretrained(
        make("llama", **DOUBLE), tmp_path, key_mapping={r"\.blocks\.": ".layers."}
    )
    assert_same_number(first(model(**inputs("llama"))), first(ours.eval()(**inputs("llama"))))


def test_new_weights_into_the_same_adapter(tmp_path):
    """load_adapter under a name that is there: other weights, nothing else changes."""
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path)
    saved = snapshot(ours.eval())
    fill(ours, seed=8)
    result = ours.load_adapter(tmp_path, "default", is_trainable=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(ours, saved)
