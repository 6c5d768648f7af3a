"""VeLoRA against HF PEFT: outputs, gradients, the vector, files both ways, merging, refusals."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from tests.changes import layer_of, layer_pair
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_layers import assert_agree
from tests.tiny import assert_same, fill, make, snapshot

KINDS = ["batch_average", "batch_average_once", "random"]


def config(library, kind="batch_average", groups=5, **settings):
    own = library.VeloraConfig(num_groups=groups, scale=0.7, init_type=kind)
    return library.LoraConfig(velora_config=own, **settings)


def models(kind, dropout=0.0, dtype=torch.float64, conv1d=False, **settings):
    """(ours, theirs): 16 inputs, which 5 groups do not divide."""
    torch.manual_seed(0)
    first = Conv1D(12, 16) if conv1d else nn.Linear(16, 12)
    base = nn.Sequential(first, nn.Tanh(), nn.Linear(12, 8)).to(dtype)
    found = []
    for library in (peftkern, peft):
        settings.update(target_modules=["0", "2"], lora_dropout=dropout, r=4)
        torch.manual_seed(1)
        own = config(library, kind, **settings)
        found.append(library.get_peft_model(copy.deepcopy(base), own))
        fill(found[-1])
    return found


def embeds(model):
    return [
        layer.lora_velora_embed["default"] for layer in (model.base_model.model[i] for i in (0, 2))
    ]


def step(model, x, seed=3):
    """Output, and the gradients of x and of all that trains."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]


