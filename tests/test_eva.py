"""EVA against HF PEFT, and the incremental PCA that it uses."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA as PeftPCA
from torch import nn

import peftkern
from peftkern.utils.incremental_pca import IncrementalPCA
from tests.closeness import assert_same_number
from tests.tiny import make

pytestmark = [
    # Components and ranks follow from numbers that both libraries compute in fp32. In float64 two
    # orders of sums cannot change a rank, or a component whose singular value stands apart.
    pytest.mark.usefixtures("doubled"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage"),
]
DOUBLE = {"dtype": torch.float64}
LIBS = (peftkern, peft)


def batches(count=3, rows=4, length=24, vocabulary=64):
    torch.manual_seed(0)
    out = []
    for _ in range(count):
        ids = torch.randint(1, vocabulary, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def adapted(lib, base, targets=("q_proj", "k_proj", "down_proj"), **settings):
    config = lib.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(targets),
        init_lora_weights="eva",
        eva_config=lib.EvaConfig(**{"rho": 2.0, "tau": 0.9, **settings}),
        task_type="CAUSAL_LM",
    )
    return lib.get_peft_model(copy.deepcopy(base), config)


SETTINGS = {
    "default": {},
    "whitened": {"whiten": True, "use_label_mask": False},
    "no_redistribution": {"rho": 1.0, "adjust_scaling_factors": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_and_components_are_peft_s(name):
    base, data = make("llama", **DOUBLE), batches()
    states, models = [], []
    for lib in LIBS:
        model = adapted(lib, base, **SETTINGS[name])
        found = lib.get_eva_state_dict(model, data, show_progress_bar=False)
        states.append(dict(found))
        assert not any(m._forward_hooks for m in model.modules())
        lib.initialize_lora_eva_weights(model, eva_state_dict=dict(found))
        models.append(model)
    ours, theirs = states
    assert list(ours) == list(theirs)
    assert_same_number(ours, theirs)
    ranks = {k: len(v) for k, v in ours.items()}
    assert (len(set(ranks.values())) > 1) == (name != "no_redistribution")
    a, b = (m.peft_config["default"] for m in models)
    assert (a.rank_pattern, a.alpha_pattern) == (b.rank_pattern, b.alpha_pattern)
    assert a.target_modules == set(b.target_modules)
    left, right = (
        peft.get_peft_model_state_dict(models[1]),
        peftkern.get_peft_model_state_dict(models[0]),
    )
    assert_same_number(right, left)


def test_a_checkpoint_with_redistributed_ranks_loads(tmp_path):
    base, data = make("llama", **DOUBLE), batches()
    model = adapted(peftkern, base)
    peftkern.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    for layer in model.modules():
        if isinstance(layer, peftkern.tuners.lora.Linear):
            layer.lora_B["default"].weight.data.normal_()
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**data[0]).logits
        for lib in LIBS:
            loaded = lib.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
            assert_same_number(loaded(**data[0]).logits, expected)


def test_a_layer_may_lose_its_adapter_and_another_start_plainly():
    base = make("llama", **DOUBLE)
    q, k, v = (f"base_model.model.model.layers.0.self_attn.{n}_proj" for n in "qkv")
    outcomes = []
    for lib in LIBS:
        model = adapted(
            lib,
            base,
            targets=["layers.0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        )
        value = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), **DOUBLE)
        with pytest.warns(UserWarning, match="not found in the eva state_dict.*v_proj"):
            lib.initialize_lora_eva_weights(model, eva_state_dict={q: value, k: torch.empty(0, 16)})
        attention = model.base_model.model.model.layers[0].self_attn
        assert type(attention.k_proj) is nn.Linear
        assert torch.equal(attention.q_proj.lora_A["default"].weight, value)
        assert attention.v_proj.lora_A["default"].weight.shape[0] == 4
        outcomes.append((attention.q_proj.scaling, model.peft_config["default"].rank_pattern))
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert outcomes[0] == outcomes[1]


def test_a_plain_model_and_functions_of_ones_own():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    data = [torch.randn(30, 8, **DOUBLE) for _ in range(3)]
    found = []
    for lib in LIBS:
        config = lib.LoraConfig(
            r=2,
            target_modules=["0", "2"],
            init_lora_weights="eva",
            eva_config=lib.EvaConfig(tau=0.5),
        )
        found.append(
            lib.get_eva_state_dict(
                base,
                data,
                config,
                forward_fn=lambda model, x: model(x),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )
        )
    assert found[1].keys() == {"0", "2"}
    assert_same_number(dict(found[0]), dict(found[1]))
    with pytest.raises(ValueError, match="peft_config is required"):
        peftkern.get_eva_state_dict(base, data)


def test_too_small_batches_are_an_error_and_no_endless_loop():
    model = adapted(peftkern, make("llama", **DOUBLE), use_label_mask=False)
    model.train().base_model.model.model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    data = [{"input_ids": torch.tensor([[1, 2, 3]])} for _ in range(2)]
    with pytest.raises(ValueError, match="no batch has as many rows.*q_proj"):
        peftkern.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    assert not any(m._forward_hooks for m in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(ValueError, match="dataloader is empty"):
        peftkern.initialize_lora_eva_weights(model, [], show_progress_bar=False)
    with pytest.raises(ValueError, match="dataloader is required"):
        peftkern.initialize_lora_eva_weights(model)
    plain = peftkern.get_peft_model(make("llama", **DOUBLE), peftkern.LoraConfig())
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        peftkern.initialize_lora_eva_weights(plain, data)


@pytest.mark.parametrize("settings", [{}, {"lowrank": True, "lowrank_seed": 3}, {"batch_size": 17}])
def test_the_components_are_peft_s(settings):
    torch.manual_seed(0)
    X = torch.randn(100, 12, **DOUBLE) @ torch.randn(12, 12, **DOUBLE) + 3
    ours, theirs = (cls(n_components=4, **settings) for cls in (IncrementalPCA, PeftPCA))
    state = torch.random.get_rng_state()
    kept = X.clone()
    for pca in (ours, theirs):
        pca.fit(X)
        pca.partial_fit(X[:20])
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(X, kept)
    for name in (
        "components_ singular_values_ mean_ var_ explained_variance_ explained_variance_ratio_ "
        "noise_variance_ n_samples_seen_"
    ).split():
        assert_same_number(getattr(ours, name), getattr(theirs, name), name)
    expected = (X - ours.mean_) @ ours.components_.T
    assert_same_number(ours.transform(X), expected)
    for cls in (IncrementalPCA, PeftPCA):
        with pytest.raises(ValueError, match="n_components=13 invalid for n_features=12"):
            cls(n_components=13).fit(X)
        with pytest.raises(ValueError, match="less or equal to the batch number of samples 3"):
            cls(n_components=4).partial_fit(X[:3])
