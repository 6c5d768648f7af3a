"""The life of a PeftModel as in HF PEFT: adapters switched, mixed, disabled, deleted."""

from __future__ import annotations

import contextlib
import warnings

import peft
import pytest
import torch

import peftkern
from tests.closeness import assert_same_number, differ
from tests.tiny import assert_same, fill, first, gradients, inputs, loss_of, make, pair, snapshot

SECOND = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "use_rslora": True}
THIRD = {"r": 3, "target_modules": ["k_proj"], "init_lora_weights": False}


def three(family="llama", task="CAUSAL_LM", second=None, third=None, **settings):
    """(ours, theirs) with the adapters default, second and third."""
    models = pair(family, task, torch.float64, **settings)
    for library, model in zip((peftkern, peft), models, strict=True):
        for name, config in (("second", second or SECOND), ("third", third or THIRD)):
            model.add_adapter(name, library.LoraConfig(task_type=task, **config))
    for model in models:
        fill(model)
    return models


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


def assert_alike(ours, theirs, family="llama", task="CAUSAL_LM"):
    assert flags(ours) == flags(theirs)
    assert ours.active_adapters == theirs.active_adapters
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert sorted(ours.peft_config) == sorted(theirs.peft_config)
    batch = inputs(family, task)
    assert_same_number(first(ours(**batch)), first(theirs(**batch)))


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


STEPS = {
    "set": lambda m: m.set_adapter("second"),
    "set_twice": lambda m: (m.set_adapter("second"), m.set_adapter("default")),
    "set_inference": lambda m: m.set_adapter("third", inference_mode=True),
    "set_requires_grad": lambda m: m.set_requires_grad("second"),
    "unset_requires_grad": lambda m: m.set_requires_grad(["default"], requires_grad=False),
    "two_active": lambda m: m.base_model.set_adapter(["default", "second"]),
    "all_active": lambda m: m.base_model.set_adapter(["third", "default", "second"]),
    "delete_inactive": lambda m: m.delete_adapter("second"),
    "delete_both": lambda m: (m.delete_adapter("third"), m.delete_adapter("default")),
    "delete_then_set": lambda m: (m.delete_adapter("default"), m.set_adapter("third")),
    "disable_layers": lambda m: m.base_model.disable_adapter_layers(),
    "disable_enable": lambda m: (
        m.base_model.disable_adapter_layers(),
        m.base_model.enable_adapter_layers(),
    ),
    "disable_set_enable": lambda m: (
        m.base_model.disable_adapter_layers(),
        m.set_adapter("second"),
        m.base_model.enable_adapter_layers(),
    ),
    "train_eval": lambda m: (m.eval(), m.train(), m.eval()),
}


@pytest.mark.parametrize("step", STEPS)
def test_switching(step):
    ours, theirs = three()
    assert_alike(ours, theirs)
    with quiet():
        for model in (ours, theirs):
            STEPS[step](model)
    assert_alike(ours, theirs)
    if ours.get_nb_trainable_parameters()[0]:
        mine, other = (gradients(m, inputs("llama"))[1] for m in (ours, theirs))
        assert_same_number(mine, other)


@pytest.mark.parametrize("step", ["set", "set_inference", "delete_inactive", "disable_layers"])
def test_switching_trained_modules(step):
    """modules_to_save follow the adapter; one of the three has none of its own."""
    ours, theirs = three(
        "bert",
        "SEQ_CLS",
        second={"r": 2, "target_modules": ["key"], "modules_to_save": ["pooler"]},
        third={"r": 2},
    )
    g = torch.Generator().manual_seed(3)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if "modules_to_save" in name:
            p.data = q.data = torch.randn(p.shape, generator=g, dtype=p.dtype)
    with quiet():
        for model in (ours, theirs):
            STEPS[step](model)
    assert_alike(ours, theirs, "bert", "SEQ_CLS")


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_deleting_the_active_adapter_makes_the_first_one_left_active(family, task):
    """As HF PEFT where all adapters have the same targets."""
    ours, theirs = three(family, task, second={"r": 2}, third={"r": 3})
    for model in (ours, theirs):
        with quiet():
            model.delete_adapter("default")
    assert ours.active_adapters == ["second"] and ours.active_adapter == "second"
    assert_alike(ours, theirs, family, task)


