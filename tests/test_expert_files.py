"""Files of adapters for experts: those of transformers 4, and of other numbers of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkern
from peftkern.tuners.lora.expert_families import FUSED, fused_names
from peftkern.utils.private import conversion_families
from tests import expert_families
from tests.closeness import assert_same_number
from tests.expert_families import SINGLE, E, outputs, save_single
from tests.tiny import assert_same, fill, snapshot

FILE = "adapter_model.safetensors"


def load(library: Any, family: str, folder: Path) -> Any:
    return library.PeftModel.from_pretrained(expert_families.make(family), folder)


@pytest.mark.parametrize("family", SINGLE)
def test_layers_of_single_experts_load_and_go_both_ways(family: str, tmp_path: Path) -> None:
    save_single(tmp_path / "old", family)
    theirs, ours = (load(library, family, tmp_path / "old") for library in (peft, peftkern))
    want = outputs(theirs)
    assert (want - outputs(expert_families.make(family))).abs().max() > 1e-2
    assert_same_number(outputs(ours), want)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    names = [load_file(tmp_path / who / FILE).keys() for who in ("ours", "theirs")]
    assert names[0] == names[1]
    assert_same_number(outputs(load(peftkern, family, tmp_path / "theirs")), want)
    assert_same_number(outputs(load(peft, family, tmp_path / "ours")), want)


def test_the_families_are_those_that_hf_peft_converts() -> None:
    from peft.utils import transformers_weight_conversion as theirs

    assert FUSED == theirs._MOE_TARGET_MODULE_MAPPING

    class Model:
        def __init__(self, model_type: str) -> None:
            self.config = type("Config", (), {"model_type": model_type})

    families = theirs._MODEL_TO_CONVERSION_PATTERN
    assert families == {**conversion_families(), "mixtral": "mixtral"}
    for model_type, family in families.items():
        want = theirs._MOE_TARGET_MODULE_MAPPING.get(family, {})
        assert fused_names(Model(model_type)) == want, model_type


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_file_without_some_experts_is_refused_by_their_numbers(
    family: str, tmp_path: Path
) -> None:
    save_single(tmp_path, family)
    weights = load_file(tmp_path / FILE)
    down = SINGLE[family][2]
    ends = tuple(f".{e}.{down}.lora_{side}.weight" for e in (2, 3) for side in "AB")
    for key in [k for k in weights if ".layers.1." in k and k.endswith(ends)]:
        del weights[key]
    save_file(weights, tmp_path / FILE)
    base = expert_families.make(family)
    before = snapshot(base)
    says = (
        rf"missing keys: .*\.1\.mlp\.experts\.\*\.{down}\.lora_A of expert 2, 3 is missing, in a "
        f"model of {E} experts"
    )
    with pytest.raises(ValueError, match=says):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)


def test_factors_of_shared_experts_are_not_dropped_in_silence(tmp_path: Path) -> None:
    """The old targets mean the experts alone, in HF PEFT too, which leaves the others out."""
    save_single(tmp_path, "deepseek_v3")
    weights = load_file(tmp_path / FILE)
    name = "base_model.model.model.layers.1.mlp.shared_experts.up_proj"
    weights |= {
        f"{name}.lora_A.weight": torch.ones(3, 16),
        f"{name}.lora_B.weight": torch.ones(24, 3),
    }
    save_file(weights, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"unexpected keys: .*shared_experts\.up_proj\.lora_A"):
        load(peftkern, "deepseek_v3", tmp_path)


def test_the_tensors_of_a_file_lie_as_servers_read_them(tmp_path: Path) -> None:
    """A [r·E, K] is [E, r, K], and B [N, r·E] is [N, r, E]; gate_up_proj is below base_layer."""
    config = peftkern.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], target_parameters="all-experts"
    )
    model = peftkern.get_peft_model(expert_families.make("qwen3_moe"), config)
    fill(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    experts = model.base_model.model.model.layers[1].mlp.experts
    at = "base_model.model.model.layers.1.mlp.experts"
    for name, wrapper in ((f"{at}.base_layer", experts.base_layer), (at, experts)):
        A, B = (weights[f"{name}.lora_{side}.weight"] for side in "AB")
        A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1)
        assert_same_number(2 * B @ A, wrapper.get_delta_weight("default"))
    assert experts.parameter_name == "down_proj"


def test_a_file_with_more_experts_than_the_model_is_refused(tmp_path: Path) -> None:
    save_single(tmp_path, "olmoe")
    weights = load_file(tmp_path / FILE)
    for key in [k for k in weights if ".experts.3." in k]:
        weights[key.replace(".experts.3.", ".experts.4.")] = weights[key].clone()
    save_file(weights, tmp_path / FILE)
    base = expert_families.make("olmoe")
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"is there for expert 4, in a model of 4 experts"):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_factors_of_another_number_of_experts_are_refused(family: str, tmp_path: Path) -> None:
    config = peftkern.LoraConfig(r=3, target_modules=[], target_parameters="all-experts")
    model = peftkern.get_peft_model(expert_families.make(family), config)
    fill(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    for key, value in weights.items():
        weights[key] = torch.cat([value, value], dim=0 if ".lora_A." in key else 1)
    save_file(weights, tmp_path / FILE)
    base = expert_families.make(family)
    before = snapshot(base)
    with pytest.raises(
        RuntimeError,
        match=r"lora_A.weight has factors of 8 experts at rank 3, and `gate_up_proj` of the model "
        "has 4 experts",
    ):
        peftkern.PeftModel.from_pretrained(base, tmp_path)
    assert_same(base, before)
    adapted = peftkern.get_peft_model(base, config)
    before = snapshot(adapted)
    with pytest.raises(RuntimeError, match="factors of 8 experts"):
        adapted.load_adapter(tmp_path, "other")
    assert_same(adapted, before)
    with pytest.raises(RuntimeError, match="factors of 8 experts"):
        peftkern.set_peft_model_state_dict(adapted, weights)
    assert_same(adapted, before)
