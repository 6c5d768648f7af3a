"""Projections of one input train as one operation, with the same numbers as separate ones."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import peftkern
from peftkern.ops.lora import lora_linear
from peftkern.ops.lora_group import lora_group
from peftkern.ops.projection import Projection
from peftkern.tuners.lora import group as module
from peftkern.tuners.lora.linear import Linear
from peftkern.tuners.lora.mlp import release_blocks
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.models import build

K = 12
DOUBLE = {"dtype": torch.float64}


class Attention(nn.Module):
    """Reads one tensor three times, or (``cross``) keys and values from another one."""

    def __init__(self, cross=False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, n) for n in (8, 6, 6))
        self.cross = cross
        self.order = ("q_proj", "k_proj", "v_proj")

    def forward(self, x):
        other = x * 1.5 if self.cross else x
        out = {name: getattr(self, name)(x if name == "q_proj" else other) for name in self.order}
        return torch.cat([out[name] for name in ("q_proj", "k_proj", "v_proj")], -1)


def pair(
    cross=False,
    dropout=0.0,
    targets=("q_proj", "k_proj", "v_proj"),
    dtype=torch.float64,
    **settings,
):
    torch.manual_seed(0)
    base = Attention(cross).to(dtype)
    settings = dict(
        r=3, target_modules=list(targets), lora_dropout=dropout, init_lora_weights=False, **settings
    )
    ours = peftkern.get_peft_model(copy.deepcopy(base), peftkern.LoraConfig(**settings))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def group_of(model):
    return model.base_model.model.q_proj._group


@pytest.fixture
def operations(monkeypatch):
    """Sizes of the groups that are computed."""
    sizes = []
    real = module.lora_group
    monkeypatch.setattr(
        module,
        "lora_group",
        lambda x, members, *rest: sizes.append(len(members)) or real(x, members, *rest),
    )
    return sizes


def step(model, x, seed=3):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(ours, theirs, x, steps=3):
    for i in range(steps):
        assert_same_number(step(ours, x, i), step(theirs, x, i))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_group_is_computed_at_once(operations, dropout, bias):
    ours, theirs = pair(dropout=dropout, bias=bias)
    x = torch.randn(2, 5, K, **DOUBLE)
    assert_same(ours, theirs, x)
    assert operations == [3, 3, 3]
    assert "trains as one operation with k_proj, v_proj" in peftkern.explain(ours)[0].reason
    assert group_of(ours)._local.__dict__["stash"] is None  # nothing is kept after a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_good_as_pefts(operations, dtype):
    ours, theirs = pair(dtype=dtype)
    x = torch.randn(8, 5, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = step(copy.deepcopy(theirs).double(), x.double())
    assert_as_good_as_torch(step(ours, x), step(theirs, x), exact)
    assert operations == [3]


def test_inputs_that_differ_are_not_grouped(operations, caplog):
    caplog.set_level("INFO", logger="peftkern")
    ours, theirs = pair(cross=True)
    assert_same(ours, theirs, torch.randn(2, 5, K, **DOUBLE), steps=4)
    assert operations == [3, 3]  # found out in the first step, settled before the second
    assert group_of(ours).off and "inputs differ" in peftkern.explain(ours)[0].reason
    assert caplog.text.count("q_proj, k_proj, v_proj are not grouped") == 1
    assert "stash" not in group_of(ours)._local.__dict__  # the last input is not kept alive


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_set_is_broken_up_only_between_steps(reentrant):
    """Two forwards before one backward, as preference losses do; recomputed blocks must match."""
    ours, theirs = pair(cross=True, dropout=0.3)
    x = torch.randn(4, K, **DOUBLE)
    for _ in range(3):
        grads = []
        for model in (ours, theirs):
            if reentrant is not None:
                inner = model.base_model.model
                block = type(inner).forward.__get__(inner)
                inner.forward = lambda z, block=block: torch.utils.checkpoint.checkpoint(
                    block, z, use_reentrant=reentrant
                )
            torch.manual_seed(3)
            z = x.clone().requires_grad_(True)
            (model(z).square().sum() + model(z).square().sum()).backward()
            grads.append(z.grad)
            model.base_model.model.__dict__.pop("forward", None)
    assert_same_number(*grads)  # ungrouped by now: PEFT's own masks
    assert group_of(ours).off


def test_a_member_that_is_never_called_breaks_the_set(operations):
    ours, _ = pair()
    ours.base_model.model.order = ("q_proj", "v_proj")
    ours.base_model.model.k_proj.forward = lambda x: x[..., :6]
    inner = ours.base_model.model
    inner.forward = lambda x: torch.cat([inner.q_proj(x), inner.v_proj(x)], -1)
    for _ in range(4):
        ours(torch.randn(2, K, **DOUBLE)).sum().backward()
    assert group_of(ours).off and len(operations) < 4


@pytest.mark.parametrize("change", ["adapter", "weight", "scaling"])
def test_a_change_between_two_members_is_seen(change):
    results = []
    for model in pair():
        other = {"q_proj": 2, "k_proj": 4}
        config = model.peft_config["default"]
        fresh = type(config)(r=3, target_modules=list(other), init_lora_weights=False)
        model.add_adapter("b", fresh)
        inner, x = (
            model.base_model.model,
            torch.randn(1, K, generator=torch.manual_seed(0), **DOUBLE),
        )
        torch.nn.init.constant_(inner.k_proj.lora_A["b"].weight, 0.1)
        torch.nn.init.constant_(inner.k_proj.lora_B["b"].weight, 0.1)
        q = inner.q_proj(x)
        if change == "adapter":
            model.set_adapter("b")
        elif change == "weight":
            with torch.no_grad():
                inner.k_proj.lora_B["default"].weight.mul_(3)
        else:
            inner.k_proj.scaling["default"] = 7.0
        results.append(torch.cat([q, inner.k_proj(x)], -1))
    assert_same_number(*results)


@pytest.mark.parametrize("order", [("k_proj", "v_proj", "q_proj"), ("q_proj", "k_proj", "v_proj")])
def test_reentrant_checkpointing_drops_the_same_elements_in_any_order(order):
    ours, _ = pair(dropout=0.4)
    inner = ours.base_model.model
    inner.order = order
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        z = torch.ones(4, K, requires_grad=True, **DOUBLE)
        y = (
            torch.utils.checkpoint.checkpoint(inner, z, use_reentrant=True)
            if checkpointed
            else inner(z)
        )
        y.square().sum().backward()
        grads.append(z.grad)
    assert_same_number(*grads)


def test_order_and_members_do_not_matter(operations):
    ours, theirs = pair()
    for model in (ours, theirs):
        model.base_model.model.order = ("v_proj", "q_proj", "k_proj")
    assert_same(ours, theirs, torch.randn(4, K, **DOUBLE))
    assert operations == [3, 3, 3]
    ours, theirs = pair(targets=("q_proj", "v_proj"))
    assert_same(ours, theirs, torch.randn(4, K, **DOUBLE))
    assert operations == [3, 3, 3, 2, 2, 2]


def test_another_rank_and_a_hook_on_one_member(operations):
    ours, theirs = pair(rank_pattern={"k_proj": 5})
    x = torch.randn(4, K, **DOUBLE)
    assert_same(ours, theirs, x, steps=2)
    seen = []
    for model in (ours, theirs):
        model.base_model.model.k_proj.register_forward_hook(lambda m, i, out: out * 2)
        model.base_model.model.v_proj.base_layer.register_forward_hook(
            lambda m, i, out: seen.append(1)
        )
    assert_same(ours, theirs, x, steps=2)
    assert operations == [3, 3, 2, 2] and len(seen) == 4  # v calls its base layer, so the hook runs


def test_an_input_changed_in_between_is_seen(operations):
    ours, theirs = pair()
    x = torch.randn(4, K, **DOUBLE)
    assert_same(ours, theirs, x, steps=2)
    results = []
    for model in (ours, theirs):
        inner, z = model.base_model.model, x.clone()
        q = inner.q_proj(z)
        z.mul_(2)
        results.append(torch.cat([q, inner.k_proj(z)], -1))
    assert_same_number(*results)


def test_outputs_nobody_uses_and_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    members = [
        Projection(leaf(n, K), leaf(n), leaf(2, K), leaf(n, 2), 0.5, p, False)
        for n, p in ((4, 0.0), (5, 0.3))
    ]
    leaves = [x] + [t for m in members for t in m.tensors]

    def run(*tensors):
        torch.manual_seed(1)
        built = [
            m._replace(
                **dict(zip(("weight", "bias", "A", "B"), tensors[1 + 4 * i :][:4], strict=True))
            )
            for i, m in enumerate(members)
        ]
        return lora_group(tensors[0], built)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    torch.manual_seed(1)
    first, _ = lora_group(x, members)
    torch.manual_seed(1)
    alone = lora_linear(x, *members[0])
    assert_same_number(torch.autograd.grad(first.sum(), x), torch.autograd.grad(alone.sum(), x))


def test_no_grad_threads_copies_and_checkpointing(operations):
    ours, theirs = pair(dropout=0.2)
    x = torch.randn(4, K, **DOUBLE)
    assert_same(ours, theirs, x, steps=2)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert_same_number(ours(x), theirs(x))
    assert operations == [3, 3]  # without gradients or masks each is computed by itself
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        inner = other.base_model.model
        assert group_of(other).layers == [inner.q_proj, inner.k_proj, inner.v_proj]
        assert group_of(other) is not group_of(ours)
    ours.train()
    plain = step(ours, x)
    torch.manual_seed(3)
    z = x.clone().requires_grad_(True)
    y = torch.utils.checkpoint.checkpoint(ours, z, use_reentrant=False)
    y.square().sum().backward()
    assert_same_number(z.grad, plain["x"])


def test_masks_in_inference_mode(operations):
    """Its tensors have no version to tell whether a stash still holds."""
    ours, theirs = pair(dropout=0.2)
    x = torch.randn(4, K, **DOUBLE)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        with torch.inference_mode():
            outputs.append(model(x * 1.0))
    assert_same_number(*outputs)
    with torch.inference_mode():  # weights without versions, under an input that has one
        frozen = copy.deepcopy(ours)
    with torch.no_grad():
        frozen(x)
    assert operations == [3]


def test_sets_are_found_in_models():
    bert = build("bert", None, layers=1).train()
    model = peftkern.get_peft_model(bert, peftkern.LoraConfig(target_modules="all-linear"))
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert sorted(len(m._group.layers) for m in layers if m._group) == [3, 3, 3]
    t5 = build("t5", layers=1).train()
    model = peftkern.get_peft_model(
        t5, peftkern.LoraConfig(target_modules=["q", "k", "v"], task_type="SEQ_2_SEQ_LM")
    )
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
    decoder = model.base_model.model.decoder.block[0]
    assert not decoder.layer[0].SelfAttention.q._group.off
    assert decoder.layer[1].EncDecAttention.q._group is None


# how many layers the sets of one block hold; the layers of phi3 and gpt2 are fused already
FAMILIES = {family: [3, 2] for family in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2")}
FAMILIES |= {"phi3": [], "gpt2": [], "bert": [3]}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_group_what_shares_its_input_with_the_numbers_of_separate_layers(
    operations, family, dropout
):
    sizes = FAMILIES[family]
    more = {"is_decoder": True} if family == "bert" else {}
    base = build(family, "CAUSAL_LM", heads=4, kv=2, **more).double().train()
    config = peftkern.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=3, lora_dropout=dropout,
        init_lora_weights=False, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    ours = peftkern.get_peft_model(base, config)
    release_blocks(ours, everywhere=True)  # gate and up are a group where the MLP is not one
    layers = [m for m in ours.modules() if isinstance(m, Linear)]
    groups = {id(m._group): m._group for m in layers if m._group is not None}
    assert sorted(len(g.layers) for g in groups.values()) == sorted(sizes * 2)
    ids = torch.tensor([[1, 5, 7, 9, 2], [3, 3, 8, 1, 4]])
    found = []
    for together in (True, False):
        if not together:
            for layer in layers:
                layer.__dict__["_group"] = None
        ours.zero_grad()
        torch.manual_seed(3)
        operations.clear()
        out = ours(input_ids=ids, labels=ids)
        assert len(operations) == (2 * len(sizes) if together else 0)
        out.loss.backward()
        found.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
        found[-1]["logits"] = out.logits.detach()
        assert not any(g.off or g.broken for g in groups.values())
    assert_same_number(*found)
