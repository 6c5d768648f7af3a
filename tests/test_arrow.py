"""Arrow: routing among adapters, beside HF PEFT's on the same files."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model as hf_create

import peftkern
from tests.closeness import assert_same_number, differ
from tests.tiny import assert_same, fill, first, inputs, loss_of, make, snapshot

SETTINGS = {"top_k": 2, "router_temperature": 0.5, "rng_seed": 3}
FAMILIES = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(family, folders of three adapters and of two general ones)."""
    folder, folders = tmp_path_factory.mktemp(request.param), []
    for i in range(5):
        model = adapted(request.param, 4, i)
        model.save_pretrained(folder / str(i))
        folders.append(str(folder / str(i)))
    return request.param, folders[:3], folders[3:]


def adapted(family, r, seed, **more):
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=4 + seed, fan_in_fan_out=family == "gpt2",
        **{"target_modules": FAMILIES[family], **more},
    )  # fmt: skip
    model = peftkern.get_peft_model(make(family, dtype=torch.float64), config)
    fill(model, seed=seed)
    return model


def task_weights(model):
    """What the adapters hold; the router's own A and B are never used."""
    return {n: p for n, p in model.named_parameters() if ".task_" in n or ".gks_" in n}


def both(saved, count=3, **settings):
    family, tasks, general = saved
    found = []
    for library, create in ((peftkern, peftkern.create_arrow_model), (peft, hf_create)):
        config = library.ArrowConfig(**{**SETTINGS, **settings})
        base = make(family, dtype=torch.float64)
        found.append(create(base, tasks[:count], config, general).eval())
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("gks", [False, True])
def test_numbers_and_gradients_are_hf_pefts(saved, gks):
    ours, theirs = both(saved, use_gks=gks)
    batch = inputs(saved[0])
    grads = []
    for model in (ours, theirs):
        model.get_input_embeddings().weight.requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and "router" not in name or "emb" in name)
        loss_of(model(**batch)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same_number(first(ours(**batch)), first(theirs(**batch)))
    assert grads[0].keys() == grads[1].keys() and any(".task_1" in n for n in grads[0])
    assert_same_number(*grads)
    # GenKnowSub has changed the adapters, once
    assert_same_number(*(task_weights(model) for model in (ours, theirs)))
    first_calls = first(ours(**batch))
    with torch.inference_mode():
        assert_same_number(first(ours(**batch)), first_calls)
    rows = peftkern.explain(ours)
    assert rows and all("Arrow" in row.reason and not row.fused for row in rows)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_an_adapter_that_comes_later(saved):
    family, tasks, _ = saved
    models = both(saved, count=2, use_gks=True)
    batch = inputs(family)
    before = first(models[0](**batch))
    first(models[1](**batch))
    for model in models:
        model.load_adapter(tasks[2], adapter_name="later")
        model.set_adapter("arrow_router")
    found = [first(model.eval()(**batch)) for model in models]
    assert_same_number(*found)
    assert_same_number(found[0], first(both(saved, use_gks=True)[0](**batch)))
    assert differ(found[0], before)
    models[0].delete_adapter("later")  # HF PEFT's looks for it still
    assert_same_number(first(models[0](**batch)), before)


def test_prototypes_are_made_anew_when_an_adapter_was_trained(saved):
    model = both(saved)[0]
    batch = inputs(saved[0])
    before = first(model(**batch))
    routers = [m for m in model.modules() if type(m).__name__ == "ArrowLoraLinearLayer"]
    made = [router.prototypes for router in routers]
    model(**batch)
    assert all(a is router.prototypes for a, router in zip(made, routers, strict=True))
    model.set_adapter("task_0")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model(**batch)).backward()
    optimizer.step()
    model.set_adapter("arrow_router")
    assert differ(first(model(**batch)), before)
    assert not any(a is router.prototypes for a, router in zip(made, routers, strict=True))


def test_the_prototype_is_the_first_right_singular_vector():
    router = peftkern.tuners.lora.arrow.ArrowLoraLinearLayer(7, peftkern.ArrowConfig(rng_seed=1))
    U, _, V = torch.linalg.svd(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))
    B, A = U[:, :2] * torch.tensor([3.0, 1.0]), V[:2]
    found = router.top_right_singular_vec_from_BA(A, B)
    assert (found @ V[0]).abs() > 1 - 1e-5


def test_it_cannot_be_merged_and_its_settings_survive_a_file(saved, tmp_path):
    model = both(saved)[0]
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
            merge()
    assert_same(model, before)
    model.save_pretrained(tmp_path)
    config = peftkern.PeftConfig.from_pretrained(tmp_path / "arrow_router")
    assert config.arrow_config == model.peft_config["arrow_router"].arrow_config
    assert config.arrow_config.task_adapter_names == ["task_0", "task_1", "task_2"]
    text = json.loads((tmp_path / "arrow_router" / "adapter_config.json").read_text())
    assert peft.LoraConfig(**text).arrow_config.top_k == 2
    names = [*model.peft_config, "arrow_router"]
    again = make(saved[0], dtype=torch.float64)
    again = peftkern.PeftModel.from_pretrained(again, tmp_path / "task_0", adapter_name="task_0")
    for name in names[1:-1]:
        again.load_adapter(tmp_path / name, adapter_name=name)
    again.set_adapter("arrow_router")
    assert_same_number(*(first(m.eval()(**inputs(saved[0]))) for m in (again, model)))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_errors_come_before_anything_is_changed(tmp_path):
    good = adapted("llama", 4, 0)
    good.save_pretrained(tmp_path / "good")
    adapted("llama", 2, 0).save_pretrained(tmp_path / "rank")
    other = adapted("llama", 4, 0, target_modules=["k_proj", "down_proj"])
    other.save_pretrained(tmp_path / "targets")
    adapted("llama", 4, 0, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "embedding")
    (tmp_path / "empty").mkdir()
    one = peftkern.ArrowConfig(top_k=1)
    cases = (
        ([], one, ValueError, "at least one adapter path"),
        (["good"], peftkern.ArrowConfig(top_k=2), ValueError, "`top_k` is 2, .* holds 1"),
        (["good"], peftkern.ArrowConfig(top_k=1, use_gks=True), ValueError, "general LoRA paths"),
        (["good", "rank"], one, ValueError, "rank mismatch: 2 != 4"),
        (["good", "targets"], one, ValueError, "target_modules mismatch"),
        (["embedding"], one, TypeError, "must only target Linear.*embed_tokens"),
        (["empty"], one, ValueError, "does not contain 'adapter_config.json'"),
    )
    for names, config, error, match in cases:
        paths = [str(tmp_path / name) for name in names]
        with pytest.raises(error, match=f"(?s){match}"):
            peftkern.create_arrow_model(make("llama", dtype=torch.float64), paths, config)
    for wrong in ({"top_k": 0}, {"router_temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            peftkern.ArrowConfig(**wrong)