def test_deleting_the_active_adapter_activates_the_same_one_in_every_layer():
    """HF PEFT lets each layer pick one, so that with other targets several mix in one model."""
    ours, _ = three()
    batch = inputs("llama")
    ours.set_adapter("second")
    expected = first(ours.eval()(**batch))
    ours.set_adapter("default")
    with quiet():
        ours.delete_adapter("default")
    assert_same_number(first(ours(**batch)), expected)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, _ in ours.named_parameters() if ".second." in n
    }


def test_a_module_with_no_copy_for_the_active_adapter_is_the_original():
    """HF PEFT calls no adapter's copy there either."""
    base = make("llama", dtype=torch.float64)
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(modules_to_save=["lm_head"]))
    model.add_adapter("second", peftkern.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.zero_()
    batch = inputs("llama")
    assert not first(model.eval()(**batch)).any()
    model.set_adapter("second")
    assert_same_number(first(model(**batch)), first(make("llama", dtype=torch.float64)(**batch)))
    assert not base.lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "SEQ_CLS"), ("bert", "TOKEN_CLS")]
)
def test_disable_adapter(family, task):
    ours, theirs = pair(family, task, torch.float64, lora_dropout=0.4)
    batch = inputs(family, task)
    before = snapshot(ours)
    bare = first(make(family, task, torch.float64)(**batch))
    for model in (ours.eval(), theirs.eval()):
        adapted = first(model(**batch))
        with model.disable_adapter():
            assert_same_number(first(model(**batch)), bare)
            assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
            with model.disable_adapter():  # once more inside
                assert_same_number(first(model(**batch)), bare)
        assert torch.equal(first(model(**batch)), adapted)
    assert flags(ours) == flags(theirs)
    ours.train(), theirs.train()
    before["training"] = snapshot(ours)["training"]
    assert_same(ours, before)
    assert ours.has_active_enabled_adapter and theirs.has_active_enabled_adapter
    assert differ(bare, first(ours.eval()(**batch, adapter_names=["default"] * 3)))
    ours.train()
    with pytest.raises(RuntimeError, match="mine"), ours.disable_adapter():
        raise RuntimeError("mine")
    assert_same(ours, before)


def test_disable_adapter_with_trained_biases_warns():
    ours, theirs = pair("bert", "SEQ_CLS", torch.float64, bias="all")
    with torch.no_grad():
        for model in (ours, theirs):
            model.get_submodule("base_model.model.bert.pooler.dense").bias.add_(1)
    for model in (ours, theirs):
        with (
            pytest.warns(UserWarning, match="bias configured to be 'all'"),
            model.disable_adapter(),
        ):
            logits = first(model(**inputs("bert", "SEQ_CLS")))
    with quiet(), ours.disable_adapter():
        assert_same_number(first(ours(**inputs("bert", "SEQ_CLS"))), logits)


MIXED = ["second", "__base__", "default", "third", "second", "default"]


