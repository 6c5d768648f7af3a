"""DTensors, of which each process has a part, read and written as whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gathering import is_shard


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its elements, detached; all processes that have parts must call."""
    tensor = tensor.detach()
    if not is_shard(tensor):
        return tensor
    found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found


def frozen(weight: Tensor) -> Tensor:
    """A weight without its gradient, gathered if it is a DTensor: then all processes must call."""
    return whole(weight) if is_shard(weight) else weight


def part_like(target: Any, value: Tensor) -> Tensor:
    """``value``, or of a DTensor ``target`` a DTensor of it with the same placements.

    Every process has the whole value; nothing is sent.
    """
    if not is_shard(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device=target.device_mesh.device_type)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def put_data(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter another tensor of its shape; ``.data`` of a DTensor keeps its old part.

    A DTensor is written to where the dtype stays: after its first forward FSDP2 gathers from the
    memory that it has found then.
    """
    if not is_shard(parameter):
        parameter.data = value
    elif (parameter.shape, parameter.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            parameter.copy_(value)
    else:
        new = nn.Parameter(value, requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, new)


def memory_of(tensor: Any) -> int:
    """The address of a tensor's memory; 0 for one that has none, such as a fake one.

    A DTensor itself has none, but its local tensor has.
    """
    try:
        if is_shard(tensor):
            tensor = tensor.detach().to_local()
        return int(tensor.data_ptr())
    except RuntimeError:
        return 0
