"""Adapters that replace others: compared with HF PEFT, and in a model that is compiled once."""

from __future__ import annotations

import copy

import peft
import peft.utils.hotswap
import pytest
import torch
from torch import nn

import peftkern
from peftkern.checkpoint.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from peftkern.ops.lora import lora_linear
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import fill, first, inputs, make, step

DOUBLE = {"dtype": torch.float64}
# ranks, alphas and targets that differ, with patterns
ADAPTERS = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
    },
    {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]},
]


def saved(folder, lib, number):
    """A folder with adapter ``number``, and what a model with it answers."""
    base = make("llama", **DOUBLE)
    model = lib.get_peft_model(base, lib.LoraConfig(**ADAPTERS[number])).eval()
    fill(model, seed=10 + number)
    model.save_pretrained(folder / str(number))
    with torch.no_grad():
        return first(model(**inputs("llama")))


def loaded(lib, folder, number=0):
    return lib.PeftModel.from_pretrained(make("llama", **DOUBLE), folder / str(number)).eval()


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1)], ids=str)
def test_swapped_adapters_answer_as_loaded_ones(tmp_path, prepared, order):
    """Larger, smaller and fewer tensors than before; with tensors for scalings and without."""
    answers = [saved(tmp_path, peftkern, n) for n in range(3)]
    ours, theirs = loaded(peftkern, tmp_path), loaded(peft, tmp_path)
    if prepared:
        prepare_model_for_compiled_hotswap(ours, target_rank=8)
        peft.utils.hotswap.prepare_model_for_compiled_hotswap(theirs, target_rank=8)
        assert_same_number(first(ours(**inputs("llama"))), answers[0])
    for number in order:
        if number == 1 and not prepared:
            continue  # the second pattern is for ranks below those of the first
        hotswap_adapter(ours, tmp_path / str(number), "default")
        peft.utils.hotswap.hotswap_adapter(theirs, tmp_path / str(number), "default")
        with torch.no_grad():
            mine = first(ours(**inputs("llama")))
            assert_same_number(mine, answers[number])
            if number != 1:  # PEFT looks for the patterns' scalings under other names
                assert_same_number(mine, first(theirs(**inputs("llama"))))


def test_adapters_of_similar_names_keep_their_weights(tmp_path):
    """ "default2" begins like "default", and a layer may be called like an adapter."""
    saved(tmp_path, peftkern, 2)
    model = loaded(peftkern, tmp_path, 2)
    model.add_adapter("default2", peftkern.LoraConfig(**ADAPTERS[0]))
    model.add_adapter("self_attn", peftkern.LoraConfig(**ADAPTERS[0]))
    fill(model, seed=3)
    kept = {k: v.clone() for k, v in model.state_dict().items() if ".default." not in k}
    hotswap_adapter(model, tmp_path / "2", "default")
    hotswap_adapter(model, tmp_path / "2", "self_attn")
    model.add_adapter("scaled", peftkern.LoraConfig(use_rslora=True, **ADAPTERS[2]))
    with pytest.raises(ValueError, match="use_rslora"):  # of the one swapped, not the active one
        hotswap_adapter(model, tmp_path / "2", "scaled")
    after = model.state_dict()
    for key, value in kept.items():
        if ".self_attn.weight" not in key:
            assert torch.equal(after[key], value), key


def test_a_dora_layer_that_the_new_adapter_leaves_alone(tmp_path):
    """HF PEFT sets its magnitudes to 0, with which the layer answers 0."""
    answers = []
    for n, targets in enumerate((["q_proj", "v_proj"], ["q_proj"])):
        config = peftkern.LoraConfig(r=4, use_dora=True, target_modules=targets)
        model = peftkern.get_peft_model(make("llama", **DOUBLE), config).eval()
        fill(model, seed=n)
        model.save_pretrained(tmp_path / str(n))
        with torch.no_grad():
            answers.append(first(model(**inputs("llama"))))
    model = loaded(peftkern, tmp_path)
    with torch.no_grad(), peftkern.tuners.lora.dora.DoraCaching():
        assert_same_number(first(model(**inputs("llama"))), answers[0])
        hotswap_adapter(model, tmp_path / "1", "default")
        assert_same_number(first(model(**inputs("llama"))), answers[1])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.w)


def test_factors_of_experts_are_not_padded():
    """Their ranks are not at the start of a larger matrix: what is smaller is refused."""
    config = {"target_parameters": ["0.w"], "init_lora_weights": False}
    model, other = (
        peftkern.get_peft_model(
            nn.Sequential(Experts().double()), peftkern.LoraConfig(r=r, **config)
        )
        for r in (4, 2)
    )
    x = torch.randn(3, 5, **DOUBLE)
    before = model(x)
    small = {k: v for k, v in other.state_dict().items() if "lora_" in k}
    with pytest.raises(ValueError, match="Incompatible shapes"):
        hotswap_adapter_from_state_dict(model, small, "default", other.peft_config["default"])
    with pytest.raises(ValueError, match="experts lie in one matrix"):
        prepare_model_for_compiled_hotswap(model, target_rank=16)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert_same_number(model(x), before)


