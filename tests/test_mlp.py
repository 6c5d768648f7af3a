"""MLPs train as one operation: found by formula, HF PEFT's numbers, declined with a reason."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftkern
from peftkern.tuners.lora.mlp import release_blocks
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.mlps import MLP, SAYS, adapted, words
from tests.models import build
from tests.tiny import fill, inputs, pair, step

FAMILIES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), "silu"),
    **dict.fromkeys(("gemma", "gemma2"), "gelu_tanh"),
    "phi3": "silu", "gpt2": "gelu_tanh",
}  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_pefts_numbers(blocks, family, dropout):
    ours, theirs = adapted(family, dropout=dropout)
    batch = inputs(family)
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert blocks == [FAMILIES[family]] * 2  # one in each layer
    names = {"phi3": 2, "gpt2": 2}.get(family, 3)
    assert len(words(ours)) == 2 * names and all(SAYS in w for w in words(ours))
    with torch.no_grad():  # the separate operations have ways of their own for few rows
        assert_same_number(ours.eval()(**batch).logits, theirs.eval()(**batch).logits)
    assert len(blocks) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "targets", [MLP[:1], MLP[1:2], MLP[2:], MLP[:2], MLP[1:], MLP[::2], MLP], ids=str
)
def test_any_of_the_linears_may_be_adapted(blocks, targets, dropout):
    ours, theirs = adapted(targets=targets, dropout=dropout)
    batch = inputs("llama")
    assert_same_number(step(ours, batch), step(theirs, batch))
    # before the first layer's down nothing trains when down alone is adapted
    assert len(blocks) == (1 if targets == MLP[2:] else 2)
    assert len(words(ours)) == 2 * len(targets)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_train(blocks, bias):
    base = build("llama", "CAUSAL_LM", mlp_bias=True).double()
    ours, theirs = pair(
        "llama", dtype=torch.float64, base=base, bias=bias, target_modules=["up_proj", "down_proj"]
    )
    batch = inputs("llama")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [True, False])
def test_errors_are_not_above_pefts(blocks, dtype, narrow):
    how = {"autocast_adapter_dtype": not narrow, "targets": MLP}
    ours, theirs = adapted(dtype=dtype, **how)
    exact, _ = adapted(**how)
    batch = inputs("llama")
    assert_as_good_as_torch(step(ours, batch), step(theirs, batch), step(exact, batch))
    assert len(blocks) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast(blocks, dropout):
    ours, theirs = adapted(dtype=torch.float32, targets=MLP, dropout=dropout)
    exact, _ = adapted(targets=MLP, dropout=dropout)
    batch = inputs("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found = [step(model, batch) for model in (ours, theirs)]
    assert len(blocks) == 2
    assert_as_good_as_torch(*found, step(exact, batch))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(blocks, reentrant, dropout):
    ours, theirs = adapted(dropout=dropout)
    batch = inputs("llama")
    plain = step(theirs, batch)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_number(step(ours, batch), plain)
    # the first pass of a reentrant checkpoint has no gradients
    assert len(blocks) == (2 if reentrant and not dropout else 4)


def kept_of_a_layer(model, x):
    layer = model.get_base_model().model.layers[0]
    angles = model.get_base_model().model.rotary_emb(x, torch.arange(x.shape[1])[None])
    known = {t.untyped_storage().data_ptr() for t in (x, *angles, *model.parameters())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, position_embeddings=angles)
    sizes = sum(storage.nbytes() for storage in found.values())
    del y
    return sizes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_llama_layer_keeps_three_quarters(blocks, dropout):
    base = build("llama", "CAUSAL_LM", width=64, inner=224, heads=4, kv=1)
    config = peftkern.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    model = peftkern.get_peft_model(base, config).train()
    x = torch.randn(2, 32, 64).requires_grad_()
    whole = kept_of_a_layer(model, x)
    assert len(blocks) == 1
    release_blocks(model, everywhere=True)
    assert whole <= 0.75 * kept_of_a_layer(model, x)
    assert len(blocks) == 1


# ------------------------------------------------------------------------------ declined


def _hook(of):
    def change(model, mlp):
        mlp.get_submodule(of).register_forward_hook(lambda m, i, out: out * 1.5)

    return change


class Negated(nn.Module):
    def forward(self, x):
        return -F.silu(x)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _double(name):
    def change(model, mlp):
        linear = Twice(16, 16, bias=False)
        layer = mlp.get_submodule(name)
        linear.weight = (layer.base_layer if hasattr(layer, "base_layer") else layer).weight
        linear.in_features, linear.out_features = linear.weight.shape[::-1]
        if hasattr(layer, "base_layer"):
            layer.base_layer = linear
        else:
            setattr(mlp, name, linear)

    return change


def _several(model, mlp):
    for m in model.modules():
        if hasattr(m, "lora_A") and hasattr(m, "set_adapter"):
            m.set_adapter(["default", "other"])


def _train(of):
    return lambda model, mlp: mlp.get_submodule(of).weight.requires_grad_()


def _own_forward(model, mlp):
    mlp.forward = lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * 2


def _disable(model, mlp):
    mlp.gate_proj.enable_adapters(False)


def _merge(model, mlp):
    mlp.gate_proj.merge()


def _scale(model, mlp):
    mlp.gate_proj.scaling["default"] = torch.tensor(2.0)


def _meta_free(model, mlp):
    mlp.act_fn = Negated()


# up_proj has no adapter
CHANGES = {
    "a hook on an adapted linear": (_hook("gate_proj"), "gate_proj has hooks"),
    "a hook on a plain linear": (_hook("up_proj"), "up_proj has hooks"),
    "a hook on a base layer": (_hook("down_proj.base_layer"), "base layer has hooks"),
    "a hook on the activation": (_hook("act_fn"), "act_fn has hooks"),
    "another activation": (_meta_free, "the activation Negated is not known"),
    "another base layer": (_double("gate_proj"), "Twice computes its product itself"),
    "another plain linear": (_double("up_proj"), "Twice computes its product itself"),
    "several adapters": (_several, "several adapters are active"),
    "a plain weight trains": (_train("up_proj"), "up_proj: its weight requires a gradient"),
    "a base weight trains": (
        _train("gate_proj.base_layer"),
        "gate_proj: its weight requires a gradient",
    ),
    "its own forward": (_own_forward, "the forward of the MLP was replaced"),
    "disabled": (_disable, "adapters are disabled"),
    "merged": (_merge, "merged"),
    "a tensor as scaling": (_scale, "the scaling is a tensor"),
}


@pytest.mark.filterwarnings("ignore:Already")
@pytest.mark.parametrize("library", ["peftkern", "fused HF PEFT"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_block_runs_exactly_when_explain_says_so(blocks, library, change):
    ours, theirs = adapted(targets=["gate_proj", "down_proj"])
    if library == "fused HF PEFT":
        ours = peftkern.fuse(copy.deepcopy(theirs))
    for model in (ours, theirs):
        kind = peft if model is theirs or library != "peftkern" else peftkern
        model.add_adapter("other", kind.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"]))
        fill(model, "other")
    batch = inputs("llama")
    assert_same_number(step(ours, batch), step(theirs, batch))
    assert len(blocks) == 2 and all(SAYS in w for w in words(ours))
    blocks.clear()
    do, reason = CHANGES[change]
    for model in (ours, theirs):
        do(model, model.get_base_model().model.layers[1].mlp)
    assert_same_number(step(ours, batch), step(theirs, batch))
    both = change == "several adapters"
    assert len(blocks) == (0 if both else 1)
    rows = [r for r in peftkern.explain(ours) if "layers.1" in r.name]
    assert any(reason in row.reason for row in rows)
    assert not any(SAYS in row.reason for row in rows)


def test_dora_on_one_of_them_declines(blocks):
    models = []
    for library in (peftkern, peft):
        model = library.get_peft_model(
            build("llama").double(), library.LoraConfig(r=4, target_modules=MLP[:2])
        )
        other = library.LoraConfig(r=4, target_modules=MLP[2:], use_dora=True)
        model.add_adapter("other", other)
        fill(model)
        model.base_model.set_adapter(["default", "other"])
        models.append(model.train())
    batch = inputs("llama")
    assert_same_number(*(step(model, batch) for model in models))
    assert blocks == []


def test_the_reason_is_logged_once(blocks, caplog, monkeypatch):
    from peftkern.ops import notes

    monkeypatch.setattr(notes, "_said", set())
    ours, _ = adapted()
    caplog.set_level("INFO", logger="peftkern")
    _hook("act_fn")(ours, ours.get_base_model().model.layers[0].mlp)
    for _ in range(2):
        step(ours, inputs("llama"))
    assert caplog.text.count("an MLP trains as separate operations: act_fn has hooks") == 1
    assert len(blocks) == 2


def test_names_for_each_row_run_the_separate_operations(blocks):
    ours, theirs = adapted()
    batch = inputs("llama")
    names = ["default", "__base__", "default"]
    found = [m.eval()(**batch, adapter_names=names).logits for m in (ours, theirs)]
    assert_same_number(*found)
    assert blocks == []
