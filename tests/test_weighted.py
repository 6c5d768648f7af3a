"""``add_weighted_adapter`` against HF PEFT's, rule by rule, and its refusals."""

from __future__ import annotations

import copy
import re
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.utils import merge_utils as ours_utils
from tests.closeness import assert_same_number
from tests.tiny import assert_same, fill, snapshot

V, E, H, OUT = 20, 12, 18, 10
RULES = [
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
EXACT = ("svd", "cat")


class Net(nn.Module):
    """One of each kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(V, E), nn.Linear(E, H)
        self.conv, self.head = Conv1D(OUT, H), nn.Linear(OUT, 3)

    def forward(self, x):
        return self.head(self.conv(self.lin(self.emb(x))))


def models(*configs, targets=("emb", "lin", "conv"), base=Net, dtype=torch.float64, **both):
    """(peftkern's, HF PEFT's) model with adapters a0, a1, … of equal random weights."""
    torch.manual_seed(0)
    plain = base().to(dtype)
    found = []
    for package in (peftkern, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = [
                package.LoraConfig(**{"target_modules": list(targets), **both, **c})
                for c in configs
            ]
            model = package.get_peft_model(copy.deepcopy(plain), made[0], adapter_name="a0")
            for i, config in enumerate(made[1:], 1):
                model.add_adapter(f"a{i}", config)
        fill(model)
        found.append(model)
    return found


def layers(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}


@pytest.fixture(autouse=True)
def coins(monkeypatch):
    """The same coins for the same size, so that both packages drop the same values."""
    real = torch.bernoulli

    def bernoulli(p):
        return real(p, generator=torch.Generator().manual_seed(p.numel()))

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


def combine(pair, names, weights, **how):
    for model in pair:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(names, weights, "new", **how)


def assert_agree(pair):
    ours, theirs = (layers(m) for m in pair)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].scaling["new"] == theirs[name].scaling["new"], name
        mine, other = (m[name].get_delta_weight("new") for m in (ours, theirs))
        assert other.abs().max() > 1e-2, "a delta of zeros proves nothing"
        assert_same_number(mine, other, name)


@pytest.mark.parametrize("weights", [[1.0, 0.4], [-1.5, 0.7]])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_peft_numbers(rule, weights):
    ranks = ({}, {"r": 7}) if rule == "cat" or rule.endswith("svd") else ({}, {"lora_alpha": 16})
    pair = models({"r": 4, "lora_alpha": 2}, {"r": 4, **ranks[1]})
    combine(pair, ["a0", "a1"], weights, combination_type=rule, density=0.4, svd_rank=3)
    assert_agree(pair)
    ours, theirs = (m.peft_config["new"].to_dict() for m in pair)
    different = {k for k in ours if ours[k] != theirs.get(k)}
    assert different <= {"peft_version", "fan_in_fan_out"}
    assert not any(p.requires_grad for n, p in pair[0].named_parameters() if ".new" in n)
    assert pair[0].active_adapters == ["a0"]
    if rule == "cat" or rule == "svd":  # the definition, not only the other package
        for layer in layers(pair[0]).values():
            want = sum(w * layer.get_delta_weight(f"a{i}") for i, w in enumerate(weights))
            got = layer.get_delta_weight("new")
            u, s, vh = torch.linalg.svd(want)
            keep = 3 if rule == "svd" else len(s)
            best = u[:, :keep] * s[:keep] @ vh[:keep]
            assert_same_number(got, best)


@pytest.mark.parametrize(
    "rule, how",
    [
        ("svd", {"svd_clamp": 0.9}),
        ("svd", {"svd_full_matrices": False, "svd_rank": 2}),
        ("ties_svd", {"svd_clamp": 0.8, "majority_sign_method": "frequency"}),
        ("ties", {"majority_sign_method": "frequency"}),
        ("dare_ties", {"majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 1.0}),
        ("ties", {"density": 0.0}),
    ],
)
def test_the_other_arguments(rule, how):
    pair = models({"r": 4}, {"r": 4})
    combine(pair, ["a1", "a0"], [0.5, 1.0], **{"combination_type": rule, "density": 0.5, **how})
    if how.get("density") == 0.0:
        assert all(not m.get_delta_weight("new").any() for m in layers(pair[0]).values())
    else:
        assert_agree(pair)


class Shapes(nn.Module):
    """Weights of three and four dimensions, and the joined projections of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.line, self.mha = nn.Conv1d(12, 12, 3), nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x):
        y = self.line(self.one(self.wide(x)).flatten(2)).transpose(1, 2)
        return self.mha(y, y.cos(), y)[0]