@pytest.mark.parametrize(("family", "task"), [("llama", "CAUSAL_LM"), ("llama", "SEQ_CLS")])
def test_an_adapter_for_each_row(family, task):
    ours, theirs = three(family, task)
    batch = {k: v for k, v in inputs(family, task, batch=6).items() if k != "labels"}
    for model in (ours, theirs):
        model.eval()
    mixed = first(ours(**batch, adapter_names=MIXED))
    assert_same_number(mixed, first(theirs(**batch, adapter_names=MIXED)))
    for i, name in enumerate(MIXED):  # each row is what its adapter alone says
        row = {k: v[i : i + 1] for k, v in batch.items()}
        if name == "__base__":
            with ours.disable_adapter():
                alone = first(ours(**row))
        else:
            ours.set_adapter(name)
            alone = first(ours(**row))
        assert_same_number(mixed[i : i + 1], alone)
    # and nothing of it stays
    assert_same_number(first(ours(**batch)), first(ours(**batch, adapter_names=["default"] * 6)))
    with ours.disable_adapter():
        bare = first(ours(**batch))
        assert_same_number(first(ours(**batch, adapter_names=MIXED)), bare)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.filterwarnings("ignore:`shared` is adapted, but the model never calls it")
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_adapter_for_each_row_of_embeddings_and_conv1d(family):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    targets = ["shared", "q"] if family == "t5" else ["wte", "c_attn"]
    ours, theirs = three(
        family,
        task,
        target_modules=targets,
        second={"target_modules": targets[:1]},
        third={"target_modules": targets},
    )
    batch = inputs(family, task, batch=6)
    for model in (ours, theirs):
        model.eval()
    assert_same_number(
        first(ours(**batch, adapter_names=MIXED)), first(theirs(**batch, adapter_names=MIXED))
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_with_an_adapter_for_each_row(family, beams):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    names = {"target_modules": ["q", "v"]} if family == "t5" else {}
    ours, theirs = three(family, task, second={**SECOND, **names}, third={**THIRD, **names})
    batch = inputs(family, task, batch=6)
    out = []
    for model in (ours, theirs):
        model.eval()
        out.append(
            model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                adapter_names=MIXED,
                num_beams=beams,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
            )
        )
    assert torch.equal(*out)
    config = model.generation_config
    config.num_beams, config.max_new_tokens = beams, 5  # the beams may also come this way
    again = ours.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        adapter_names=MIXED,
        generation_config=config,
        min_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(again, out[0])


def test_adapters_added_loaded_and_deleted_again(tmp_path):
    ours, theirs = three()
    ours.save_pretrained(tmp_path)
    base = make("llama", dtype=torch.float64)
    reloaded = peftkern.PeftModel.from_pretrained(base, tmp_path)
    for name in ("second", "third"):
        result = reloaded.load_adapter(tmp_path / name, name)
        assert not result.missing_keys and not result.unexpected_keys
        assert reloaded.active_adapters == ["default"]
    batch = inputs("llama")
    for name in ("default", "second", "third"):
        for model in (ours.eval(), reloaded):
            model.set_adapter(name)
        assert torch.equal(first(reloaded(**batch)), first(ours(**batch)))
    reloaded.delete_adapter("second")
    assert not any(".second." in n for n in reloaded.state_dict())
    reloaded.load_adapter(tmp_path / "second", "second", is_trainable=True)
    trainable = {n for n, p in reloaded.named_parameters() if p.requires_grad}
    assert any(".second." in n for n in trainable)
    reloaded.set_adapter("second")
    ours.set_adapter("second")
    assert torch.equal(first(reloaded.eval()(**batch)), first(ours(**batch)))


@pytest.mark.parametrize("trainable", [True, False])
def test_load_adapter_beside_another_has_pefts_flags(tmp_path, trainable):
    models = pair("llama", dtype=torch.float64)
    models[0].save_pretrained(tmp_path)
    for model in models:
        model.load_adapter(tmp_path, "second", is_trainable=trainable)
    assert flags(models[0]) == flags(models[1])
    assert models[0].training == models[1].training
    assert_alike(*models)


def test_only_the_active_adapter_trains():
    ours, _ = three()
    ours.set_adapter("second")
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    loss_of(ours.train()(**inputs("llama"))).backward()
    optimiser.step()
    changed = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed == {n for n in before if ".second." in n}


def test_what_a_peft_model_answers():
    for family, task in [("llama", "CAUSAL_LM"), ("bert", None)]:
        ours, theirs = three() if task else pair(family, task, torch.float64)
        for model in (ours, theirs):
            model.eval()
        assert str(ours.peft_type.value) == str(theirs.peft_type.value) == "LORA"
        assert (
            ours.active_adapter == theirs.active_adapter
            and ours.active_adapters == theirs.active_adapters
        )
        assert ours.active_peft_config is ours.peft_config["default"]
        assert ours.modules_to_save == theirs.modules_to_save
        assert ours.base_model_torch_dtype == theirs.base_model_torch_dtype == torch.float64
        assert ours.has_active_enabled_adapter is theirs.has_active_enabled_adapter is True
        with ours.disable_adapter(), theirs.disable_adapter():
            assert ours.has_active_enabled_adapter is theirs.has_active_enabled_adapter is False
        assert ours.config.model_type == ours.base_model.config.model_type == family
        assert ours.get_base_model().peft_config is ours.peft_config
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = ours.no_such_thing


