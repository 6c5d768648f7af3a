"""LoRA on parameters, mainly the fused weights of experts, compared with HF PEFT."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import peftkern
from peftkern.tuners.lora.parameter import ParamWrapper
from peftkern.tuners.lora.parameter_proxies import _LoraFactorsProxy
from tests import moe
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.tiny import assert_same, fill, gradients, make, pair, snapshot

pytestmark = pytest.mark.filterwarnings(  # HF PEFT's, about patterns that it made itself
    "ignore:The following (rank|alpha)_pattern keys did not match any:RuntimeWarning"
)
BATCH = {"input_ids": moe.IDS, "labels": moe.IDS}
BOTH = {f: [f"{e}.gate_up_proj", f"{e}.down_proj"] for f, e in moe.EXPERTS_OF.items()}
CASES = {
    "both_of_a_module": ("qwen3_moe", {"target_parameters": BOTH["qwen3_moe"]}),
    "transposed": ("llama4", {"target_parameters": BOTH["llama4"], "target_modules": []}),
    "with_modules": ("gpt_oss", {"target_parameters": BOTH["gpt_oss"][1:], "use_rslora": True}),
    "router_too": (
        "mixtral",
        {
            "target_parameters": ["gate.weight", *BOTH["mixtral"]],
            "rank_pattern": {r".*\.gate_up_proj": 2},
            "alpha_pattern": {"gate.weight": 3},
        },
    ),
    "one_layer": ("qwen3_moe", {"target_parameters": ["1.mlp.experts.down_proj"]}),
}


def two(case: str, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Any, Any]:
    family, settings = CASES[case]
    base = moe.make(family, dtype)
    return pair(family, base=base, **{"target_modules": ["q_proj"], **settings, **more})


@pytest.mark.parametrize("case", CASES)
def test_numbers_gradients_and_files_are_hf_pefts(case, tmp_path) -> None:
    ours, theirs = two(case)
    names = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == names
    assert_same_number(gradients(ours, BATCH), gradients(theirs, BATCH))
    # the update shows, and no parametrization is left behind
    with ours.disable_adapter(), torch.no_grad():
        assert (ours(**BATCH).logits - theirs(**BATCH).logits).abs().max() > 1e-2
    assert not any(parametrize.is_parametrized(m) for m in ours.modules())

    family = CASES[case][0]
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(**BATCH).logits
        for library, folder in ((peft, "ours"), (peftkern, "theirs")):
            base = moe.make(family, torch.float64)
            model = library.PeftModel.from_pretrained(base, tmp_path / folder)
            assert_same_number(model(**BATCH).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["both_of_a_module", "with_modules"])
def test_other_dtypes_are_as_good_as_hf_pefts(case, dtype) -> None:
    ours, theirs = two(case, dtype)
    exact = copy.deepcopy(theirs).double()
    moe.eager(exact.get_base_model())
    assert_as_good_as_torch(*(gradients(m, BATCH)[1] for m in (ours, theirs, exact)))


def test_a_parameter_of_two_dimensions_is_a_linear_layers_weight() -> None:
    settings = {"dtype": torch.float64, "target_parameters": ["gate_proj.weight"]}
    ours, theirs = pair("llama", target_modules=[], **settings)
    batch = {"input_ids": moe.IDS, "labels": moe.IDS}
    assert_same_number(gradients(ours, batch), gradients(theirs, batch))
    # and nothing is grouped with a wrapper
    ours, theirs = pair("llama", target_modules=["up_proj"], **settings)
    assert_same_number(gradients(ours, batch), gradients(theirs, batch))


@torch.no_grad()
@pytest.mark.parametrize("names", ["default", ["default", "other"]], ids=str)
def test_a_linear_layers_weight_disabled_and_merged(names) -> None:
    base = nn.Sequential(nn.Linear(4, 6)).double()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    plain = base(x)
    config = peftkern.LoraConfig(target_parameters=["0.weight"], init_lora_weights=False, r=2)
    ours = peftkern.get_peft_model(base, config)
    ours.add_adapter("other", config)
    ours.base_model.set_adapter(names)
    want = ours(x)
    with ours.disable_adapter():
        assert_same_number(ours(x), plain)
        assert_same_number(torch.compile(ours, backend="eager")(x), plain)
    ours.merge_adapter()
    assert_same_number(ours(x), want)


def test_several_adapters_and_merging(tmp_path) -> None:
    ours, theirs = two("transposed")
    settings = {**CASES["transposed"][1], "r": 2, "lora_alpha": 3}
    ours.add_adapter("other", peftkern.LoraConfig(**settings))
    theirs.add_adapter("other", peft.LoraConfig(**settings))
    wrappers = [m for m in ours.modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 4 and all(set(w.lora_A) == {"default", "other"} for w in wrappers)
    for model in (ours, theirs):
        fill(model, "other", seed=7)

    def same() -> None:
        with torch.no_grad():
            got, want = ours(**BATCH).logits, theirs(**BATCH).logits
        assert_same_number(got, want)

    for names in ("other", ["default", "other"]):
        ours.base_model.set_adapter(names)
        theirs.base_model.set_adapter(names)
        same()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    ours.merge_adapter()
    theirs.merge_adapter()
    same()
    ours.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    theirs.unmerge_adapter()
    ours.delete_adapter("default")
    theirs.delete_adapter("default")
    same()
    with torch.no_grad():
        want = ours(**BATCH).logits
        merged = ours.merge_and_unload()
        assert_same_number(merged(**BATCH).logits, want)
    assert not any(isinstance(m, ParamWrapper) for m in merged.modules())


def test_the_sum_is_computed_once_a_call_in_the_parameters_dtype(monkeypatch) -> None:
    ours, _ = two("transposed", torch.float32)
    sums = []
    add = _LoraFactorsProxy.updated
    monkeypatch.setattr(
        _LoraFactorsProxy, "updated", lambda self, W: sums.append(add(self, W)) or sums[-1]
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(**BATCH)
    assert len(sums) == 2 * moe.LAYERS
    assert {s.dtype for s in sums} == {torch.float32}


def test_threads_do_not_see_each_others_parametrizations() -> None:
    ours, _ = two("both_of_a_module")
    batches = [moe.IDS + i for i in range(8)]
    with torch.no_grad():
        want = [ours(input_ids=ids).logits for ids in batches]

    def call(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return ours(input_ids=ids).logits

    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(call, batches), want, strict=True):
            assert_same_number(got, expected)


def test_explain_names_the_parameter() -> None:
    ours, _ = two("transposed")
    row = next(r for r in peftkern.explain(ours) if r.name.endswith("experts"))
    assert not row.fused and "`down_proj` is a parameter of Llama4TextExperts" in row.reason
    assert "not a class of transformers' experts interface" in row.reason
    assert "parameter_name='down_proj'" in repr(ours)


class Odd(nn.Module):
    """Parameters of one, two and four dimensions, and one of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 6)
        self.conv = nn.Conv2d(2, 2, 3)
        self.emb = nn.Embedding(6, 4)
        self.own = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x @ self.own)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"target_parameters": ["emb.weight"], "lora_dropout": 0.1}, "with lora_dropout != 0"),
        ({"target_parameters": ["lin.weight"], "fan_in_fan_out": True}, "with fan_in_fan_out"),
        ({"target_parameters": ["lin.weight"], "lora_bias": True}, "with lora_bias=True"),
        ({"target_parameters": ["lin.bias"]}, "1 dimensional Parameter, but only 2d and 3d"),
        ({"target_parameters": ["lin.weight", "conv.weight"]}, "4 dimensional Parameter"),
        ({"target_parameters": ["own"]}, "Targeting an nn.Parameter on the top-level module"),
        (
            {"target_parameters": ["lin.weight"], "target_modules": ["lin"]},
            "Trying to wrap an `nn.Parameter` of layer 'lin' of type Linear",
        ),
        ({"target_parameters": ["no.weight"], "target_modules": []}, "No `target_modules` passed"),
        ({"target_parameters": ["lin.weight"], "init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(settings, says) -> None:
    model = Odd()
    before = snapshot(model)
    with pytest.raises((ValueError, NotImplementedError), match=says):
        peftkern.get_peft_model(model, peftkern.LoraConfig(**settings))
    assert_same(model, before)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="must be a list of strings"):
        peftkern.LoraConfig(target_parameters="lin.weight")
    ours, _ = two("one_layer")
    before = snapshot(ours)
    other = peftkern.LoraConfig(target_parameters=["0.mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        ours.add_adapter("other", other)
    assert_same(ours, before)
    outside, _ = two("transposed")
    with pytest.raises(ValueError, match="ParamWrapper does not support mixed adapter batches"):
        outside.eval()(input_ids=moe.IDS, adapter_names=["default", "__base__"])
    with pytest.warns(RuntimeWarning, match="were set but no parameter was matched"):
        config = peftkern.LoraConfig(target_modules=["q_proj"], target_parameters=["no.weight"])
        peftkern.get_peft_model(make("llama"), config)
    with pytest.warns(RuntimeWarning, match="were set but no module was matched"):
        config = peftkern.LoraConfig(target_modules=["no"], target_parameters=["q_proj.weight"])
        peftkern.get_peft_model(make("llama"), config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_transformers_4_become_those_of_fused_experts(family, tmp_path) -> None:
    moe.save_v4_adapter(tmp_path, family)
    here = peftkern.PeftModel.from_pretrained(moe.make(family, torch.float64), tmp_path)
    there = peft.PeftModel.from_pretrained(moe.make(family, torch.float64), tmp_path)
    with torch.no_grad():
        want = there(input_ids=moe.IDS).logits
        assert_same_number(here(input_ids=moe.IDS).logits, want)
    got, expected = here.peft_config["default"], there.peft_config["default"]
    for name in ("target_modules", "rank_pattern", "alpha_pattern"):
        assert getattr(got, name) == getattr(expected, name)
    assert set(got.target_parameters) == set(expected.target_parameters)
    weights = peftkern.get_peft_model_state_dict(here)
    for key, value in peft.get_peft_model_state_dict(there).items():
        assert torch.equal(weights.pop(key), value), key
    assert not weights
    here.save_pretrained(tmp_path / "new")  # in the new form, which either reads
    again = peft.PeftModel.from_pretrained(moe.make(family, torch.float64), tmp_path / "new")
    with torch.no_grad():
        assert_same_number(again(input_ids=moe.IDS).logits, want)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.(q_proj|gate_proj|up_proj|down_proj)", ["q_proj"], r".*\.k_proj"],
    ids=str,
)
def test_targets_of_transformers_4_are_translated_as_in_hf_peft(targets) -> None:
    configs = []
    for lib in (peftkern, peft):
        config = lib.LoraConfig(target_modules=targets)
        configs.append((lib.get_peft_model(moe.make("qwen3_moe"), config), config))
    (ours, got), (theirs, want) = configs
    assert got.target_modules == want.target_modules
    assert set(got.target_parameters or ()) == set(want.target_parameters or ())
    assert got.rank_pattern == want.rank_pattern and got.alpha_pattern == want.alpha_pattern
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_a_pattern_for_some_layers_keeps_meaning_those() -> None:
    pattern = r"model\.layers\.1\..*(k_proj|gate_proj|up_proj)"
    config = peftkern.LoraConfig(target_modules=pattern)
    ours = peftkern.get_peft_model(moe.make("qwen3_moe"), config)
    adapted = {n for n, _ in ours.base_model.model.named_parameters() if "lora_A" in n}
    assert adapted == {
        "model.layers.1.self_attn.k_proj.lora_A.default.weight",
        "model.layers.1.mlp.experts.lora_A.default.weight",
    }
    with pytest.raises(ValueError, match="up_proj without also targeting gate_proj"):
        config = peftkern.LoraConfig(target_modules=["up_proj"])
        peftkern.get_peft_model(moe.make("qwen3_moe"), config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_transformers_own_loader_finds_its_conversions(family, tmp_path, monkeypatch) -> None:
    """It imports from HF PEFT; here its converters are ours."""
    from peft.utils import transformers_weight_conversion as theirs

    from peftkern.utils.transformers_weight_conversion import build_peft_weight_mapping

    moe.save_v4_adapter(tmp_path, family)
    logits = []
    for build in (theirs.build_peft_weight_mapping, build_peft_weight_mapping):
        monkeypatch.setattr(theirs, "build_peft_weight_mapping", build)
        model = moe.make(family, torch.float64)
        model.load_adapter(str(tmp_path))
        with torch.no_grad():
            logits.append(model(input_ids=moe.IDS).logits)
    assert_same_number(logits[1], logits[0])
    with torch.no_grad():
        base = moe.make(family, torch.float64)
        assert (logits[0] - base(input_ids=moe.IDS).logits).abs().max() > 0.1


def test_an_incomplete_v4_adapter_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    moe.save_v4_adapter(tmp_path, "mixtral")
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    del weights["base_model.model.model.layers.0.block_sparse_moe.experts.2.w2.lora_A.weight"]
    save_file(weights, file)
    base = moe.make("mixtral")
    before = snapshot(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"missing keys: .*experts\.lora_A\.weight"):
            peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)
