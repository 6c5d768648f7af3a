"""The doors of other libraries take configurations of peftkern, and what they build is fused.

HF PEFT, transformers, sentence-transformers and diffusers run here; TRL in test_trl.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import peft
import pytest
import torch
import transformers

import peftkern
from tests.closeness import assert_same_number
from tests.tiny import fill, first, inputs, make
from tests.trainers import ARGUMENTS, sentences, tokenizer

METHODS = {
    "LoraConfig": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}
# fields that HF PEFT reads while it builds a layer: {name: (what is given, its class or None)}
FIELDS = {
    "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v": 4}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "bias": "all", "target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa"},
    "bdlora": {"use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "nblocks": 2,
                                               "match_strict": False})},
    "kasa": {"kasa_config": ("KasaConfig", {})},
    "velora": {"velora_config": ("VeloraConfig", {"num_groups": 4})},
    "monteclora": {"monteclora_config": ("MontecloraConfig", {"num_samples": 2})},
    "alora": {"alora_invocation_tokens": [3]},
    "tokens": {"trainable_token_indices": [3, 4], "modules_to_save": ["lm_head"]},
    "parameters": {"target_parameters": ["o_proj.weight"]},
    "layers": {"layers_to_transform": [1], "layer_replication": [(0, 2), (1, 2)]},
}  # fmt: skip


def config_of(library, method="LoraConfig", task="CAUSAL_LM", **fields):
    """The same configuration of one of the two libraries."""
    for name, value in fields.items():
        if isinstance(value, tuple):
            kind = getattr(peft, value[0], None) or getattr(peft.tuners.lora.config, value[0])
            kind = kind if library is peft else getattr(peftkern, value[0])
            fields[name] = kind(**value[1])
    return getattr(library, method)(task_type=task, **{**METHODS[method], **fields})


def saved(model, folder):
    model.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    # HF PEFT writes sets in the order of this process's hashes
    return {k: sorted(v) if k == "target_modules" and v else v for k, v in values.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_is_an_instance_of_both_classes(method):
    ours, theirs = (config_of(library, method) for library in (peftkern, peft))
    assert isinstance(ours, peft.PeftConfig) and isinstance(ours, type(theirs))
    assert isinstance(ours, peftkern.PeftConfig) and not isinstance(theirs, peftkern.PeftConfig)
    others = [getattr(peft, name) for name in METHODS if name != method]
    assert not isinstance(ours, (*others, peft.AdaLoraConfig))
    assert repr(ours).startswith(f"{method}(")
    for twin in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        dataclasses.replace(ours),
        ours.__class__(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)}),
    ):
        # of our class alone, so no method of HF PEFT's is found in it
        assert type(twin) is type(ours) and twin == ours and twin is not ours
    assert not any(base.__module__.startswith("peft.") for base in type(ours).__mro__)
    assert {f.name for f in dataclasses.fields(theirs)} <= {
        f.name for f in dataclasses.fields(ours)
    }


def test_a_class_of_a_users_own_is_an_instance_too():
    @dataclasses.dataclass
    class Mine(peftkern.LoraConfig):
        more: int = 3

    assert isinstance(Mine(), peft.LoraConfig) and type(dataclasses.replace(Mine(), r=2)) is Mine
    assert not isinstance(peftkern.KasaConfig(), peft.PeftConfig)


def built(library, **how):
    """HF PEFT's model, from the configuration of one of the libraries."""
    base = make("llama")
    torch.manual_seed(0)
    return peft.get_peft_model(base, config_of(library, **how))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "how",
    [{"method": m} for m in METHODS] + list(FIELDS.values()),
    ids=[*METHODS, *FIELDS],
)
def test_hf_peft_builds_its_own_model_from_our_configuration(how, tmp_path):
    """The same tensors and the same file as from HF PEFT's own configuration."""
    ours, theirs = (built(library, **how) for library in (peftkern, peft))
    mine, others = ours.state_dict(), theirs.state_dict()
    assert [(k, v.shape) for k, v in mine.items()] == [(k, v.shape) for k, v in others.items()]
    assert all(torch.equal(mine[k], others[k]) for k in others)
    assert type(ours) is type(theirs) and type(ours).__module__.startswith("peft.")
    if how.get("kasa_config") is None:  # HF PEFT cannot write this one's own configuration
        assert saved(ours, tmp_path / "ours") == saved(theirs, tmp_path / "theirs")
        again = peft.PeftConfig.from_pretrained(tmp_path / "ours")
        assert type(again).__module__.startswith("peft.")
    batch = inputs("llama")
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        results.append(first(model(**batch)))
    assert torch.equal(*results)


