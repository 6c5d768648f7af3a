"""Tensors of which each process has a part (DTensors): gathered for a file, and shared out again.

Every process must call what gathers. One process then writes, and the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..utils.gathering import is_shard
from ..utils.shards import part_like


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value of ``target``'s shape into it, or this process's part of it."""
    target.copy_(part_like(target, value.to(target.dtype)))


def sharing(tensors: Iterable[Tensor]) -> bool:
    """True when one of the tensors is shared out, so that every process must help to save it."""
    return any(map(is_shard, tensors))


def by_one(write: Callable[[], None], writes: bool) -> None:
    """Run ``write`` in the first of the processes that ask for it; all wait for its end.

    Args:
        write: what writes the files.
        writes: False in a process that is not to write.

    Raises:
        RuntimeError: another process, which writes, failed; the message has its error.
    """
    from torch import distributed as dist

    asked: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(asked, writes)
    if not any(asked):
        return
    first = asked.index(True)
    said, error = [None], None
    if dist.get_rank() == first:
        try:
            write()
        except BaseException as e:
            error = e
            said = [f"{type(e).__name__}: {e}"]  # type: ignore[list-item]
    dist.broadcast_object_list(said, src=first)
    if error is not None:
        raise error
    if said[0] is not None:
        raise RuntimeError(f"process {first}, which writes the adapter's files, failed: {said[0]}")
