"""Forward parity: the same names, counts, logits, losses and generated tokens as HF PEFT."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import peftkern
from peftkern.tuners.lora import LoraLayer
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import CASES, fill, first, inputs, loss_of, make, pair

# every setting of LoRA that changes what is built, on a model where it means something
SETTINGS = {
    "rslora": ("llama", "CAUSAL_LM", {"use_rslora": True, "r": 3}),
    "rank_pattern": (
        "llama",
        "CAUSAL_LM",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {
                "q_proj": 2,
                r"layers\.1\.mlp\.down_proj": 7,
                "^model.layers.0.self_attn.k_proj": 5,
            },
            "alpha_pattern": {"k_proj": 5, "model.layers.1.self_attn.q_proj": 0.5},
        },
    ),
    "bias_all": ("gpt2", "SEQ_CLS", {"bias": "all"}),
    "bias_all_bert": ("bert", "SEQ_CLS", {"bias": "all"}),
    "bias_all_t5": ("t5", "SEQ_2_SEQ_LM", {"bias": "all"}),
    "bias_lora_only": ("bert", "TOKEN_CLS", {"bias": "lora_only"}),
    "bias_lora_only_gpt2": ("gpt2", "CAUSAL_LM", {"bias": "lora_only", "fan_in_fan_out": True}),
    "conv1d_all": (
        "gpt2",
        "CAUSAL_LM",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "lora_bias": ("llama", "CAUSAL_LM", {"lora_bias": True, "init_lora_weights": False}),
    "embedding": ("llama", "CAUSAL_LM", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_gpt2": ("gpt2", "CAUSAL_LM", {"target_modules": ["wte", "wpe", "c_attn"]}),
    "embedding_bert": ("bert", "SEQ_CLS", {"target_modules": ["word_embeddings", "query"]}),
    "embedding_scaled": ("gemma", "CAUSAL_LM", {"target_modules": ["embed_tokens", "v_proj"]}),
    "shared_embedding": ("t5", "SEQ_2_SEQ_LM", {"target_modules": ["shared", "q", "v"]}),
    "head": ("llama", "CAUSAL_LM", {"target_modules": ["lm_head", "v_proj"]}),
    "modules_to_save": ("llama", "CAUSAL_LM", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save_norm": ("bert", "SEQ_CLS", {"modules_to_save": ["LayerNorm"]}),
    "all_linear": ("llama", "CAUSAL_LM", {"target_modules": "all-linear"}),
    "all_linear_gpt2": (
        "gpt2",
        "SEQ_CLS",
        {"target_modules": "all-linear", "fan_in_fan_out": True},
    ),
    "all_linear_t5": ("t5", "SEQ_2_SEQ_LM", {"target_modules": "all-linear"}),
    "regex": ("qwen2", "CAUSAL_LM", {"target_modules": r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "layers": (
        "llama",
        "CAUSAL_LM",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ),
    "exclude": (
        "qwen2",
        "CAUSAL_LM",
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    ),
    "no_init": ("llama", "CAUSAL_LM", {"init_lora_weights": False}),
    "gaussian": ("llama", "CAUSAL_LM", {"init_lora_weights": "gaussian"}),
    "inference_mode": ("llama", "CAUSAL_LM", {"inference_mode": True}),
    "no_task": ("bert", None, {}),
    "half": ("llama", "CAUSAL_LM", {"dtype": torch.bfloat16}),
    "half_adapters": (
        "llama",
        "CAUSAL_LM",
        {"dtype": torch.float16, "autocast_adapter_dtype": False},
    ),
}


def assert_same_parameters(ours, theirs):
    """Names in the same order, shapes, dtypes and flags; all keys of the state; the counts."""

    def seen(model):
        return [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]

    assert seen(ours) == seen(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(("family", "task"), CASES)
def test_tasks_have_the_names_logits_and_losses_of_peft(family, task):
    ours, theirs = pair(family, task, torch.float64)
    assert type(ours).__name__ == type(theirs).__name__
    assert_same_parameters(ours, theirs)
    batch = inputs(family, task)
    for model in (ours, theirs):
        model.eval()
    a, b = ours(**batch), theirs(**batch)
    assert_same_number(first(a), first(b))
    assert_same_number(loss_of(a), loss_of(b))
    with torch.no_grad():  # another way through the operation
        assert_same_number(first(ours(**batch)), first(b))
        plain = first(ours.get_base_model()(**batch))
        assert_same_number(plain, first(b))  # the base model holds the adapters
        with ours.disable_adapter():
            without = first(ours(**batch))
    # the adapter does something, or the lines above compared two bare models
    assert (without - first(b)).abs().max() > 1e-3
    if task != "FEATURE_EXTRACTION" or family != "bert":
        untouched = make(family, task, torch.float64)
        assert_same_number(without, first(untouched(**batch)))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_tasks_in_float32_are_as_good_as_in_peft(family, task):
    """The outputs of several draws together."""
    ours, theirs = pair(family, task)
    exact, batch = copy.deepcopy(theirs).double(), inputs(family, task)
    found = [{}, {}, {}]
    with torch.no_grad():
        for seed in range(3):
            for outputs, model in zip(found, (ours, theirs, exact), strict=True):
                fill(model, seed=seed)
                outputs[seed] = first(model.eval()(**batch))
    assert_as_good_as_torch(*found)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_build_what_peft_builds(name):
    family, task, settings = SETTINGS[name]
    ours, theirs = pair(family, task, **{"dtype": torch.float64, **settings})
    assert_same_parameters(ours, theirs)
    assert set(ours.base_model.targeted_module_names) == set(
        theirs.base_model.targeted_module_names
    )
    built = [(n, m) for n, m in ours.named_modules() if isinstance(m, LoraLayer)]
    assert built
    for key, mine in built:
        other = theirs.get_submodule(key)
        for what in (
            "scaling",
            "r",
            "lora_alpha",
            "fan_in_fan_out",
            "in_features",
            "out_features",
            "active_adapters",
        ):
            assert getattr(mine, what) == getattr(other, what), (key, what)
    batch = inputs(family, task)
    if "dtype" in settings:
        three = ours, theirs, copy.deepcopy(theirs).double()
        assert_as_good_as_torch(*({name: first(m(**batch))} for m in three))
    else:
        assert_same_number(first(ours(**batch)), first(theirs(**batch)))


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_weights_are_pefts_for_the_same_seed(init):
    base = torch.nn.Sequential(torch.nn.Linear(256, 192), torch.nn.Embedding(50, 128))
    config = {"r": 16, "target_modules": ["0", "1"], "init_lora_weights": init}
    found = []
    for library in (peftkern, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**config))
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_print_trainable_parameters(capsys):
    ours, theirs = pair("bert", "SEQ_CLS")
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert mine == capsys.readouterr().out
    assert mine.startswith("trainable params: ")


def test_heads_of_the_tasks_train_in_full():
    for family, task, head in [
        ("bert", "SEQ_CLS", "classifier"),
        ("llama", "SEQ_CLS", "score"),
        ("bert", "TOKEN_CLS", "classifier"),
        ("bert", "QUESTION_ANS", "qa_outputs"),
    ]:
        ours, theirs = pair(family, task)
        name = f"base_model.model.{head}.modules_to_save.default.weight"
        assert dict(ours.named_parameters())[name].requires_grad
        assert ours.modules_to_save == theirs.modules_to_save
        assert (
            ours.peft_config["default"].modules_to_save
            == theirs.peft_config["default"].modules_to_save
        )


def test_positional_arguments_follow_the_task():
    for family, task in [("bert", "QUESTION_ANS"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")]:
        ours, theirs = pair(family, task, torch.float64)
        batch = inputs(family, task)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        args = (ids, mask, None, ids) if task == "SEQ_2_SEQ_LM" else (ids, mask)
        assert_same_number(first(ours(*args)), first(theirs(*args)))
        with pytest.raises(TypeError, match="positional"):
            ours(*([None] * 30))


def test_tuples_hidden_states_and_embeddings_as_inputs():
    ours, theirs = pair("llama", dtype=torch.float64)
    batch = inputs("llama")
    for more in ({"return_dict": False}, {"output_hidden_states": True}):
        a, b = ours(**batch, **more), theirs(**batch, **more)
        assert_same_number(a[0].double(), b[0].double())  # the loss is fp32
        assert_same_number(a[1], b[1])
    ids = batch.pop("input_ids")
    embedded = ours.get_input_embeddings()(ids).detach()
    assert_same_number(
        first(ours(inputs_embeds=embedded, **batch)),
        first(theirs(inputs_embeds=embedded, **batch)),
    )


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"use_cache": False},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation(family, how):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    ours, theirs = pair(family, task, torch.float64, lora_dropout=0.5)
    batch = inputs(family, task)
    out = []
    for model in (ours, theirs):
        model.eval()
        torch.manual_seed(7)
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        out.append(model.generate(**given, max_new_tokens=6, min_new_tokens=6, **how))
    assert torch.equal(*out)


@pytest.mark.parametrize("wide", [True, False], ids=["fp32_adapters", "bf16_adapters"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "qwen2", "gemma", "t5"])
def test_bf16_is_as_close_to_float64_as_peft(family, wide):
    """With float32 adapters peftkern rounds as often as HF PEFT, with bf16 ones less often.

    test_ops shows the latter for a layer. The rest of a model rounds by chance, so several draws
    are measured together.
    """
    task = {"bert": "TOKEN_CLS", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    ours, theirs = pair(family, task, dtype=torch.bfloat16, autocast_adapter_dtype=wide)
    batch, found = inputs(family, task, batch=6, length=12), [{}, {}, {}]
    with torch.no_grad():
        for seed in range(6):
            for model in (ours, theirs):
                fill(model, seed=seed)
            exact = copy.deepcopy(theirs).double()
            for outputs, model in zip(found, (ours, theirs, exact), strict=True):
                outputs[seed] = first(model(**batch))
    assert_as_good_as_torch(*found)
