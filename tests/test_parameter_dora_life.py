"""DoRA on parameters in a model's life: merging, files, hot swaps, checkpoints, compilers."""

from __future__ import annotations

import json
import warnings

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.checkpoint.hotswap import hotswap_adapter
from peftkern.helpers import DoraCaching
from tests import moe
from tests.closeness import assert_same_number, differ
from tests.moe_models import adapt, ids, tiny, wrappers
from tests.parameter_dora import (
    BASES,
    DORA,
    LINEAR,
    every,
    experts,
    made,
    trained,
    updated,
    with_plain,
)
from tests.test_bases_fp8_experts import models as quantised_experts
from tests.tiny import assert_same, fill, snapshot

LONG = pytest.mark.long


@every
def test_disabling_merging_and_deleting(base: str) -> None:
    make = BASES[base][0]
    model = with_plain(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = make()(ids())
        with model.disable_adapter():
            assert_same_number(model(ids()), plain)
        for names in ("dora", ["plain", "dora", "more"]):
            model.base_model.set_adapter(names)
            want = model(ids())
            model.merge_adapter(safe_merge=True)
            assert_same_number(model(ids()), want)
            with model.disable_adapter():  # which unmerges
                assert_same_number(model(ids()), plain)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        model.set_adapter("dora")
        model.delete_adapter("more")
        assert not any(".more" in k for k in model.state_dict())
        want = model(ids())
        merged = model.merge_and_unload()
        assert_same_number(merged(ids()), want)
        assert merged.state_dict().keys() == make().state_dict().keys()


@experts
def test_one_after_another_merge_to_the_same_weights(base: str) -> None:
    """Norms are those of the base weight, also when it has another adapter in it."""
    model = with_plain(base)
    model.base_model.set_adapter(["plain", "dora", "more"])
    with torch.no_grad():
        want = model(ids())
        for name in ("plain", "dora", "more"):
            with warnings.catch_warnings():  # that another adapter is merged already
                warnings.simplefilter("ignore")
                model.merge_adapter(adapter_names=[name])
        assert_same_number(model(ids()), want)


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = made("plain")
    wrappers(model)[1].lora_magnitude_vector["default"].weight.data[2, 3] = torch.nan
    W = [w.get_param().detach().clone() for w in wrappers(model)]
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(w.get_param(), old) for w, old in zip(wrappers(model), W, strict=True))


@every
@pytest.mark.parametrize("low", [False, True])
def test_files(base: str, low: bool, tmp_path) -> None:
    make, targets = BASES[base]
    model = made(base)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    stems = {k.removesuffix(".lora_A.weight") for k in keys if k.endswith(".lora_A.weight")}
    assert len(stems) == len(targets)
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")  # as of a LoRA linear
    assert keys.keys() == {f"{stem}.{end}" for stem in stems for end in ends}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    again = peftkern.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low)
    assert_same_number(dict(again.state_dict()), dict(model.state_dict()))
    with torch.no_grad():
        assert_same_number(again(ids()), model(ids()))
    with pytest.raises(ValueError, match="use_dora"):  # docs/differences.md tells this
        peft.PeftModel.from_pretrained(make(), tmp_path)


def test_a_file_for_other_experts_or_without_magnitudes_is_refused(tmp_path) -> None:
    made("plain").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if k.endswith("lora_magnitude_vector"))
    base = tiny()
    for value in (weights[key][:-1].clone(), weights[key].flatten(), None):
        changed = {**weights, key: value}
        save_file({k: v for k, v in changed.items() if v is not None}, file)
        with pytest.raises((ValueError, RuntimeError), match=r"experts\..*lora_magnitude_vector"):
            peftkern.PeftModel.from_pretrained(base, tmp_path)
        assert_same(base, snapshot(tiny()))


@pytest.mark.parametrize("base", ["transposed", "linear"])
def test_hot_swapping(base: str, tmp_path) -> None:
    other, model = made(base, lora_alpha=2), made(base)
    fill(other, seed=9)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, "default")
    with torch.no_grad():
        assert_same_number(model(ids()), other(ids()))


def test_a_hot_swapped_file_without_a_parameter_leaves_its_base(tmp_path) -> None:
    model = made("plain")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "base_layer" not in k}, file)
    hotswap_adapter(model, tmp_path, "default")
    outer, inner = wrappers(model)
    with torch.no_grad():
        found = model(ids())
        inner.set_adapter([])
        assert_same_number(model(ids()), found)
        outer.set_adapter([])
        assert differ(model(ids()), found)


def test_what_is_refused() -> None:
    for base in ("plain", "transposed", "outside", "table"):
        model = BASES[base][0]()
        before = snapshot(model)
        with pytest.raises(ValueError, match="lora_dropout=0.1 and use_dora=True together on `"):
            adapt(peftkern, model, target_parameters=BASES[base][1], lora_dropout=0.1, **DORA)
        assert_same(model, before)
    model, _ = quantised_experts("fp8")
    before = snapshot(model)
    config = peftkern.LoraConfig(target_modules=[], target_parameters="all-experts", **DORA)
    with pytest.raises(ValueError, match="use_dora=True on `.+_proj` of FP8Experts, which"):
        peftkern.get_peft_model(model, config)
    assert_same(model, before)
    whole = peftkern.LoraConfig(target_modules=[], target_parameters=["1.weight"], **DORA)
    base = peftkern.quantize_base(LINEAR(), layers="all-linear")
    with pytest.raises(ValueError, match="1.weight.*quantised weight of a Fp8Linear"):
        peftkern.get_peft_model(base, whole)
    model = made("conv1d", ("default", "other"), lora_dropout=0.1)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError, match="several adapters on the weight of a Conv1D"):
        model.train()(ids())
    with pytest.raises(ValueError, match="does not support targeting nn.Parameter"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "linear")