@pytest.mark.parametrize("rule", ["cat", "svd", "ties_svd", "linear"])
def test_convolutions_and_attention(rule):
    # HF PEFT has no SVD of a Conv1d's update
    targets = ["wide", "one", "mha"] + ["line"] * (rule in ("cat", "linear"))
    pair = [m.eval() for m in models({}, {}, r=3, targets=targets, base=Shapes)]
    combine(pair, ["a0", "a1"], [1.0, -0.5], combination_type=rule, density=0.5)
    g, out = torch.Generator().manual_seed(0), []
    x = torch.randn(2, 3, 6, 6, generator=g, dtype=torch.float64)
    for model in pair:
        before = model(x)
        model.set_adapter("new")
        out.append(model(x))
        assert (out[-1] - before).abs().max() > 1e-3
    assert_same_number(*out)
    bits = [p.detach().clone() for p in pair[0].parameters()]
    # an attention has merged its out_proj when that layer's turn comes
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        pair[0].merge_adapter()
    assert_same_number(pair[0](x), out[0])
    pair[0].unmerge_adapter()
    assert all(torch.equal(*two) for two in zip(pair[0].parameters(), bits, strict=True))
    done = [model.merge_and_unload(safe_merge=True)(x) for model in pair]
    assert_same_number(*done)


def test_three_adapters_of_which_not_all_are_everywhere():
    pair = models(
        {"r": 4}, {"r": 3, "target_modules": ["lin"]}, {"r": 2, "rank_pattern": {"lin": 5}}
    )
    combine(pair, ["a0", "a1", "a2"], [1.0, -2.0, 0.5], combination_type="cat")
    assert_agree(pair)
    assert pair[0].peft_config["new"].r == 4 + 3 + 5


def test_string_targets_become_their_union():
    pair = models({"target_modules": ".*lin"}, {"target_modules": ".*(conv|lin)"}, r=4)
    combine(pair, ["a0", "a1"], [1.0, 1.0])
    assert pair[0].peft_config["new"].target_modules == pair[1].peft_config["new"].target_modules
    assert_agree(pair)


@pytest.mark.parametrize("rule", ["linear", "cat", "svd"])
def test_rank_stabilised_adapters_keep_their_size(rule):
    """HF PEFT gives the new adapter a scaling of √r as well, and so √r times the update."""
    ours, theirs = models({}, {}, r=4, use_rslora=True)
    combine((ours, theirs), ["a0"], [1.0], combination_type=rule)
    for (name, mine), other in zip(layers(ours).items(), layers(theirs).values(), strict=True):
        assert_same_number(mine.get_delta_weight("new"), mine.get_delta_weight("a0"))
        assert other.scaling["new"] == 2.0 and mine.scaling["new"] == 1.0, name


def test_16_bit_adapters_are_combined_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = peftkern.get_peft_model(
            Net().to(dtype),
            peftkern.LoraConfig(target_modules=["lin"], r=4),
            adapter_name="a0",
            autocast_adapter_dtype=False,
        )
        model.add_adapter(
            "a1",
            peftkern.LoraConfig(target_modules=["lin"], r=4),
            autocast_adapter_dtype=False,
        )
        fill(model)
        exact = copy.deepcopy(model).to(torch.float32)
        for m in (model, exact):
            m.add_weighted_adapter(["a0", "a1"], [1.0, -0.3], "new")  # PEFT: no SVD in 16 bits
        mine, wide = (layers(m)["base_model.model.lin"] for m in (model, exact))
        for factor in ("lora_A", "lora_B"):
            got, want = (getattr(m, factor)["new"].weight for m in (mine, wide))
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_lora_bias_and_fully_trained_modules_are_combined():
    ours, theirs = models(
        {"modules_to_save": ["head"]}, {}, r=4, lora_bias=True, targets=("lin", "conv")
    )
    with torch.no_grad():
        ours.base_model.model.head.modules_to_save["a0"].weight.fill_(3.0)
    ours.add_weighted_adapter(["a1", "a0"], [2.0, -1.0], "new", combination_type="cat")
    for layer in layers(ours).values():
        want = sum(
            w * layer.scaling[n] * layer.lora_B[n].bias for n, w in (("a1", 2.0), ("a0", -1.0))
        )
        got = layer.lora_B["new"].bias
        assert_same_number(got, want)
        assert not torch.equal(got, got.float().double())  # nothing went through float32
    assert ours.base_model.model.head.modules_to_save["new"].weight.eq(3.0).all()


