"""Tied embeddings (``ensure_weight_tying``) and stacked layers (``layer_replication``).

Both are compared with HF PEFT.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.utils.other import _get_module_names_tied_with_embedding
from tests.closeness import assert_same_number
from tests.tiny import assert_same, fill, gradients, inputs, make, pair, snapshot

BATCH = {k: v for k, v in inputs("gemma").items()}


def logits(model: Any, family: str = "gemma") -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(family)).logits


def wide(family: str = "gemma", task: str = "CAUSAL_LM") -> Any:
    return make(family, task, torch.float64)


def both(family: str = "gemma", **settings: Any) -> tuple[Any, Any]:
    return pair(family, dtype=torch.float64, ensure_weight_tying=True, **settings)


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "pattern": {"target_modules": ".*lm_head$"},
    "in_full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "in_full_both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("case", TIED)
def test_tied_modules_have_one_adapter(case, tmp_path) -> None:
    ours, theirs = both(**TIED[case])
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained
    got, want = ours.peft_config["default"], theirs.peft_config["default"]
    assert got.target_modules == want.target_modules
    assert got.modules_to_save == want.modules_to_save
    assert_shared(ours, "modules_to_save" in TIED[case])
    assert_same_number(gradients(ours, BATCH), gradients(theirs, BATCH))

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(wide(), tmp_path / "ours")
    here = peftkern.PeftModel.from_pretrained(wide(), tmp_path / "theirs")
    light = peftkern.PeftModel.from_pretrained(wide(), tmp_path / "theirs", low_cpu_mem_usage=True)
    for model in (here, there, light):
        assert_same_number(logits(model), logits(theirs))
    assert_shared(light, "modules_to_save" in TIED[case])


def assert_shared(model: Any, in_full: bool) -> None:
    embed, head = model.get_input_embeddings(), model.base_model.model.lm_head
    if in_full:
        assert embed.modules_to_save["default"].weight is head.modules_to_save["default"].weight
        return
    A, B = embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
    assert head.lora_A["default"].weight.data_ptr() == B.data_ptr()
    assert head.lora_B["default"].weight.data_ptr() == A.data_ptr()


def test_a_tied_adapter_stays_tied() -> None:
    def config() -> Any:
        return peftkern.LoraConfig(
            target_modules=["lm_head"], ensure_weight_tying=True, init_lora_weights=False
        )

    model = peftkern.get_peft_model(wide(), config())
    params = list(model.parameters())
    copied = copy.deepcopy(model)
    assert_shared(copied, False)
    assert torch.equal(logits(copied), logits(model))
    assert_shared(copied.to(torch.float32), False)
    assert_shared(pickle.loads(pickle.dumps(model)), False)
    assert [id(p) for p in model.float().parameters()] == [id(p) for p in params]
    assert_shared(model, False)
    model.double().add_adapter("b", config())
    model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "default_b", "cat")
    layer = model.base_model.model.lm_head
    want = 0.7 * layer.get_delta_weight("default") - 0.4 * layer.get_delta_weight("b")
    assert_same_number(layer.get_delta_weight("default_b"), want)
    embed = model.get_input_embeddings()
    A = embed.lora_embedding_A["default_b"]
    assert layer.lora_B["default_b"].weight.data_ptr() == A.data_ptr()


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_tied_adapter_starts_as_a_linear_layers(init) -> None:
    config = peftkern.LoraConfig(
        r=4, target_modules=["lm_head"], ensure_weight_tying=True, init_lora_weights=init
    )
    ours = peftkern.get_peft_model(wide(), config)
    A = ours.base_model.model.lm_head.lora_A["default"].weight
    B = ours.base_model.model.lm_head.lora_B["default"].weight
    assert A.any() and bool(B.any()) is (init is False)
    if init is True:
        assert A.abs().max() <= A.shape[1] ** -0.5
    if init is not False:
        assert_same_number(logits(ours), logits(wide()))


@pytest.mark.parametrize(
    "family, settings, says",
    [
        ("gemma", {"target_modules": ["lm_head"]}, "`ensure_weight_tying` is not set to True"),
        (
            "gemma",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "`ensure_weight_tying` is not set to True",
        ),
        (
            "llama",
            {"target_modules": ["lm_head"], "ensure_weight_tying": True},
            "no tied modules were found in the model",
        ),
        (
            "gemma",
            {"target_modules": ["q_proj"], "ensure_weight_tying": True},
            "no tied modules are added in either",
        ),
        ("gemma", {"target_modules": ["q_proj"]}, None),
        ("llama", {"target_modules": ["lm_head"]}, None),
    ],
)
def test_warnings_about_tied_weights_are_hf_pefts(family, settings, says) -> None:
    for lib in (peftkern, peft):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            lib.get_peft_model(make(family), lib.LoraConfig(**settings))
        found = [str(w.message) for w in seen if "tied" in str(w.message)]
        assert [says in text for text in found] == [True] if says else not found, (lib, found)


@pytest.mark.parametrize("family, task", [("gemma", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_names_of_tied_modules_with_and_without_wrappers(family, task) -> None:
    theirs = peft.utils.other._get_module_names_tied_with_embedding
    model = make(family, task)
    names = _get_module_names_tied_with_embedding(model)
    assert names and names == theirs(model)
    config = peftkern.LoraConfig(trainable_token_indices=[3])
    ours = peftkern.get_peft_model(model, config)
    names = _get_module_names_tied_with_embedding(ours)
    assert names == [f"{n}.token_adapter.base_layer" for n in theirs(make(family, task))]
    assert ours.base_model._get_module_names_tied_with_embedding() == names


def test_an_embedding_without_an_adapter_cannot_be_shared() -> None:
    model = make("gemma")
    before = snapshot(model)
    config = peftkern.LoraConfig(
        target_modules=["lm_head", "q_proj"],
        exclude_modules=["embed_tokens"],
        ensure_weight_tying=True,
    )
    with pytest.raises(ValueError, match="the input embedding gets no adapter"):
        peftkern.get_peft_model(model, config)
    assert_same(model, before)


# -------------------------------------------------------------------- stacked layers

MAP = [[0, 1], [0, 2], [1, 2]]


def _layers(model: Any, family: str) -> nn.ModuleList:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.bert.encoder.layer if family == "bert" else base.model.layers


@pytest.mark.parametrize("family, task", [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_stacked_layers_share_weights_and_have_adapters_of_their_own(
    family, task, tmp_path
) -> None:
    ours, theirs = pair(family, task, torch.float64, layer_replication=MAP, bias="none")
    batch = inputs(family, task)
    assert_same_number(gradients(ours, batch), gradients(theirs, batch))
    assert len(_layers(ours, family)) == ours.config.num_hidden_layers == 4
    base = wide(family, task)
    frozen = [p for n, p in ours.named_parameters() if "lora_" not in n and "modules_to" not in n]
    shared = [p for n, p in base.named_parameters() if "classifier" not in n]
    assert sum(p.numel() for p in frozen) <= sum(p.numel() for p in base.parameters())
    assert len({id(p) for p in frozen}) >= len(shared)

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(wide(family, task), tmp_path / "ours")
    here = peftkern.PeftModel.from_pretrained(base, tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(**batch).logits
        for model in (here, there):
            assert_same_number(model(**batch).logits, want)
        # the cache counts the layers as well
        if family == "llama":
            ids = batch["input_ids"][:1, :4]
            got = here.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(got, there.generate(input_ids=ids, max_new_tokens=4))
    with pytest.raises(ValueError, match="Cannot merge LORA layers when base model layers are rep"):
        here.merge_adapter()

    # further adapters find the layers stacked
    config = peftkern.LoraConfig(task_type=task, layer_replication=MAP, init_lora_weights=False)
    here.add_adapter("other", config)
    assert len(_layers(here, family)) == 4
    here.load_adapter(tmp_path / "theirs", adapter_name="again")
    here.set_adapter("again")
    with torch.no_grad():
        assert_same_number(here(**batch).logits, want)


def test_a_stacked_model_is_pickled_and_copied() -> None:
    model = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(layer_replication=MAP))
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        other.base_model.withdraw("default")
        assert len(_layers(other, "llama")) == other.config.num_hidden_layers == 2
        assert len(_layers(model, "llama")) == model.config.num_hidden_layers == 4


def test_stacking_costs_no_second_copy_of_a_weight(monkeypatch) -> None:
    copied = []
    real = nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self) or real(self, memo)
    )
    model = make("llama")
    copied.clear()
    peftkern.get_peft_model(model, peftkern.LoraConfig(layer_replication=MAP))
    assert not copied


def test_kinds_of_attention_are_stacked_with_the_layers() -> None:
    base = make("qwen2")
    base.config.layer_types = ["full_attention", "sliding_attention"]
    config = peftkern.LoraConfig(layer_replication=MAP)
    ours = peftkern.get_peft_model(base, config)
    full, sliding = "full_attention", "sliding_attention"
    assert ours.config.layer_types == [full, full, sliding, sliding]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"layer_replication": [[0, 3]]}, r"ranges \[start, end\) of the model's 2 layers"),
        ({"layer_replication": [[1, 1]]}, r"ranges \[start, end\)"),
        ({"layer_replication": MAP, "target_modules": ["no"]}, "not found in the base model"),
    ],
)
def test_a_refused_stack_leaves_the_model_as_it_was(settings, says) -> None:
    model = make("llama")
    before, count = snapshot(model), model.config.num_hidden_layers
    with pytest.raises(ValueError, match=says):
        peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
    assert_same(model, before)
    assert model.config.num_hidden_layers == count == len(model.model.layers)


def test_other_refusals(tmp_path) -> None:
    with pytest.raises(ValueError, match="Could not locate the layers attribute"):
        config = peftkern.LoraConfig(target_modules=["q"], layer_replication=MAP)
        peftkern.get_peft_model(make("t5", "SEQ_2_SEQ_LM"), config)
    ours = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig())
    with pytest.raises(ValueError, match="does not fit the adapters that the model has"):
        ours.add_adapter("other", peftkern.LoraConfig(layer_replication=MAP))
    assert list(ours.peft_config) == ["default"] and len(ours.base_model.model.model.layers) == 2
    # an adapter that cannot be loaded leaves no layers behind
    stacked = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(layer_replication=MAP))
    stacked.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(
        _without_last(tmp_path / "adapter_model.safetensors")
    )
    base = make("llama")
    before = snapshot(base)
    with pytest.raises(ValueError, match="missing keys"):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)
    assert base.config.num_hidden_layers == 2


def _without_last(file: Any) -> bytes:
    from safetensors.torch import load_file, save

    weights = load_file(file)
    del weights[sorted(weights)[-1]]
    return save(weights)


def test_modules_to_save_keeps_a_tied_head_apart_unless_asked(tmp_path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    ours, theirs = pair("gemma", dtype=torch.float64, **copy.deepcopy(settings))
    for model in (ours, theirs):
        fill(model)
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert_same_number(logits(ours), logits(theirs))
    with pytest.warns(UserWarning, match="Setting `tie_word_embeddings=False`"):
        merged = ours.merge_and_unload()
    assert_same_number(logits(merged), logits(theirs))
