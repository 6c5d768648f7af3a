"""Initialisations of A and B: HF PEFT's numbers for the same seed, and no change on an error."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern.tuners.lora import CordaConfig, inits, preprocess_corda
from peftkern.tuners.lora import model as lora_model
from peftkern.utils.loftq_utils import NF4, int8, nf4
from tests.closeness import assert_as_good_as_torch, assert_same_number, differ

pytestmark = [  # both libraries say these; test_configurations_warn_and_refuse_as_peft_s compares
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "fan_in_fan_out is set to",
        "`lora_bias=True` was passed but the targeted layer",
        "`init_lora_weights` is '(eva|corda)' but",
        "lora with eva initialization used with low_cpu_mem_usage=False",
        "(PiSSA|OLoRA) changes the base weights",
        "Full backward hook is firing",  # torch's own, about LoRA-GA's count of passes
    )
]
LIBS = (peftkern, peft)
ALL = ["a", "b", "emb", "conv", "mha"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 10), nn.Linear(10, 12, bias=False), Conv1D(10, 12)
        self.emb, self.conv = nn.Embedding(20, 12), nn.Conv2d(4, 6, 3)
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def both(base, targets, seed=3, r=4, **settings):
    out = []
    for lib in LIBS:
        torch.manual_seed(seed)
        config = lib.LoraConfig(r=r, lora_alpha=6, target_modules=targets, **settings)
        out.append(lib.get_peft_model(copy.deepcopy(base), config))
    return out


STARTS = {
    "default": (ALL + ["c"], {}),
    "random": (ALL + ["c"], {"init_lora_weights": False}),
    "gaussian": (ALL, {"init_lora_weights": "Gaussian"}),
    "bias": (["a", "b", "conv"], {"init_lora_weights": False, "lora_bias": True}),
    "eva": (["a", "b", "emb", "mha"], {"init_lora_weights": "eva"}),
    "orthogonal": (["a", "b", "c"], {"init_lora_weights": "orthogonal"}),
    "pissa": (["a", "b", "c", "emb"], {"init_lora_weights": "pissa"}),
    "pissa_rslora": (["a"], {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa_niter": (["a", "b", "c"], {"init_lora_weights": "pissa_niter_2"}),
    "pissa_dora": (["a", "b"], {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa_rank_of_w": (["a", "b"], {"init_lora_weights": "pissa", "r": 30}),
    "olora": (["a", "b"], {"init_lora_weights": "OLoRA"}),
    "mica": (["a", "b", "c", "emb"], {"init_lora_weights": "MiCA"}),
    "lora_ga_without_gradient": (["a", "emb", "conv"], {"init_lora_weights": "lora_ga"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STARTS)
def test_one_seed_gives_peft_s_numbers(name, dtype):
    """A and B equal HF PEFT's bit for bit.

    With the rest of the weight, and the norms of its rows, they make up the whole as exactly as HF
    PEFT's do.
    """
    targets, settings = STARTS[name]
    base = make(dtype)
    models = both(base, targets, **settings)
    ours, theirs = (m.state_dict() for m in models)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        where, _, what = key.removeprefix("base_model.model.").partition(".")
        if what == "base_layer.weight" and "pissa" in name and where != "emb":
            exact = getattr(base, where).weight.detach().double()
            assert_as_good_as_torch(*(together(m, where).float() for m in models), exact)
        elif "magnitude" in what:
            exact = together(models[1], where).norm(dim=1)
            assert_as_good_as_torch(ours[key], value, exact)
        else:
            assert torch.equal(ours[key], value), key


def together(model, where):
    """The weight of a layer and its update, summed up in float64."""
    layer = copy.deepcopy(model.base_model.model.get_submodule(where)).double()
    delta = (
        layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    return (layer.base_layer.weight + (delta.T if layer.fan_in_fan_out else delta)).detach()


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("name", STARTS)
def test_the_same_numbers_in_float64(name):
    targets, settings = STARTS[name]
    ours, theirs = (m.state_dict() for m in both(make(torch.float64), targets, **settings))
    assert_same_number(ours, theirs)


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter", "olora", "orthogonal", "pissa_dora", "mica"]
)
@pytest.mark.usefixtures("doubled")
def test_a_start_leaves_the_outputs(name):
    targets, settings = STARTS[name]
    base, x = make(torch.float64), torch.randn(5, 12, dtype=torch.float64)
    model = peftkern.get_peft_model(
        copy.deepcopy(base), peftkern.LoraConfig(r=4, target_modules=targets, **settings)
    )
    assert_same_number(model(x), base(x))
    changed = differ(model.base_model.model.a.base_layer.weight, base.a.weight)
    assert changed == (name not in ("orthogonal", "mica"))


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_checkpoints_in_both_directions(init, low, tmp_path):
    base, x = make(torch.float64), torch.randn(5, 12, dtype=torch.float64)
    pair = both(base, ["a", "b"], init_lora_weights=init)
    for lib, other, model in zip(LIBS, LIBS[::-1], pair, strict=True):
        with torch.no_grad():
            model.base_model.model.a.lora_B["default"].weight.mul_(3)
        model.save_pretrained(tmp_path / lib.__name__)
        # PEFT cannot load these with low_cpu_mem_usage
        reader = peftkern if low else other
        loaded = reader.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path / lib.__name__, low_cpu_mem_usage=low
        )
        assert_same_number(loaded(x), model(x))


@pytest.mark.usefixtures("doubled")
def test_layers_that_share_a_weight_start_one_after_the_other():
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    base[1].weight = base[0].weight
    ours, theirs = (m.state_dict() for m in both(base, ["0", "1"], init_lora_weights="pissa", r=2))
    assert_same_number(ours, theirs)
    assert differ(*(ours[f"base_model.model.{i}.lora_A.default.weight"] for i in "01"))


REFUSED = {
    "odd_rank": ({"init_lora_weights": "orthogonal", "rank_pattern": {"b": 3}}, ValueError, "even"),
    "float64": ({"init_lora_weights": "pissa", "of": torch.float64}, TypeError, "PiSSA under"),
    "olora_float64": (
        {"init_lora_weights": "olora", "of": torch.float64},
        TypeError,
        "Unsupported",
    ),
    "unknown": ({"init_lora_weights": "foo"}, ValueError, "Unknown init.*'foo'"),
    "conv": ({"init_lora_weights": "pissa", "t": ["a", "conv"]}, ValueError, "Unknown init"),
    "mica_dora": (
        {"init_lora_weights": "mica", "use_dora": True},
        ValueError,
        "'mica', 'use_dora'",
    ),
    "mica_conv": ({"init_lora_weights": "mica", "t": ["a", "conv"]}, ValueError, "'mica',"),
    "mica_rank": (
        {"init_lora_weights": "mica", "rank_pattern": {"b": 11}},
        ValueError,
        "max usable",
    ),
    "corda": ({"init_lora_weights": "corda"}, ValueError, "`eigens` attribute not found"),
    "embedding_bias": ({"lora_bias": True, "t": ["a", "emb"]}, ValueError, "for Embedding"),
    "bias": ({"bias": "some"}, NotImplementedError, "Requested bias: some"),
}
ONLY_OURS = {
    "steps": ({"init_lora_weights": "pissa_niter_x"}, ValueError, "'pissa_niter_.number"),
    "mha": ({"init_lora_weights": "pissa", "t": ["a", "mha"]}, ValueError, "linear layers"),
    "olora_conv1d": ({"init_lora_weights": "olora", "t": ["a", "c"]}, ValueError, "`c`"),
    "niter_rank": ({"init_lora_weights": "pissa_niter_1", "r": 11}, ValueError, "at most 10"),
    "bits": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 1}},
        ValueError,
        "nf4 and int8",
    ),
    "packed": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}, "packed": True},
        TypeError,
        "torch.uint8 already",
    ),
    "meta": ({"init_lora_weights": "pissa", "meta": True}, ValueError, "meta device"),
}


@pytest.mark.parametrize("name", [*REFUSED, *ONLY_OURS])
def test_what_cannot_start_changes_nothing(name):
    settings, error, says = {**REFUSED, **ONLY_OURS}[name]
    settings = {"r": 4, **settings}
    targets, dtype = settings.pop("t", ["a", "b"]), settings.pop("of", torch.float32)
    base = make(dtype)
    if settings.pop("packed", False):
        base.b.weight = nn.Parameter(base.b.weight.detach().to(torch.uint8), requires_grad=False)
    if settings.pop("meta", False):
        base.b = base.b.to("meta")
    before = {n: (p, p._version, p.requires_grad) for n, p in base.named_parameters()}
    for lib in LIBS if name in REFUSED else LIBS[:1]:
        model = copy.deepcopy(base) if lib is peft else base
        with pytest.raises(error, match=says):
            lib.get_peft_model(model, lib.LoraConfig(target_modules=targets, **settings))
    after = {n: (p, p._version, p.requires_grad) for n, p in base.named_parameters()}
    assert after.keys() == before.keys()
    for name, (parameter, *state) in before.items():
        assert after[name][0] is parameter and list(after[name][1:]) == state
    assert all(type(m) in (nn.Linear, Conv1D) for m in (base.a, base.b, base.c))


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("where", ["before", "within"])
def test_an_interrupted_start_gives_the_weights_back(where, monkeypatch):
    base = make(torch.float64)
    weights = [base.a.weight, base.b.weight]
    old = [w.detach().clone() for w in weights]

    def fail(*args):
        raise KeyboardInterrupt

    if where == "before":
        monkeypatch.setattr(lora_model, "form_groups", fail)
    else:  # the first weight is changed, the second is not
        change, count = inits.residual._change, []
        monkeypatch.setattr(
            inits.residual,
            "_change",
            lambda *a: count.append(1) or (fail if count[1:] else change)(*a),
        )
    with pytest.raises(KeyboardInterrupt):
        config = peftkern.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights="pissa")
        peftkern.get_peft_model(base, config)
    assert type(base.a) is type(base.b) is nn.Linear
    assert torch.equal(weights[1], old[1])
    if where == "before":
        assert torch.equal(weights[0], old[0])
    assert_same_number(weights[0], old[0])


def trained(model):
    return sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_mica_s_b_never_trains(tmp_path):
    found = []
    for lib in LIBS:
        config = lib.LoraConfig(r=2, target_modules=["a", "emb"], init_lora_weights="mica")
        model = lib.get_peft_model(make(), config)
        seen = [trained(model)]
        model.add_adapter("b", lib.LoraConfig(r=2, target_modules=["a"], init_lora_weights="mica"))
        for name in ("b", "default"):
            model.set_adapter(name)
            seen.append(trained(model))
        with model.disable_adapter():
            seen.append(trained(model))
        model.set_requires_grad("b")
        seen.append(trained(model))
        model.delete_adapter("b")
        model.add_adapter("b", lib.LoraConfig(r=2, target_modules=["a"]))
        model.set_adapter("b")
        seen.append(trained(model))
        model.set_adapter("default")
        model.save_pretrained(tmp_path)
        loaded = peftkern.PeftModel.from_pretrained(
            make(), tmp_path, is_trainable=True, low_cpu_mem_usage=True
        )
        seen.append(trained(loaded))
        found.append(seen)
    assert found[0] == found[1]
    assert not any(".lora_B." in n for n in found[0][0])


# ---------------------------------------------------------------- LoftQ


def test_nf4_takes_the_nearest_of_16_values_in_blocks_of_64():
    torch.manual_seed(0)
    W = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    flat, codes = W.flatten(), torch.tensor(NF4)
    expected = []
    for start in range(0, flat.numel(), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        nearest = (block.double()[:, None] / scale - codes).abs().argmin(1)
        expected.append(codes[nearest] * scale)
    assert torch.equal(nf4(W).flatten(), torch.cat(expected))
    assert torch.equal(nf4(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert (int8(W) - W.half()).abs().max() <= W.abs().max() / 254


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_what_quantisation_loses(bits):
    base, x = make(), torch.randn(50, 12)
    rounded = copy.deepcopy(base)
    quantise = {4: nf4, 8: int8}[bits]
    rounded.a.weight.data = quantise(base.a.weight.data)
    expected = base.a(x)

    def error(steps):
        config = peftkern.LoraConfig(
            r=4,
            lora_alpha=4,  # LoftQ leaves the scaling to the user
            target_modules=["a"],
            init_lora_weights="loftq",
            loftq_config=peftkern.LoftQConfig(loftq_bits=bits, loftq_iter=steps),
        )
        layer = peftkern.get_peft_model(copy.deepcopy(base), config).base_model.model.a
        Q = layer.base_layer.weight
        if steps == 1:
            assert torch.equal(Q, rounded.a.weight)
        assert torch.equal(quantise(Q.detach()), Q)
        return (layer(x) - expected).norm()

    once = error(1)
    assert once < 0.8 * (rounded.a(x) - expected).norm()
    if bits == 4:
        assert error(4) < once


# ---------------------------------------------------------------- those that look at data


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_peft_s(method, tmp_path, monkeypatch):
    # PEFT's module takes its dataclass from a package that it does not depend on
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda

    base, x = make(torch.float64), torch.randn(64, 12, dtype=torch.float64)
    states = []
    for lib, cls, preprocess in (
        (peft, PeftCordaConfig, peft_preprocess_corda),
        (peftkern, CordaConfig, preprocess_corda),
    ):
        settings = cls(corda_method=method, cache_file=str(tmp_path / lib.__name__ / "cache"))
        config = lib.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["a", "b", "c"],
            rank_pattern={"b": 2},
            init_lora_weights="corda",
            corda_config=settings,
        )
        model = copy.deepcopy(base)
        preprocess(model, config, run_model=lambda m=model: m(x))
        again = copy.deepcopy(base)
        preprocess(again, config)  # from the cache
        states.append([lib.get_peft_model(m, config).state_dict() for m in (model, again)])
    (theirs, _), (ours, cached) = states
    assert_same_number(ours, theirs)
    assert all(torch.equal(ours[key], cached[key]) for key in ours)
    with pytest.raises(ValueError, match="not a safetensors file"):
        config.corda_config.cache_file = str(tmp_path / "peft" / "cache")  # a pickle
        preprocess_corda(copy.deepcopy(base), config)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_is_peft_s(direction, scale, tmp_path):
    base, x = make(torch.float64), torch.randn(64, 12, dtype=torch.float64)
    states = []
    for lib in LIBS:
        config = lib.LoraConfig(
            r=2,
            target_modules=["a", "b", "c"],
            init_lora_weights="lora_ga",
            lora_ga_config=lib.LoraGAConfig(direction=direction, scale=scale),
        )
        model = copy.deepcopy(base)

        def step(model=model):
            for _ in range(2):
                model(x).square().sum().backward()

        cache = str(tmp_path / lib.__name__ / "cache")
        lib.preprocess_loraga(model, config, step, cache)
        assert all(p.requires_grad and p.grad is None for p in model.a.parameters())
        torch.manual_seed(1)
        adapted = lib.get_peft_model(model, config)
        assert not hasattr(adapted.base_model.model.a.base_layer, "_peft_loraga_grad")
        states.append(adapted.state_dict())
    assert_same_number(*states)


# ---------------------------------------------------------------- configurations

SETTINGS = {
    "loftq_without": {"init_lora_weights": "loftq"},
    "loftq_unused": {"loftq_config": {"loftq_bits": 4}},
    "eva_default": {"init_lora_weights": "eva"},
    "eva_unused": {"eva_config": "EvaConfig"},
    "eva_dict": {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    "eva_wrong": {"init_lora_weights": "eva", "eva_config": 3},
    "eva_rho": {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}},
    "corda_default": {"init_lora_weights": "corda"},
    "corda_unused": {"corda_config": {"corda_method": "kpm"}},
    "bias_pissa": {"init_lora_weights": "pissa", "lora_bias": True},
    "bias_dora": {"use_dora": True, "lora_bias": True},
    "dora_megatron": {"use_dora": True, "megatron_config": {"a": 1}},
    "parameters": {"target_parameters": "a.weight"},
    "rslora_pattern": {
        "init_lora_weights": "pissa_niter_2",
        "use_rslora": True,
        "rank_pattern": {"a": 2},
    },
    "rslora_alpha": {"init_lora_weights": "olora", "use_rslora": True, "alpha_pattern": {"a": 2}},
    "rslora_plain": {"use_rslora": True, "alpha_pattern": {"a": 2}},
    "alora": {"alora_invocation_tokens": [1]},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", SETTINGS)
def test_configurations_warn_and_refuse_as_peft_s(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # PEFT asks for scipy
    found = []
    for lib in LIBS:
        settings = dict(SETTINGS[name])
        if settings.get("eva_config") == "EvaConfig":
            settings["eva_config"] = lib.EvaConfig()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                config = lib.LoraConfig(**settings)
                result = config.to_dict()
            except (ValueError, TypeError) as exc:
                # of the one setting for which we take more, we say so behind HF PEFT's words
                said = str(exc).partition(" The one string that is allowed is")[0]
                result = type(exc), said
        found.append((result, [str(w.message) for w in caught]))
    assert found[0] == found[1]


def test_a_configuration_s_parts_come_back_from_its_file(tmp_path):
    config = peftkern.LoraConfig(
        target_modules=["a"], init_lora_weights="eva", eva_config=peftkern.EvaConfig(rho=1.5)
    )
    config.save_pretrained(tmp_path)
    for lib in LIBS:
        loaded = lib.LoraConfig.from_pretrained(tmp_path)
        assert isinstance(loaded.eva_config, lib.EvaConfig) and loaded.eva_config.rho == 1.5


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("broken", ["missing", "shape"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_that_does_not_fit_leaves_the_base_weights_alone(init, broken, dora, tmp_path):
    """Such a start takes itself out of the base weights, and is only then found not to fit."""
    more = {"loftq_config": peftkern.LoftQConfig()} if init == "loftq" else {}
    config = peftkern.LoraConfig(
        r=4, target_modules=["a", "b"], init_lora_weights=init, use_dora=dora, **more
    )
    peftkern.get_peft_model(make(torch.float64), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    if broken == "missing":
        del weights["base_model.model.b.lora_B.weight"]
    else:
        weights["base_model.model.b.lora_B.weight"] = torch.zeros(3, 3)
    save_file(weights, file)

    base = make(torch.float64)
    plain = peftkern.get_peft_model(
        make(torch.float64), peftkern.LoraConfig(r=2, target_modules=["a"])
    )
    for model, load in (
        (base, lambda: peftkern.PeftModel.from_pretrained(base, tmp_path)),
        (plain, lambda: plain.load_adapter(tmp_path, "other")),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises((ValueError, RuntimeError)):
            load()
        assert model.state_dict().keys() == before.keys()
        if dora:  # which measures the changed weight at once, so that it is changed back
            assert_same_number(dict(model.state_dict()), before)
        else:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(plain.peft_config) == ["default"]
    assert plain.base_model.targeted_module_names == ["a"]