def test_second_wrapping_warns_like_peft():
    for library in (peftkern, peft):
        base = make("llama")
        library.get_peft_model(base, library.LoraConfig())
        with (
            pytest.warns(UserWarning, match="second time"),
            pytest.warns(UserWarning, match="Already found a `peft_config` attribute"),
        ):
            library.get_peft_model(base, library.LoraConfig(), "again")


def test_name_and_revision_of_the_base_model():
    base = make("llama")
    base.__dict__["name_or_path"] = "owner/base"
    config = peftkern.LoraConfig(base_model_name_or_path="other/base", revision="v1")
    with pytest.warns(UserWarning) as seen:
        peftkern.get_peft_model(base, config, revision="v2")
    said = [str(w.message) for w in seen]
    assert any("other/base" in s and "owner/base" in s for s in said) and any(
        "v1" in s and "v2" in s for s in said
    )
    assert (config.base_model_name_or_path, config.revision) == ("owner/base", "v2")


def test_unload_gives_the_base_model_back():
    base = make("bert", "SEQ_CLS")
    classes = {n: type(m) for n, m in base.named_modules()}
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = peftkern.get_peft_model(base, peftkern.LoraConfig(task_type="SEQ_CLS"))
    fill(model)
    assert model.base_model.unload() is base
    assert {n: type(m) for n, m in base.named_modules()} == classes
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("method", ["LORA", "PROMPT_TUNING"])
def test_a_configuration_is_checked_once(method, tmp_path, monkeypatch):
    """The check runs where an adapter is made, in every way to make one."""
    config = peftkern.get_peft_config(
        {"peft_type": method, "task_type": "CAUSAL_LM"}
        | ({"target_modules": ["q_proj"]} if method == "LORA" else {"num_virtual_tokens": 2})
    )
    checked: list[str] = []
    was = type(config).check_supported
    monkeypatch.setattr(
        type(config), "check_supported", lambda self: (checked.append("x"), was(self))[1]
    )
    peftkern.get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    assert len(checked) == 1
    model = peftkern.PeftModel.from_pretrained(make("llama"), tmp_path)
    assert len(checked) == 2
    model.load_adapter(tmp_path, "other")
    assert len(checked) == 3


@pytest.mark.parametrize("how", ["get_peft_model", "PeftModel", "add_adapter"])
def test_a_refused_configuration_is_as_it_was(how):
    config = peftkern.LoraConfig(
        task_type="SEQ_CLS",
        megatron_config={"a": 1},
        base_model_name_or_path="x",
        target_modules=["q_proj"],
    )
    before = config.to_dict()
    with pytest.raises(NotImplementedError, match="megatron_config"):
        if how == "get_peft_model":
            peftkern.get_peft_model(make("llama", "SEQ_CLS"), config, revision="r")
        elif how == "PeftModel":
            peftkern.PeftModelForSequenceClassification(make("llama", "SEQ_CLS"), config)
        else:
            first = peftkern.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
            peftkern.get_peft_model(make("llama", "SEQ_CLS"), first).add_adapter("b", config)
    assert config.to_dict() == before


def test_no_weights_are_read_of_what_is_refused(tmp_path):
    config = peftkern.LoraConfig(megatron_config={"a": 1}, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)  # and no weights beside it
    with pytest.raises(NotImplementedError, match="megatron_config"):
        peftkern.PeftModel.from_pretrained(make("llama"), tmp_path)
    model = peftkern.get_peft_model(make("llama"), peftkern.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="megatron_config"):
        model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["default"]