@pytest.mark.parametrize("base", ["plain", "outside", "linear"])
def test_weights_that_accelerate_offloads(base: str) -> None:
    here, away = made(base), made(base)
    held = wrappers(away)[0].get_base_layer()
    accelerate.cpu_offload(held, execution_device=torch.device("cpu"))
    assert next(held.parameters()).is_meta
    with torch.no_grad():
        want = here(ids())
        assert_same_number(away(ids()), want)
    assert_same_number(trained(away), trained(here))
    away.merge_adapter()
    with torch.no_grad():
        assert_same_number(away(ids()), want)
    accelerate.hooks.remove_hook_from_submodules(away)
    twice = made(base)
    accelerate.cpu_offload(wrappers(twice)[0], execution_device=torch.device("cpu"))
    with torch.no_grad():  # its adapter too
        assert_same_number(twice(ids()), want)


@experts
def test_gradient_checkpointing(base: str) -> None:
    model = made(base).train()
    want = trained(model)
    whole = model.base_model.model.experts
    forward = whole.forward
    whole.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    assert_same_number(trained(model), want)


@pytest.mark.parametrize("base, use_dora", [("linear", True), ("conv1d", True), ("linear", False)])
def test_a_transform_of_torch_func(base: str, use_dora: bool) -> None:
    model = made(base, use_dora=use_dora)
    factors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(model, given, (ids(),)).cos().mean()
        return found

    model(ids()).cos().mean().backward()
    want = {n: p.grad for n, p in model.named_parameters() if n in factors}
    assert_same_number(torch.func.grad(loss)(factors), want)


# torch's, of tensors that a parametrization holds; W + scaling · B A causes it too
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("base", ["linear", "conv1d", pytest.param("table", marks=LONG)])
def test_torch_compile(base: str) -> None:
    model = made(base)
    want = trained(model)
    whole = base in ("linear", "conv1d")  # in other modules a parametrization breaks the graph
    got = trained(torch.compile(model, backend="eager", fullgraph=whole))
    assert_same_number({k.removeprefix("_orig_mod."): v for k, v in got.items()}, want)


def test_norms_of_a_linear_layers_weight_are_kept_in_evaluation_when_asked() -> None:
    model = made("linear")
    magnitude = wrappers(model)[0].lora_magnitude_vector["default"]
    with torch.no_grad(), DoraCaching():
        want = model(ids())
        kept = magnitude._dora_cache["norms"][1]
        assert_same_number(model(ids()), want)
        assert magnitude._dora_cache["norms"][1] is kept
        wrappers(model)[0].lora_B["default"].weight.add_(1.0)
        assert differ(model(ids()), want)
        mixture = made("plain")
        want = mixture(ids())
        wrappers(mixture)[0].get_param().mul_(2.0)
        assert differ(mixture(ids()), want)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_dora_of_transformers_4_becomes_that_of_fused_experts(family: str, tmp_path) -> None:
    moe.save_v4_adapter(tmp_path, family)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    g = torch.Generator().manual_seed(3)
    for key in [k for k in weights if k.endswith(".lora_B.weight")]:
        magnitude = torch.rand(len(weights[key]), generator=g) + 0.5
        weights[key.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    save_file(weights, file)
    model = peftkern.PeftModel.from_pretrained(moe.make(family, torch.float64), tmp_path)
    with pytest.raises(ValueError, match="use_dora"):
        peft.PeftModel.from_pretrained(moe.make(family), tmp_path)
    outer, inner = (w for w in wrappers(model)[:3] if w.num_experts > 1)
    old = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    inside = "block_sparse_moe" if family == "mixtral" else "mlp"
    at = f"base_model.model.model.layers.0.{inside}.experts.2."
    gate, up, down = (weights[f"{at}{name}.lora_magnitude_vector"].double() for name in old)
    assert torch.equal(inner.lora_magnitude_vector["default"].weight[2], torch.cat([gate, up]))
    assert torch.equal(outer.lora_magnitude_vector["default"].weight[2], down)
    with torch.no_grad():
        got = model(input_ids=moe.IDS).logits
        for wrapper in wrappers(model):
            W = wrapper.get_param()
            factors = {
                f"{k}.weight": v
                for k, v in {
                    f"{n}.default": getattr(wrapper, n)["default"].weight
                    for n in ("lora_A", "lora_B", "lora_magnitude_vector")
                }.items()
            }
            W.copy_(updated(wrapper, W, ["default"], factors))
            wrapper.set_adapter([])
        assert_same_number(model(input_ids=moe.IDS).logits, got)
