"""Adapters of parameters in models on which accelerate put hooks: offloaded, or over devices."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from torch import Tensor, nn

import peftkern
from tests import moe_models
from tests.closeness import assert_same_number
from tests.moe_models import experts_of, fused, ids, numbers, tiny

CPU = torch.device("cpu")


class Free(moe_models._Experts):
    """Experts of no class of the interface."""

    flags: dict[str, Any] = {}  # noqa: RUF012

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up


class Outside(moe_models.Tiny):
    def __init__(self) -> None:
        super().__init__("plain")
        self.experts = Free(self.config)


def models(kind: str) -> tuple[Any, Any]:
    """Two with the same numbers."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(Outside().double() if kind == "outside" else tiny(kind))
    return found[0], found[1]


def adapted(base: Any, kind: str) -> Any:
    names = moe_models.both("plain" if kind == "outside" else kind)
    return moe_models.adapt(peftkern, base, ("default", "other"), target_parameters=names)


@pytest.mark.parametrize("kind", ["plain", "no_gate_bias_transposed", "outside"])
@pytest.mark.parametrize("adapters_too", [False, True])
def test_calls_gradients_and_merging(kind: str, adapters_too: bool) -> None:
    base, other = models(kind)
    here, away = adapted(other, kind), adapted(base, kind)
    outer = away.base_model.model.experts
    accelerate.cpu_offload(outer if adapters_too else experts_of(away), execution_device=CPU)
    assert experts_of(away).down_proj.is_meta
    assert fused(away) == fused(here) == [kind != "outside"] * 2
    with torch.no_grad():
        assert_same_number(away(ids()), here(ids()))
        if kind != "outside":
            names = ["other", "__base__", "default"]
            assert_same_number(away(ids(), adapter_names=names), here(ids(), adapter_names=names))
    if not adapters_too:  # accelerate's copies of offloaded adapters do not train
        assert_same_number(numbers(away), numbers(here))
    with torch.no_grad(), away.disable_adapter(), here.disable_adapter():
        assert_same_number(away(ids()), here(ids()))
    away.merge_adapter()
    here.merge_adapter()
    with torch.no_grad():
        assert_same_number(away(ids()), here(ids()))
    experts = experts_of(away)
    assert experts.down_proj.is_meta and "forward" in experts.__dict__


@pytest.mark.parametrize("kind", ["plain", "outside", "post_norm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_over_several_devices(kind: str, when: str) -> None:
    """As `device_map="auto"` has it: a hook on every module moves its inputs, and nothing else."""
    if kind not in (*moe_models.FLAGS, "outside"):
        pytest.skip("transformers 5.17 has no such flag")
    base, other = models(kind)
    here = adapted(other, kind)
    if when == "before":
        attach_execution_device_hook(base, CPU)
    there = adapted(base, kind)
    if when == "after":
        attach_execution_device_hook(there, CPU)
    assert "forward" in experts_of(there).__dict__
    assert fused(there) == fused(here) == [kind != "outside"] * 2
    assert_same_number(numbers(there), numbers(here))
    if kind != "outside":
        names = ["other", "__base__", "default"]
        assert_same_number(there(ids(), adapter_names=names), here(ids(), adapter_names=names))
    assert "forward" in experts_of(there).__dict__
    experts_of(there).register_forward_hook(lambda module, args, out: 2 * out)
    experts_of(here).register_forward_hook(lambda module, args, out: 2 * out)
    assert fused(there) == fused(here) == [False] * 2
    assert_same_number(numbers(there), numbers(here))


def test_dropout_over_several_devices() -> None:
    base, _ = models("plain")
    attach_execution_device_hook(base, CPU)
    model = moe_models.adapt(
        peftkern, base, target_parameters=moe_models.both("plain"), lora_dropout=0.5
    )
    model.train()
    torch.manual_seed(0)
    first = model(ids())
    assert not torch.equal(first, model(ids()))


def test_an_error_in_a_call_leaves_weights_where_they_were() -> None:
    base, _ = models("plain")
    model = adapted(base, "plain")
    outer = model.base_model.model.experts
    accelerate.cpu_offload(outer, execution_device=CPU)
    x = torch.zeros(2, moe_models.WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="index has -1"), torch.no_grad():
        outer(x, torch.full((2, 1), -1), torch.ones(2, 1, dtype=torch.float64))
    experts = experts_of(model)
    assert experts.gate_up_proj.is_meta and "forward" in experts.__dict__
    with torch.no_grad():
        assert model(ids()).isfinite().all()


def test_a_weight_of_two_dimensions() -> None:
    base, other = (nn.Sequential(nn.Linear(4, 3)).double() for _ in range(2))
    other.load_state_dict(base.state_dict())
    settings = {"target_modules": [], "target_parameters": ["0.weight"]}
    here, away = (moe_models.adapt(peftkern, m, **settings) for m in (other, base))
    accelerate.cpu_offload(away, execution_device=CPU)
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        assert_same_number(away(x), here(x))


@pytest.mark.parametrize("whole", [True, False])
def test_sharded_by_fsdp2(whole: bool, tmp_path: Any) -> None:
    """The adapted module brings W and factors together; the experts alone do not."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base, other = models("plain")
    here, there = adapted(other, "plain"), adapted(base, "plain")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        outer = there.base_model.model.experts
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(outer if whole else experts_of(there), mesh=mesh)
        if whole:
            got, want = numbers(there), numbers(here)
            full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in got.items()}
            assert_same_number(full, want)
        else:
            with pytest.raises(RuntimeError, match="sharded .* give fully_shard the adapted"):
                there(ids())
    finally:
        dist.destroy_process_group()
