"""Configurations: PEFT's fields and defaults, files for both libraries, and refused values."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch

import peftkern
from peftkern import LoraConfig, PeftConfig, TaskType, get_peft_config, get_peft_model
from tests.tiny import assert_same, inputs, make, snapshot

CLASSES = ("LoraConfig", "PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig")

# The dicts in the documentation of PEFT's task classes, keys of old versions included.
DOCUMENTED = {
    "feature_extraction": {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    },
    "question_answering": {
        "peft_type": "LORA",
        "task_type": "QUESTION_ANS",
        "inference_mode": False,
        "r": 16,
        "target_modules": ["query", "value"],
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "fan_in_fan_out": False,
        "bias": "none",
    },
    "seq2seq": {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 8,
        "target_modules": ["q", "v"],
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "enable_lora": None,
        "bias": "none",
    },
    "causal_lm_prefix": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 1280,
        "num_transformer_submodules": 1,
        "num_attention_heads": 20,
        "num_layers": 36,
        "encoder_hidden_size": 1280,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    },
    "seq_cls_prefix": {
        "peft_type": "PREFIX_TUNING",
        "task_type": "SEQ_CLS",
        "inference_mode": False,
        "num_virtual_tokens": 20,
        "token_dim": 768,
        "num_transformer_submodules": 1,
        "num_attention_heads": 12,
        "num_layers": 12,
        "encoder_hidden_size": 768,
        "prefix_projection": False,
        "postprocess_past_key_value_function": None,
    },
}

# LoraConfig of PEFT 0.6.2, with values that differ from the defaults
OLD_JSON = {
    "alpha_pattern": {"q_proj": 4},
    "auto_mapping": None,
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": [1],
    "loftq_config": {},
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "modules_to_save": ["lm_head"],
    "peft_type": "LORA",
    "r": 16,
    "rank_pattern": {"v_proj": 2},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}

UNSUPPORTED = {
    "megatron_config": {"tensor_model_parallel_size": 1},
}


def default_of(field):
    """A field's default as a plain value; dataclasses inside it as dicts."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_peft_is_here_with_its_default(name):
    mine = {f.name: f for f in dataclasses.fields(getattr(peftkern, name))}
    for field in dataclasses.fields(getattr(peft, name)):
        assert field.name in mine, field.name
        if (
            field.init
            and field.default_factory is dataclasses.MISSING
            and field.default is dataclasses.MISSING
        ):
            continue
        assert default_of(mine[field.name]) == default_of(field), field.name
    kwargs = {"num_virtual_tokens": 4} if name != "LoraConfig" else {}
    here = getattr(peftkern, name)(**kwargs).to_dict()
    there = getattr(peft, name)(**kwargs).to_dict()
    assert here == there


def test_enums_have_pefts_values():
    assert {t.value for t in TaskType} == {t.value for t in peft.TaskType}
    for member in peftkern.PeftType:
        assert peft.PeftType(member.value) == member.value


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "r": 3,
            "lora_alpha": 1.5,
            "target_modules": ["b", "a"],
            "exclude_modules": ["c"],
            "bias": "all",
        },
        {
            "target_modules": r".*\.q",
            "use_rslora": True,
            "init_lora_weights": "gaussian",
            "lora_dropout": 0.5,
        },
        {
            "rank_pattern": {"a": 2},
            "alpha_pattern": {"b": 3.5},
            "modules_to_save": ["x"],
            "lora_bias": True,
        },
        {
            "target_modules": ["q"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "task_type": "SEQ_CLS",
        },
        {
            "revision": "main",
            "base_model_name_or_path": "a/b",
            "inference_mode": True,
            "fan_in_fan_out": True,
        },
    ],
    ids=range(6),
)
def test_json_written_by_each_is_read_by_the_other(tmp_path, settings):
    mine, theirs = peftkern.LoraConfig(**settings), peft.LoraConfig(**settings)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in ("mine", "theirs"):
            for cls in (peftkern.LoraConfig, peftkern.PeftConfig):
                read = cls.from_pretrained(tmp_path / folder)
                assert isinstance(read, peftkern.LoraConfig)
                assert read.to_dict() == mine.to_dict()
            read = peft.PeftConfig.from_pretrained(tmp_path / folder)
            assert read.to_dict() == theirs.to_dict()
    raw = [
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("mine", "theirs")
    ]
    for value in raw:  # sets have no order of their own
        for key in ("target_modules", "exclude_modules"):
            value[key] = sorted(value[key]) if isinstance(value[key], list) else value[key]
    assert raw[0] == raw[1]


@pytest.mark.parametrize("name", CLASSES)
def test_a_version_that_is_put_at_hf_pefts_address_is_written(name, monkeypatch):
    made = {"num_virtual_tokens": 3} if name != "LoraConfig" else {}
    before = getattr(peftkern, name)(**made)
    assert before.peft_version == peftkern.config.__version__ == peft.__version__
    monkeypatch.setattr("peftkern.config.__version__", "0.17.0")
    assert getattr(peftkern, name)(**made).peft_version == "0.17.0"


