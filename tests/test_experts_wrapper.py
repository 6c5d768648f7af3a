"""Wrappers of experts' parameters that run as one operation: flags, adapters, merging, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern.tuners.lora import experts_call
from peftkern.tuners.lora.parameter import ParamWrapper
from tests import moe_models
from tests.closeness import assert_as_good_as_torch, assert_same_number
from tests.field import quietly
from tests.moe_models import FLAGS, both, experts_of, fused, ids, numbers, tiny, tiny_pair, wrappers
from tests.tiny import fill

ONE_OF_TWO = {"up": slice(0, 1), "down": slice(1, 2), "both": slice(0, 2)}


def apart(model: Any) -> Any:
    """A copy of the model with a hook on its experts, so that they get W + scaling · B A."""
    other = copy.deepcopy(model)
    experts_of(other).register_forward_hook(lambda *call: None)
    assert not any(fused(other))
    return other


def same_as_apart(model: Any, **call: Any) -> None:
    assert any(fused(model))
    assert_same_number(numbers(model, **call), numbers(apart(model), **call))


@pytest.mark.parametrize("which", ONE_OF_TWO)
@pytest.mark.parametrize("kind", FLAGS)
def test_every_flag_of_the_interface(kind: str, which: str) -> None:
    targets = both(kind)[ONE_OF_TWO[which]]
    ours, theirs = tiny_pair(kind, target_parameters=targets)
    assert all(fused(ours)), str(peftkern.explain(ours))
    assert_same_number(numbers(ours), numbers(theirs))
    with ours.disable_adapter(), torch.no_grad():
        assert_same_number(ours(ids()), tiny(kind)(ids()))
        assert (ours(ids()) - theirs(ids())).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"experts.down_proj": 5}, "alpha_pattern": {"experts.gate_up_proj": 9}},
        {"use_rslora": True},
        {"init_lora_weights": False},
    ],
    ids=lambda s: next(iter(s)),
)
def test_ranks_and_scalings_of_their_own(settings: dict[str, Any]) -> None:
    ours, theirs = tiny_pair(**settings)
    assert all(fused(ours))
    assert_same_number(numbers(ours), numbers(theirs))


def test_several_adapters() -> None:
    ours, theirs = tiny_pair(names=("default", "other"))
    for active in ("other", ["default", "other"], "default"):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        assert all(fused(ours))
        assert_same_number(numbers(ours), numbers(theirs))
    for model in (ours, theirs):
        quietly(model.delete_adapter, "default")
    assert_same_number(numbers(ours), numbers(theirs))


def test_merging_all_and_one_of_two_wrappers() -> None:
    ours, theirs = tiny_pair()
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        want = theirs(ids())
        for merged in ([0], [1], [0, 1]):
            for i in merged:
                wrappers(ours)[i].merge()
            assert fused(ours) == [i not in merged for i in range(2)]
            assert_same_number(ours(ids()), want)
            for i in merged:
                wrappers(ours)[i].unmerge()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, before[key])
        wrappers(ours)[1].merge()
        with ours.disable_adapter():  # takes it out of the weight again
            assert_same_number(ours(ids()), tiny()(ids()))
        assert_same_number(ours(ids()), want)
        assert_same_number(ours.merge_and_unload()(ids()), want)


def test_either_order_of_the_wrappers() -> None:
    ours, _ = tiny_pair(names=("default", "other"))
    outer, inner = wrappers(ours)
    want = numbers(ours)
    module, model = inner.base_layer, ours.base_model.model
    model.experts, inner.base_layer, outer.base_layer = inner, outer, module
    assert wrappers(ours)[0] is inner and all(fused(ours))
    got = numbers(ours)
    assert_same_number([got["output"], got["loss"]], [want["output"], want["loss"]])
    same_as_apart(ours)


def test_an_adapter_with_weights_in_one_wrapper_only() -> None:
    for i in range(2):
        ours, _ = tiny_pair(names=("default", "other"))
        wrappers(ours)[i].delete_adapter("other")
        ours.base_model.set_adapter(["default", "other"])
        same_as_apart(ours)
        ours.base_model.set_adapter("other")
        assert fused(ours) == [i != 0, i != 1]
        same_as_apart(ours)


def test_indices_beyond_the_experts_add_nothing() -> None:
    ours, theirs = tiny_pair()
    for model in (ours, theirs):
        model.base_model.model.experts.get_base_layer()._is_expert_parallel = True
    x = torch.randn(6, moe_models.WIDTH, dtype=torch.float64)
    index = torch.tensor([[0, 1], [5, 2], [3, 5], [5, 5], [4, 0], [2, 2]])
    weights = torch.rand(6, 2, dtype=torch.float64).masked_fill(index == 5, 0.0)
    with torch.no_grad():
        got = ours.base_model.model.experts(x, index, weights)
        want = theirs.base_model.model.experts(x, index, weights)
    assert_same_number(got, want)
    assert not got[3].any()


def test_one_operation_a_call_and_none_without_adapters(monkeypatch) -> None:
    ours, _ = tiny_pair()
    calls: list[Any] = []
    op = experts_call.lora_experts
    monkeypatch.setattr(
        experts_call, "lora_experts", lambda *a, **k: calls.append((a, k)) or op(*a, **k)
    )
    with torch.no_grad():
        ours(ids())
        assert len(calls) == 1
        _, _, _, up, down, gate = calls[0][0]
        assert len(up.factors) == len(down.factors) == 1 and gate.name == "silu"
        with ours.disable_adapter():
            ours(ids())
        ours.merge_adapter()
        ours(ids())
    assert len(calls) == 1


def test_the_gates_that_kernels_know() -> None:
    def gate(kind: str, act: Any = None) -> Any:
        experts = tiny(kind).experts.requires_grad_(False)
        if act is not None:
            del experts.act_fn  # a module cannot give way to a function
            experts.act_fn = act
        return experts_call.mixture_of(experts).gate

    assert gate("plain")[1:3] == ("silu", "halves")
    assert gate("plain", nn.functional.silu)[1:3] == ("silu", "halves")
    assert gate("plain", nn.ReLU())[1:3] == ("relu", "halves")
    assert gate("plain", torch.tanh)[1:3] == (None, "halves")
    assert gate("no_gate")[1:3] == ("silu", "alone")
    assert gate("interleaved").name is None
    own = tiny("plain").experts.requires_grad_(False)
    own._apply_gate = lambda h: h.chunk(2, dim=-1)[0]
    assert experts_call.mixture_of(own).gate[:2] == (own._apply_gate, None)


def test_copies_and_pickles() -> None:
    ours, _ = tiny_pair()
    want = numbers(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(fused(other))
        assert_same_number(numbers(other), want)
        fill(other, seed=9)  # the copy's own weights are read
        assert (numbers(other)["output"] - want["output"]).abs().max() > 1e-3
    assert_same_number(numbers(ours), want)


def test_files_hot_swaps_and_weights_that_come_later(tmp_path) -> None:
    ours, theirs = tiny_pair()
    theirs.save_pretrained(tmp_path)
    want = numbers(theirs)
    model = peftkern.PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=True)
    with torch.no_grad():
        assert all(fused(model))
        assert_same_number(model(ids()), want["output"])
        fill(ours, seed=8)
        peftkern.utils.hotswap.hotswap_adapter(ours, str(tmp_path), "default")
        assert all(fused(ours))
        assert_same_number(ours(ids()), want["output"])
        wrappers(ours)[0].scaling["default"] = torch.tensor(2.0, dtype=torch.float64)
    same_as_apart(ours)


def test_keywords_and_other_arguments() -> None:
    ours, _ = tiny_pair()
    experts = ours.base_model.model.experts
    x = torch.randn(4, moe_models.WIDTH, dtype=torch.float64)
    index, weights = torch.tensor([[0, 1]] * 4), torch.rand(4, 2, dtype=torch.float64)
    with torch.no_grad():
        want = experts(x, index, weights)
        assert torch.equal(experts(x, top_k_weights=weights, top_k_index=index), want)
        with pytest.raises(TypeError, match="top_k_weights"):  # the module's own error
            experts(x, index)
        # another dtype than the experts' is the module's affair too
        with pytest.raises(RuntimeError, match="dtype"):
            experts(x.float(), index, weights)
    assert isinstance(experts, ParamWrapper)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    ours = moe_models.alone(lora_dropout=0.3).train()
    experts = ours.base_model.model.experts
    forward = experts.forward
    router = ours.base_model.model.router
    router.requires_grad_(True)  # a reentrant checkpoint asks for an input with a gradient
    want = numbers(ours)

    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=reentrant)

    experts.forward = checkpointed
    assert_same_number(numbers(ours), want)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_autocast_is_as_good_as_hf_pefts(implementation: str) -> None:
    exact = numbers(tiny_pair()[1])
    models = []
    for lib in (peftkern, peft):
        base = tiny("plain", implementation, torch.float32)
        model = moe_models.adapt(lib, base, target_parameters=both("plain"))
        with torch.autocast("cpu", torch.bfloat16):
            models.append(numbers(model))
    assert all(a.dtype == b.dtype for a, b in zip(*(m.values() for m in models), strict=True))
    assert_as_good_as_torch(*models, exact)
