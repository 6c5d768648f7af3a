"""Weights of which a process has a part between calls: FSDP, DeepSpeed and accelerate keep them so.

What shards the weights of a module gathers them in a call of that module, by hooks or by a module
around it, and frees them after. So a weight is read only where :func:`is_whole` says that nothing
gathers it; from any other module the numbers are had by a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .private import FSDP


def has_hooks(module: nn.Module) -> bool:
    """True when a call of the module runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_whole(module: Any) -> bool:
    """True when ``module.weight`` may be read: a plain Parameter that no call must gather first.

    False for a module that FSDP1 has put around another.
    """
    weight = module._parameters.get("weight")
    # DeepSpeed leaves an empty tensor in a Parameter that it has sharded, and marks it
    return type(weight) is nn.Parameter and not has_hooks(module) and not hasattr(weight, "ds_id")


def is_part(module: Any, name: str, dims: int) -> bool:
    """True when ``module`` has only a part of a parameter of ``dims`` dimensions now, or none.

    FSDP1 puts a module of its own around the module, or leaves flat parts of weights behind.
    """
    if FSDP.removesuffix(".") in module._modules:
        return True
    weight = held_in(module, name)
    return weight is not None and (is_shard(weight) or weight.dim() != dims)


def unwrapped(module: Any) -> Any:
    """The module within the one that FSDP1 has put around it; any other module itself."""
    return module._modules.get(FSDP.removesuffix("."), module)


def held_in(module: Any, name: str = "weight") -> Any:
    """A module's parameter, or what FSDP1 keeps in its place: in backwards, an attribute."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def is_gathered(weight: Any, shape: tuple[int, ...]) -> bool:
    """True for a Parameter, and for a whole weight that FSDP1 has put in its place.

    During a forward that is a view of the flat parameter, of which it is a part.
    """
    if type(weight) is nn.Parameter:
        return True
    return type(weight) is Tensor and weight.shape == shape and shares_weights()


def shares_weights() -> bool:
    """True when this process works together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_shard(weight: Any) -> bool:
    """True for a DTensor, which FSDP2 and tensor parallelism put in a weight's place."""
    return hasattr(weight, "full_tensor")


def gathered_device(weight: Tensor) -> torch.device:
    """The device that a weight will be on while it is gathered; offloaded shards are on another."""
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else torch.device(mesh.device_type)