def test_json_of_peft_0_6_2(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(OLD_JSON))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_pretrained(tmp_path)
    for key, value in OLD_JSON.items():
        got = getattr(config, key)
        assert (sorted(got) if isinstance(got, set) else got) == value, key


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_dicts_are_read_without_a_word(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = get_peft_config(DOCUMENTED[name])
    assert type(config).__name__ == (
        "LoraConfig" if "lora_alpha" in DOCUMENTED[name] else "PrefixTuningConfig"
    )
    for key, value in DOCUMENTED[name].items():
        if hasattr(config, key):
            got = getattr(config, key)
            assert (sorted(got) if isinstance(got, set) else got) == value, key
        else:
            assert value is None


def test_documented_dict_trains(capsys):
    """PEFT's example for seq2seq, but for the size of its model."""
    model = get_peft_model(make("t5", "SEQ_2_SEQ_LM"), get_peft_config(DOCUMENTED["seq2seq"]))
    model.print_trainable_parameters()
    # 6 attentions x (q, v) x r (in + out) = 12 x 8 x (16 + 16)
    assert "trainable params: 3,072 ||" in capsys.readouterr().out
    model(**inputs("t5", "SEQ_2_SEQ_LM")).loss.backward()


def test_unknown_keys(tmp_path):
    """None says nothing; a value is something asked for that is not done, and is named."""
    known = {"peft_type": "LORA", "r": 4, "target_modules": ["q"]}
    extra = {"quantum_rank": 3, "harmless": None, "also_unknown": "x"}
    with pytest.warns(UserWarning, match=r"also_unknown.*quantum_rank") as seen:
        config = get_peft_config({**known, **extra})
    assert config.r == 4 and len(seen) == 1 and "harmless" not in str(seen[0].message)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**known, **extra}))
    with pytest.warns(UserWarning, match=r"quantum_rank.*adapter_config.json") as seen:
        assert PeftConfig.from_pretrained(tmp_path).r == 4
    assert len(seen) == 1
    file.write_text(json.dumps({**known, "harmless": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_settings_are_refused_and_nothing_is_touched(key):
    model = make("llama")
    before = snapshot(model)
    config = LoraConfig(task_type="CAUSAL_LM", **{key: UNSUPPORTED[key]})  # reading it is no error
    with pytest.raises(NotImplementedError, match=key):
        get_peft_model(model, config)
    with pytest.raises(NotImplementedError, match=key):
        peftkern.inject_adapter_in_model(config, model)
    assert_same(model, before)
    assert not hasattr(model, "peft_config")


def test_one_error_names_all_that_is_unsupported():
    names = UNSUPPORTED
    with pytest.raises(NotImplementedError) as error:
        get_peft_model(make("llama"), LoraConfig(**names))
    assert all(f"{name}=" in str(error.value) for name in names)
    model = get_peft_model(make("llama"), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="megatron_config="):
        model.add_adapter("second", LoraConfig(**names))
    assert_same(model, before)


def test_what_no_model_can_be_made_from_is_refused():
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="PeftConfig"):
        get_peft_model(model, PeftConfig())
    assert_same(model, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "`r`.*0"),
        ({"r": -4}, "`r`.*-4"),
        ({"r": 2.5}, "`r`.*2.5"),
        ({"r": True}, "`r`"),
        ({"lora_dropout": 1.0}, "lora_dropout.*1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout.*-0.1"),
        ({"lora_dropout": float("nan")}, "lora_dropout.*nan"),
        ({"lora_dropout": "0.1"}, "lora_dropout"),
        ({"lora_alpha": "16"}, "lora_alpha.*16"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.*q.*0"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern.*q"),
        (
            {"target_modules": "q", "layers_to_transform": [0]},
            "layers_to_transform.*target_modules",
        ),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern.*target_modules"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_to_transform"),
        ({"task_type": "POETRY"}, "POETRY.*CAUSAL_LM"),
    ],
)
def test_bad_values_name_the_field(settings, says):
    with pytest.raises(ValueError, match=says):
        LoraConfig(**settings)


def test_dicts_without_a_method():
    with pytest.raises(ValueError, match="peft_type"):
        get_peft_config({"r": 4})
    with pytest.raises(ValueError, match=r"MAGIC.*LORA"):
        get_peft_config({"peft_type": "MAGIC"})
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3).r == 3


def test_names_of_targets_become_a_set_and_dtypes_stay():
    config = LoraConfig(target_modules=["q", "q", "v"], exclude_modules=("k",))
    assert config.target_modules == {"q", "v"} and config.exclude_modules == {"k"}
    assert LoraConfig(target_modules=["q"]) == LoraConfig(target_modules={"q"})
    assert (
        config.runtime_config.ephemeral_gpu_offload is False
        and "runtime_config" not in config.to_dict()
    )
    model = get_peft_model(
        make("llama", dtype=torch.float16), LoraConfig(r=2), autocast_adapter_dtype=False
    )
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float16}
