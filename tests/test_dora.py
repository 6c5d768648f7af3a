"""Tests only for DoRA, against HF PEFT: changed layers, norms, training, convolutions."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.helpers import DoraCaching
from peftkern.tuners.lora import dora as dora_module
from peftkern.tuners.lora.base import LoraLayer
from peftkern.tuners.lora.dora import known_weight
from tests.changes import CHANGES, KINDS, K, N, layer_of
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.test_layers import assert_agree, layer_pair, results, what_is_said
from tests.tiny import first, inputs, loss_of, make, pair, step

# HF PEFT fails on "offloaded" and "fsdp1": it reads a weight that is elsewhere
DONE = """base_data a_data b_data in_place new_parameter no_more_bias other_rank swap_base
scaling b_bias swap_a_dict a_subclass trained_base frozen_a double dropout_p
dropout_eval dropout_all dropout_other dropout_patched base_hook a_hook b_pre_hook
patched_forward subclass parametrised weight_is_buffer disabled other_active
both_active deleted""".split()
TARGETS = {
    "llama": ["embed_tokens", "q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "wte"],
}


def moved(*models):
    """The same models with magnitudes that are not the norms any more."""
    for model in models:
        g = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(0.5 + torch.rand(parameter.shape, generator=g))
    return models


@pytest.mark.parametrize("change", DONE)
def test_layers_agree_whatever_was_done_to_them(change):
    dtype = torch.float32 if change == "double" else torch.float64
    ours, theirs = moved(*layer_pair(dropout=0.3, use_dora=True, dtype=dtype))
    if change == "double":
        results(ours, torch.ones(2, 5, K))
    else:
        assert_agree(ours, theirs)
    for model in (ours, theirs):
        with what_is_said(change):
            CHANGES[change](layer_of(model))
    assert_agree(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_layouts_and_row_counts(kind, rows, p):
    ours, theirs = moved(*layer_pair(kind, p, use_dora=True))
    assert_agree(ours, theirs, rows)
    [row] = peftkern.explain(ours)
    assert row.fused and row.reason == "DoRA: one operation"
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    grads = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        y = model(x)
        y += 1
        y.relu_()
        grads.append(torch.autograd.grad(y.square().sum(), [x, *trained(model)]))
    assert_same_number(*grads)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_an_offloaded_weight_is_an_error():
    ours, _ = layer_pair(use_dora=True)
    CHANGES["offloaded"](layer_of(ours))
    with pytest.raises(RuntimeError, match="weight of its Linear.*meta"):
        ours(torch.randn(2, K, dtype=torch.float64))


def test_a_sharded_adapter_is_called_and_not_read():
    ours, theirs = moved(*layer_pair(use_dora=True))
    CHANGES["fsdp1"](layer_of(ours))
    x = torch.randn(4, K, dtype=torch.float64)
    assert_same_number(ours(x), theirs(x))


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_three_steps_of_training(family, p):
    settings = dict(use_dora=True, lora_dropout=p, target_modules=TARGETS[family])
    models = pair(family, dtype=torch.float64, **settings)
    moved(*models)
    batch = inputs(family)
    for model in models:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(trained(model.train()), lr=0.3)
        model.losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model(**batch))
            loss.backward()
            optimizer.step()
            model.losses.append(loss.detach())
    ours, theirs = models
    assert_same_number(ours.losses, theirs.losses)
    names = [n for n, q in theirs.named_parameters() if q.requires_grad]
    assert names == [n for n, q in ours.named_parameters() if q.requires_grad]
    assert any("lora_magnitude_vector.default.weight" in n for n in names)
    assert_same_number(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_fp32_errs_no_more_than_peft():
    ours, theirs = moved(*pair("gpt2", use_dora=True, target_modules=TARGETS["gpt2"]))
    models = ours, theirs, copy.deepcopy(theirs).double()
    assert_as_good_as_torch(*(step(model, inputs("gpt2")) for model in models))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bf16_errs_no_more_than_peft(autocast, p):
    """float32 adapters under bf16, and bf16 throughout; against the same numbers in float64."""
    settings = dict(use_dora=True, lora_dropout=p, target_modules=["q_proj", "down_proj"])
    ours, theirs = pair("llama", None, torch.bfloat16, autocast, **settings)
    moved(ours, theirs)
    layers = [m for m in ours.modules() if isinstance(m, LoraLayer)]
    others = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    found = [{what: {} for what in "yxabm"} for _ in range(3)]
    torch.manual_seed(0)
    for number, (layer, other) in enumerate(zip(layers, others, strict=True)):
        x = torch.randn(40, layer.in_features).bfloat16()
        dy = torch.randn(40, layer.out_features).bfloat16()
        # PEFT in float64, with PEFT's own layer: the mask is the same where the draws are
        for seen, each in zip(found, (layer, other, copy.deepcopy(other).double()), strict=True):
            wide = each.lora_A["default"].weight.dtype == torch.float64
            keep = torch.Generator().manual_seed(3)
            mask = torch.rand(40, layer.in_features, generator=keep) < 1 - p
            each.lora_dropout["default"] = Fixed(mask, p) if p else nn.Identity()
            each.train()
            leaf = (x.double() if wide else x.clone()).requires_grad_()
            y = each(leaf)
            wanted = [leaf, *trained(each)]
            values = [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]
            for what, value in zip("yxabm", values, strict=True):
                seen[what][number] = value.detach()
    for what in "yxabm":
        assert_as_good_as_torch(*(seen[what] for seen in found))


class Fixed(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask, p):
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x):
        return x * self.mask / (1 - self.p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_first(dtype):
    base = make("gpt2", None, dtype)
    batch = {"input_ids": inputs("gpt2")["input_ids"]}
    before = first(base(**batch))
    targets = ["c_attn", "c_proj", "wte"]
    config = peftkern.LoraConfig(use_dora=True, target_modules=targets, fan_in_fan_out=True)
    assert torch.equal(first(peftkern.get_peft_model(base, config).eval()(**batch)), before)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize(
    "orders", [["plain", "dora"], ["dora", "plain"], ["dora", "more"]], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_their_merged_weight(kind, orders):
    """The output of adapters one after the other is that of one weight, which merging makes."""
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[kind]()).double()
    names = dict(plain=False, dora=True, more=True)
    models = []
    for library in (peftkern, peft):
        configs = {
            n: library.LoraConfig(
                r=3,
                target_modules=["0"],
                init_lora_weights=False,
                use_dora=d,
                fan_in_fan_out=kind == "conv1d",
            )
            for n, d in names.items()
        }
        model = library.get_peft_model(copy.deepcopy(base), configs["plain"], "plain")
        for name in ("dora", "more"):
            model.add_adapter(name, configs[name])
        model.base_model.set_adapter(orders)
        models.append(model)
    models[0].load_state_dict(models[1].state_dict())
    ours, theirs = moved(*models)
    assert_agree(ours, theirs)
    layer, other = layer_of(ours), layer_of(theirs)
    raw = layer.base_layer.weight.detach().clone()
    x = torch.randn(4, K, dtype=torch.float64)
    want = ours.eval()(x)
    for model in models:
        model.merge_adapter(safe_merge=True)
    assert_same_number(layer.base_layer.weight, other.base_layer.weight)
    assert_same_number(ours(x), want)
    ours.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, raw)
    assert_same_number(ours(x), want)
    # one after the other, the norm stays that of the weight without adapters
    for name in orders:
        layer.merge(adapter_names=[name])
    assert_same_number(ours(x), want)


def test_rows_may_name_lora_adapters_beside_dora():
    models = layer_pair(names=("dora",), use_dora=True)
    plain = dict(r=2, target_modules=["0"], init_lora_weights=False)
    for model, library in zip(models, (peftkern, peft), strict=True):
        model.add_adapter("plain", library.LoraConfig(**plain))
        model.eval()
    models[0].load_state_dict(models[1].state_dict())
    x, rows = torch.randn(3, K, dtype=torch.float64), ["plain", "__base__", "plain"]
    mine, other = (model(x, adapter_names=rows) for model in models)
    assert_same_number(mine, other)
    for model in models:
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
            model(x, adapter_names=["plain", "dora", "plain"])


def caches(model):
    return [m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")]


def test_caching_lasts_while_it_may():
    ours, _ = pair("llama", use_dora=True, target_modules=["embed_tokens", "q_proj"])
    batch = inputs("llama")
    kept = caches(ours)
    want = first(ours.eval()(**batch))
    assert len(kept) == 3 and not any(kept)
    with DoraCaching():
        assert torch.equal(first(ours(**batch)), want) and all(kept)
        norms = kept[1]["norms"]
        assert torch.equal(first(ours(**batch)), want) and kept[1]["norms"] is norms
        layer = ours.base_model.model.model.layers[0].self_attn.q_proj
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2)  # torch counts this write
        assert not torch.equal(first(ours(**batch)), want) and kept[1]["norms"] is not norms
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2)
        with torch.inference_mode():
            ours(**batch)
        ours(**batch).logits.sum().backward()  # takes no norms of inference mode
        with DoraCaching(enabled=False):
            ours(**batch)
        assert not any(kept)
        ours(**batch)
        ours.train()
        assert not any(kept)
        ours(**batch)
        assert not any(kept)
    assert dora_module.ENABLE_DORA_CACHING is False
    DoraCaching()(enabled=True)
    try:
        ours.eval()(**batch)
        assert all(kept)
    finally:
        DoraCaching()(enabled=False)


def test_a_row_of_zeros_stays_zero():
    """HF PEFT divides 0 by 0 there."""
    base = nn.Sequential(nn.Linear(K, N)).double()
    base[0].weight.data[2] = 0
    config = peftkern.LoraConfig(use_dora=True, target_modules=["0"])
    model = peftkern.get_peft_model(copy.deepcopy(base), config)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    assert_same_number(model(x), base(x))
    model(x).square().sum().backward()
    assert all(q.grad.isfinite().all() for q in [x, *trained(model)])


def test_explain_names_what_is_not_fused():
    ours, _ = pair("llama", use_dora=True, target_modules=["embed_tokens", "q_proj"])
    ours.base_model.model.model.layers[1].self_attn.q_proj.base_layer.register_forward_hook(
        lambda *a: None
    )
    rows = {row.name.split("model.")[-1]: row for row in peftkern.explain(ours)}
    assert rows["layers.0.self_attn.q_proj"].fused
    assert not rows["layers.1.self_attn.q_proj"].fused
    assert rows["layers.1.self_attn.q_proj"].reason.startswith("DoRA; base layer has hooks")
    assert not rows["embed_tokens"].fused and "DoRA" in rows["embed_tokens"].reason
    assert ours.base_model.model.model.layers[0].self_attn.q_proj.decline_reason() is not None


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"megatron_config": {"x": 1}}], ids=str)
def test_what_does_not_go_with_it(settings):
    for library in (peftkern, peft):
        with pytest.raises(ValueError) as error:
            library.LoraConfig(use_dora=True, **settings)
        said = str(error.value)
    assert said.split(",")[0] in str(error.value)


def test_a_weight_of_an_unknown_format_is_refused():
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="DoRA needs the weight of a Linear.*int8"):
        known_weight(base)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_in_one_graph_and_under_transforms(p):
    ours, _ = moved(*layer_pair(use_dora=True, dropout=p))
    x, found = torch.randn(4, K, dtype=torch.float64), []
    for call in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        y = call(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), trained(ours))])
    torch._dynamo.reset()
    parameters = {n: q.detach() for n, q in ours.named_parameters() if q.requires_grad}

    def loss(values):
        return torch.func.functional_call(ours, values, (x,)).square().sum()

    torch.manual_seed(3)
    if p == 0.0:  # vmap and grad want to be told about random numbers
        grads = torch.func.grad(loss)(parameters)
        found.append([found[0][0], *(grads[n] for n in parameters)])
    for other in found[1:]:
        assert_same_number(other, found[0])


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions(kind, groups, p):
    dims = [nn.Conv1d, nn.Conv2d, nn.Conv3d].index(kind) + 1
    torch.manual_seed(0)
    base = nn.Sequential(kind(4, 6, 3, padding=1, groups=groups).double())
    settings = dict(
        r=4, use_dora=True, lora_dropout=p, target_modules=["0"], init_lora_weights=False
    )
    models = []
    for library in (peftkern, peft):
        models.append(library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**settings)))
    ours, theirs = models
    shapes = [{n: q.shape for n, q in m.named_parameters()} for m in models]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(2, 4, *[5] * dims, dtype=torch.float64), []
    for model in moved(ours, theirs):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        y = model.train()(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *trained(model)])])
    assert_same_number(*found)
    if groups == 1:
        for model in models:
            model.merge_adapter()
        weights = [layer_of(m).base_layer.weight.detach() for m in models]
        assert_same_number(*weights)
