"""``--fsdp``: the weights, gradients and optimizer states divided among the processes (FSDP2).

What is written and read is whole, so that a checkpoint does not depend on the division. With
``--deepspeed``, DeepSpeed divides them and keeps its own parts in a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.gathering import is_shard
from ..utils.module_tree import no_split_modules
from ..utils.shards import part_like, whole


def shard(model: nn.Module, device: str) -> None:
    """Divide the parameters of ``model`` among all processes, layer by layer, in place.

    Each module that the base model keeps on one device is gathered by itself before its forward and
    its backward, the rest with the whole model. ``device`` is the kind of device, "cuda" or "cpu".
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    layers = no_split_modules(model)
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def start_deepspeed() -> None:
    """Let DeepSpeed use the group of processes that is there; ZeRO-3 asks it for their number."""
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    deepspeed.init_distributed(auto_mpi_discovery=False)


def whole_in(value: Any) -> Any:
    """``value`` with every DTensor in its dicts and lists gathered on the CPU; all must call it."""
    if isinstance(value, dict):
        return {key: whole_in(of) for key, of in value.items()}
    if isinstance(value, list):
        return [whole_in(of) for of in value]
    return whole(value).cpu() if is_shard(value) else value


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The whole trained parameters by name; all processes must call it."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(p, "ds_id") for p in own.values()):
        import deepspeed  # type: ignore[import-not-found, unused-ignore]

        with deepspeed.zero.GatheredParameters(list(own.values())):
            return {n: p.detach().cpu().clone() for n, p in own.items()}
    return {n: whole_in(p.detach()) for n, p in own.items()}


def share_out(optimizer: Any) -> None:
    """Divide the states of an optimizer, which are whole, as their parameters are divided."""
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                states[name] = part_like(parameter, value)