def test_a_name_that_is_taken_changes_nothing():
    ours, _ = models({"r": 4}, {"r": 4})
    before = snapshot(ours)
    ours.add_weighted_adapter(["a0"], [1.0], "a1")
    assert_same(ours, before)


TWO = (["a0", "a1"], [1.0, 1.0])
REFUSED = [
    ((["a0", "no"], [1.0, 1.0]), {}, {}, "Adapter no does not exist"),
    (TWO, {"combination_type": "linear"}, {"r": 8}, "All adapters must have the same r value"),
    (TWO, {"combination_type": "magnitude_prune", "density": 0.5}, {"r": 8}, "the same r value"),
    (TWO, {"combination_type": "sum"}, {}, "Invalid combination_type: sum"),
    (TWO, {}, {"target_modules": "lin"}, "should follow the same target modules type"),
]


@pytest.mark.parametrize("args, how, second, message", REFUSED)
def test_what_peft_refuses(args, how, second, message):
    ours, theirs = models({"r": 4}, {"r": 4, **second})
    before = snapshot(ours)
    for model in (ours, theirs):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.add_weighted_adapter(*args, "new", **how)
    assert_same(ours, before)


@pytest.mark.parametrize(
    "args, how, second, message",
    [
        (([], []), {}, {}, "Found no adapter matching the names in"),
        ((["a0", "a1"], [1.0]), {}, {}, "`weights` should have one number for each of 2 adapters"),
        (TWO, {"combination_type": "ties"}, {}, "`density` is needed for 'ties'"),
        (TWO, {"combination_type": "ties", "density": -1}, {}, "Density should be >= 0"),
        (TWO, {"svd_clamp": 2.0}, {}, "`svd_clamp` should be in [0, 1]"),
        (TWO, {"combination_type": "linear"}, {"r": 2, "rank_pattern": {"lin": 4}}, "rank_pattern"),
    ],
)
def test_what_peft_lets_pass_or_finds_too_late(args, how, second, message):
    ours, _ = models({"r": 4}, {"r": 4, **second})
    before = snapshot(ours)
    with pytest.raises(ValueError, match=re.escape(message)):
        ours.add_weighted_adapter(*args, "new", **how)
    assert_same(ours, before)


def test_an_error_on_the_way_leaves_no_half_made_adapter(monkeypatch):
    ours, _ = models({"r": 4}, {"r": 4})
    before = snapshot(ours)
    calls = []
    qr = torch.linalg.qr

    def second_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return qr(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "qr", second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.add_weighted_adapter(*TWO, "new")
    assert len(calls) > 2
    assert_same(ours, before)


def test_modules_that_both_train_in_full_are_refused():
    ours, theirs = models({}, {}, r=4, targets=("lin",), modules_to_save=["head"])
    before = snapshot(ours)
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="modules_to_save, but found 1 such"):
            model.add_weighted_adapter(*TWO, "new")
    assert_same(ours, before)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 2, 2), (11,)])
def test_the_pruning_maths(shape):
    from peft.utils import merge_utils as theirs_utils

    g = torch.Generator().manual_seed(0)
    tasks = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]
    tasks[1].view(-1)[:3] = 0.0
    w = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    for name in ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"):
        how = {} if name == "task_arithmetic" else {"density": 0.55}
        for sign in ("total", "frequency") if name.endswith("ties") else (None,):
            more = {**how, **({"majority_sign_method": sign} if sign else {})}
            mine, other = (getattr(u, name)(tasks, w, **more) for u in (ours_utils, theirs_utils))
            assert_same_number(mine, other, name)
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        assert ours_utils.prune(tasks[0], 1.5, "magnitude") is tasks[0]
    for density, method, text in ((-0.1, "random", "Density should be"), (0.5, "x", "Unknown")):
        with pytest.raises(ValueError, match=text):
            ours_utils.prune(tasks[0], density, method)
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):
        ours_utils.calculate_majority_sign_mask(tasks[0], "median")
    assert not ours_utils.prune(tasks[0], 0.0, "random", rescale=True).any()