def test_attention_is_prepared():
    config = peftkern.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **DOUBLE)})
    layer = peftkern.get_peft_model(base, config).base_model.model["attention"]
    x = torch.randn(3, 8, **DOUBLE)
    before = layer(x, x, x)[0]
    prepare_model_for_compiled_hotswap(layer, target_rank=4)
    assert_same_number(layer(x, x, x)[0], before)


class Two(nn.Module):
    """A model that compiles fast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(12, 10, **DOUBLE)
        self.v_proj = nn.Linear(10, 6, **DOUBLE)

    def forward(self, x):
        return self.v_proj(self.q_proj(x).relu())


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
def test_a_compiled_model_is_compiled_once(tmp_path):
    x, answers = torch.randn(5, 12, **DOUBLE), []
    for number, adapter in enumerate(ADAPTERS):
        model = peftkern.get_peft_model(Two(), peftkern.LoraConfig(**adapter)).eval()
        fill(model, seed=10 + number)
        model.save_pretrained(tmp_path / str(number))
        answers.append(model(x).detach())

    def compiled(target_rank):
        torch._dynamo.reset()
        model = peftkern.PeftModel.from_pretrained(Two(), tmp_path / "0").eval()
        if target_rank:
            prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    swapped = compiled(8)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_number(swapped(x), answers[0])
        for number in (1, 2, 0):
            hotswap_adapter(swapped, tmp_path / str(number), "default")
            assert_same_number(swapped(x), answers[number])
        plain = compiled(None)
        plain(x)
        hotswap_adapter(plain, tmp_path / "1", "default")
        with pytest.raises(torch._dynamo.exc.RecompileError):  # other ranks, another program
            plain(x)
    torch._dynamo.reset()


def test_scalings_that_are_tensors_change_no_number():
    """In one adapter's calls, mixed batches, training and merging."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    number = peftkern.get_peft_model(make("llama", **DOUBLE), peftkern.LoraConfig(**config))
    number.add_adapter("other", peftkern.LoraConfig(**config))
    fill(number, seed=3)
    tensor = copy.deepcopy(number)
    prepare_model_for_compiled_hotswap(tensor)
    batch = inputs("llama")
    exact = step(number, batch)
    assert_same_number(step(tensor, batch), exact)
    single = [copy.deepcopy(model).float() for model in (tensor, number)]
    assert_as_good_as_torch(*(step(model, batch) for model in single), exact)
    number.eval(), tensor.eval()
    rows = ["other", "__base__", "default"][: len(batch["input_ids"])]
    with torch.no_grad():
        for more in ({}, {"adapter_names": rows}):
            want = first(number(**batch, **more))
            assert_same_number(first(tensor(**batch, **more)), want)
        layer = tensor.base_model.model.model.layers[0].self_attn.q_proj
        assert "tensor" in layer.decline_reason()
        # what a compiler traces: the factor is in B
        x = torch.randn(3, layer.in_features, **DOUBLE)
        assert_same_number(lora_linear(x, *layer.product_call(x, "default")), layer(x))
        tensor.merge_adapter(), number.merge_adapter()
        assert_same_number(first(tensor(**batch)), first(number(**batch)))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, s: prepare_model_for_compiled_hotswap(m, target_rank=2), ValueError, "larger"),
        (
            lambda m, s: prepare_model_for_compiled_hotswap(nn.Linear(2, 2)),
            ValueError,
            "No adapter layers found",
        ),
        (
            lambda m, s: prepare_model_for_compiled_hotswap(
                torch.compile(m, backend="eager"), target_rank=9
            ),
            ValueError,
            "before",
        ),
        (
            lambda m, s: hotswap_adapter_from_state_dict(
                m, {**s, "base_model.model.x.lora_A.default.weight": s[next(iter(s))]}, "default", C
            ),
            RuntimeError,
            "unexpected keys found",
        ),
        (
            lambda m, s: hotswap_adapter_from_state_dict(
                m, {k: v[..., :-1].repeat(2, 1) for k, v in s.items()}, "default", C
            ),
            ValueError,
            "Incompatible shapes",
        ),
        (
            lambda m, s: (m.merge_adapter(), hotswap_adapter_from_state_dict(m, s, "default", C)),
            ValueError,
            "merged",
        ),
    ],
    ids=["rank", "no_layers", "compiled", "unexpected", "shapes", "merged"],
)
def test_refusals_change_nothing(call, error, says):
    model = peftkern.get_peft_model(make("llama"), C)
    fill(model)
    state = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    with pytest.raises(error, match=says):
        call(model, state)
    now = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(now[n], p) for n, p in state.items())
    assert all(
        isinstance(s, float)
        for m in model.modules()
        if isinstance(m, peftkern.tuners.lora.LoraLayer)
        for s in m.scaling.values()
    )


C = peftkern.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def test_an_adapter_whose_name_begins_alike_is_left_alone(tmp_path):
    saved(tmp_path, peftkern, 0)
    model = loaded(peftkern, tmp_path)
    model.load_adapter(tmp_path / "0", "default_2")
    hotswap_adapter(model, tmp_path / "0", "default")
    places = dict(model.named_parameters())
    for key, value in places.items():
        if ".default_2" in key:
            assert torch.equal(value, places[key.replace(".default_2", ".default")]), key