def test_a_second_adapter_and_an_injection():
    model = built(peft)
    model.add_adapter("second", config_of(peftkern, r=2))
    assert model.peft_config["second"].r == 2
    injected = peft.inject_adapter_in_model(config_of(peftkern), make("llama"))
    peftkern.fuse(injected)
    assert all(row.fused for row in peftkern.explain(injected))


def by_add_adapter(library, fused):
    model = make("llama", dtype=torch.float64)
    model.add_adapter(config_of(library, target_modules="all-linear", lora_dropout=0.1))
    fill(model)
    return peftkern.fuse(model) if fused else model


def test_transformers_add_adapter():
    ours, theirs = by_add_adapter(peftkern, True), by_add_adapter(peft, False)
    batch = inputs("llama")
    assert_same_number(first(ours.eval()(**batch)), first(theirs.eval()(**batch)))
    rows = peftkern.explain(ours)
    assert len(rows) == 14 and all(row.fused for row in rows)
    ours.disable_adapters()
    assert_same_number(first(ours(**batch)), first(make("llama", dtype=torch.float64)(**batch)))


def test_trainer_on_a_model_of_add_adapter(tmp_path):
    found = []
    for library, callbacks in ((peftkern, [peftkern.FuseCallback()]), (peft, [])):
        model = by_add_adapter(library, False)
        ids = tokenizer()(sentences())["input_ids"]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, save_strategy="no", **ARGUMENTS
        )
        trainer = transformers.Trainer(
            model, arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids],
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert sum(row.fused for row in peftkern.explain(model)) == 14 * bool(callbacks)
    assert len(found[0]) == 3
    assert_same_number(*found)


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """The folder of a tiny sentence-transformers model."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("bert")
    make("bert", None, torch.float64).save_pretrained(folder)
    tokenizer().save_pretrained(folder)

    def load(library):
        model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", model_kwargs={"dtype": torch.float64}
        )
        config = config_of(library, task="FEATURE_EXTRACTION", target_modules="all-linear")
        model.add_adapter(config)
        fill(model)
        return model

    return load


def test_sentence_transformers_add_adapter(sentence_model, tmp_path):
    ours, theirs = (sentence_model(library) for library in (peftkern, peft))
    peftkern.fuse(ours)
    rows = peftkern.explain(ours)
    assert len(rows) == 13 and all(row.fused for row in rows)
    embedded = [torch.from_numpy(m.encode(sentences())) for m in (ours, theirs)]
    assert_same_number(*embedded)
    ours.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_sentence_transformers_trainer(sentence_model, tmp_path):
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    try:  # 6 gave its modules other addresses
        from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    except ImportError:
        from sentence_transformers.losses import CosineSimilarityLoss
    datasets = pytest.importorskip("datasets")
    rows = {"a": sentences(), "b": sentences(seed=1), "score": [0.0, 1.0] * 4}
    found = []
    for library, callbacks in ((peftkern, [peftkern.FuseCallback()]), (peft, [])):
        model = sentence_model(library)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_strategy="no", **ARGUMENTS
        )
        SentenceTransformerTrainer(
            model, arguments, datasets.Dataset.from_dict(rows), loss=CosineSimilarityLoss(model),
            callbacks=callbacks,
        ).train()  # fmt: skip
        assert sum(row.fused for row in peftkern.explain(model)) == 13 * bool(callbacks)
        found.append(torch.from_numpy(model.encode(sentences())))
    assert_same_number(*found)


def test_diffusers_add_adapter():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    base = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double()  # fmt: skip
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    images = []
    for library in (peftkern, peft):
        unet = copy.deepcopy(base)
        unet.add_adapter(config_of(library, task=None, target_modules=targets), "style")
        fill(unet)
        if library is peftkern:
            peftkern.fuse(unet)
            assert all(row.fused for row in peftkern.explain(unet))
        g = torch.Generator().manual_seed(1)
        noise = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64)
        text = torch.randn(2, 3, 8, generator=g, dtype=torch.float64)
        images.append(unet(noise, torch.tensor([1]), text).sample)
        unet.set_adapters(["style"], 0.5)  # diffusers writes the layers' scaling
        images.append(unet(noise, torch.tensor([1]), text).sample)
    assert_same_number(images[0], images[2])
    assert_same_number(images[1], images[3])
    assert not torch.equal(images[0], images[1])