def assert_as_good(dtype, found):
    """(ours, HF PEFT's and, unless ``dtype`` is float64, the exact) numbers."""
    if dtype == torch.float64:
        assert_same_number(*found[:2])
    else:
        assert_as_good_as_torch(*(dict(enumerate(f)) for f in found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation(kind, dtype):
    pair = models(kind, dropout=0.3, dtype=dtype)
    three = *((m, dtype) for m in pair), (copy.deepcopy(pair[1]).double(), torch.float64)
    names = ["lora_velora_embed", "lora_velora_initialized", "lora_velora_num_groups"]
    assert set(names) < set(pair[0].base_model.model[0].other_param_names)
    before = embeds(pair[0])
    for seed in (3, 4):
        x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) + 1
        assert_as_good(dtype, [step(m.train(), x.to(t), seed) for m, t in three])
        assert_as_good(dtype, [embeds(m) for m, _ in three])
        adapter = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(e.dtype == adapter for m in pair for e in embeds(m))
        if seed == 3:
            after = embeds(pair[0])
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(moved) if kind != "random" else not any(moved)
    again = [not torch.equal(a, b) for a, b in zip(after, embeds(pair[0]), strict=True)]
    assert any(again) == (kind == "batch_average")
    # no training: plain LoRA, whose operation runs, and the vector stays
    after = embeds(pair[0])
    assert_as_good(dtype, [step(m.eval(), x.to(t)) for m, t in three])
    assert all(map(torch.equal, after, embeds(pair[0])))
    assert all(row.fused for row in peftkern.explain(pair[0]))
    pair[0].train()
    assert not any(row.fused for row in peftkern.explain(pair[0]))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but")  # of the second layer
def test_conv1d_and_autocast():
    for conv1d in (False, True):
        settings = {"conv1d": conv1d, "fan_in_fan_out": conv1d}
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        pair = models("batch_average", **settings)
        assert_same_number(*(step(m.train(), x.double()) for m in pair))
        pair = models("batch_average", dtype=torch.float32, **settings)
        exact = step(copy.deepcopy(pair[1]).double().train(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = [step(m.train(), x) for m in pair]
        assert_as_good(torch.bfloat16, [*found, exact])


def test_the_backward_keeps_less():
    x = torch.randn(64, 16, dtype=torch.float64)
    kept = []
    for groups in (2, 16):
        model, _ = models("random", groups=groups)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            model.train()(x)
        kept.append(sum(saved))
    # 14 more numbers for each of 64 rows in two layers, less 8 - 1 and 6 - 1 of the vectors
    assert kept[1] - kept[0] == 64 * 14 * 2 - 12


@pytest.mark.parametrize("kind", KINDS)
def test_files_both_ways(tmp_path, kind):
    pair = models(kind)
    x = torch.randn(5, 16, dtype=torch.float64)
    for model, folder in zip(pair, ("ours", "theirs"), strict=True):
        model.train()(x)
        model.save_pretrained(tmp_path / folder)
    for source, folder in zip(pair, ("ours", "theirs"), strict=True):
        want = peft.get_peft_model_state_dict(source)
        assert sum("lora_velora_embed" in key for key in want) == 2
        for library in (peftkern, peft):
            for low in (False, True):
                base = copy.deepcopy(pair[1]).unload()
                loaded = library.PeftModel.from_pretrained(
                    base, tmp_path / folder, low_cpu_mem_usage=low, is_trainable=True
                )
                have = library.get_peft_model_state_dict(loaded)
                assert have.keys() == want.keys()
                assert all(torch.equal(have[key], want[key]) for key in want)
                own = loaded.peft_config["default"].velora_config
                assert own == library.VeloraConfig(num_groups=5, scale=0.7, init_type=kind)
                assert_same_number(loaded.eval()(x), pair[1].eval()(x))


def test_merging_adapters_and_mixed_rows():
    pair = layer_pair(dtype=torch.float64)
    for model, library in zip(pair, (peftkern, peft), strict=True):
        torch.manual_seed(5)
        own = config(library, "random", r=3, init_lora_weights=False, target_modules=["0"])
        model.add_adapter("third", own)
        model.set_adapter("third")
    pair[0].load_state_dict(pair[1].state_dict())
    assert_agree(*pair)
    x, names = torch.randn(4, 24, dtype=torch.float64), ["third", "default", "third", "__base__"]
    assert_same_number(*(m.eval()(x, adapter_names=names) for m in pair))
    before = layer_of(pair[0]).base_layer.weight.clone()
    for model in pair:
        model.merge_adapter()
    assert_same_number(*(layer_of(m).base_layer.weight for m in pair))
    assert not torch.equal(layer_of(pair[0]).base_layer.weight, before)
    pair[0].unmerge_adapter()
    assert torch.equal(layer_of(pair[0]).base_layer.weight, before)
    with pytest.warns(UserWarning, match="Adapter third was active which is now deleted"):
        pair[0].delete_adapter("third")
    assert not any("velora" in key for key in pair[0].state_dict())
    assert "third" not in layer_of(pair[0])._all_available_adapter_names()


@pytest.mark.parametrize("bad", [{"num_groups": 0}, {"scale": 0.0}, {"init_type": "mean"}])
def test_bad_settings(bad):
    found = []
    for library in (peftkern, peft):
        with pytest.raises(ValueError) as error:
            library.VeloraConfig(**bad)
        found.append(str(error.value))
    assert found[0] == found[1]
    with pytest.raises(TypeError, match="must be a `VeloraConfig`, a dict, or None"):
        peftkern.LoraConfig(velora_config=3)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (nn.Linear(4, 4), {"use_dora": True}),
        (nn.Linear(4, 4), {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
        (nn.Linear(4, 4), {"init_lora_weights": "mica"}),
        (nn.Conv2d(4, 4, 1), {}),
        (nn.Embedding(4, 4), {}),
        (nn.MultiheadAttention(4, 2), {}),
    ],
)
def test_refused_as_hf_peft_refuses(base, settings):
    models = [nn.Sequential(nn.Linear(4, 4), copy.deepcopy(base)) for _ in range(2)]
    before = snapshot(models[0])
    said = []
    for library, model in zip((peftkern, peft), models, strict=True):
        with pytest.raises(ValueError) as error:
            library.get_peft_model(model, config(library, target_modules=["1"], **settings))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert_same(models[0], before)


def test_refused_for_parameters():
    model = make("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not work when `velora_config` is set"):
        own = config(peftkern, target_modules=[], target_parameters=["q_proj.weight"])
        peftkern.get_peft_model(model, own)
    assert_same(model, before)
