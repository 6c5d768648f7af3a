"""Adapters on the experts of whole models, against HF PEFT in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

import peftkern
from peftkern.ops.experts.gates import clamped
from peftkern.tuners.lora.experts import mixture_of
from tests import moe_models
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.expert_families import FAMILIES, IDS, make, targets_of
from tests.moe_models import adapt
from tests.tiny import gradients, step

FAST = (
    "qwen3_moe mixtral gpt_oss olmoe granitemoe glm4_moe minimax flex_olmo hy_v3 aria "
    "openai_privacy_filter muse_spark nemotron_h"
).split()
WHICH = ("both", "up", "down")


def _compare(name: str, which: str) -> None:
    if not hasattr(transformers, f"{FAMILIES[name][0]}Config"):
        pytest.skip(f"transformers has no {FAMILIES[name][0]}")
    base = make(name)
    ups, downs = targets_of(base)
    targets = {"both": ups + downs, "up": ups, "down": downs}[which]
    if not targets:
        pytest.skip("the experts have other parameters than those of transformers' interface")
    other = copy.deepcopy(base)
    ours = adapt(peftkern, base, target_parameters=targets)
    theirs = adapt(peft, other, target_parameters=targets)
    assert all(moe_models.fused(ours)), str(peftkern.explain(ours))
    batch = {"input_ids": IDS}
    if FAMILIES[name][1]:
        batch["labels"] = IDS % 3 if "Token" in FAMILIES[name][1] else IDS
    # some models compute their logits in fp32 whatever their weights are
    got, want = ({k: v.double() for k, v in step(m, batch).items()} for m in (ours, theirs))
    assert any("lora_B" in key and value.abs().max() > 0 for key, value in want.items())
    assert_same_number(got, want)


@pytest.mark.parametrize("name", FAST)
def test_a_family_computes_what_hf_peft_does(name: str) -> None:
    _compare(name, WHICH[FAST.index(name) % 3])


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_with_each_parameter(name: str, which: str) -> None:
    _compare(name, which)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_gives_way(implementation: str, dtype: torch.dtype) -> None:
    """In the dtype itself no worse than HF PEFT with the same implementation."""
    base = make("qwen3_moe")
    targets = [name for names in targets_of(base) for name in names]
    exact = adapt(peft, copy.deepcopy(base), target_parameters=targets)
    base = base.to(dtype)
    base.set_experts_implementation(implementation)
    ours, theirs = (
        adapt(lib, copy.deepcopy(base), target_parameters=targets) for lib in (peftkern, peft)
    )
    rows = peftkern.explain(ours)
    assert all(row.fused and f"in place of '{implementation}'" in row.reason for row in rows)
    batch = {"input_ids": IDS, "labels": IDS}
    assert_as_good_as_torch(*(gradients(m, batch)[1] for m in (ours, theirs, exact)))


CLAMPED = {  # the gates of these families, of which kernels know the formula
    "gpt_oss": ("interleaved", 1.0),
    "openai_privacy_filter": ("halves", 1.0),
    "deepseek_v4": ("halves", 0.0),
}


@pytest.mark.parametrize("name", CLAMPED)
def test_the_constants_of_a_clamped_gate(name: str) -> None:
    model = make(name).requires_grad_(False)
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    layout, plus = CLAMPED[name]
    alpha = getattr(experts, "alpha", 1.0)
    gate = mixture_of(experts).gate
    assert gate[1:] == (None, layout, (alpha, experts.limit, plus))
    experts.limit = 0.25  # another number is another gate
    gu = torch.randn(5, 12, dtype=torch.float64)
    with torch.device("meta"):  # a default device is not where the formula is tried
        gate = mixture_of(experts).gate
    assert gate.clamp == (alpha, 0.25, plus)
    assert_same_number(clamped(gu, layout, gate.clamp), gate.function(gu))

    own = type(experts)

    class Other(own):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return 1.01 * super()._apply_gate(gate_up)

    experts.__class__ = Other
    assert mixture_of(experts).gate.clamp is None
    experts.__class__ = own
    experts._apply_gate = lambda h: h
    assert mixture_of(experts).gate.clamp is None
