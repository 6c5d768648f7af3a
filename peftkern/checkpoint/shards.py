"""Tensors of which each process has a part (DTensors): gathered for a file, and shared out again.

Every process must call what gathers. One process then writes, and the others wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..tuners.agreement import compare, of_model, refuse
from ..tuners.tensor_parallel import tensor_parallel
from ..utils.gathering import is_shard, shares_weights
from ..utils.notes import is_lost
from ..utils.shards import part_like
from .slots import adapter_slots, clean


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value of ``target``'s shape into it, or this process's part of it."""
    target.copy_(part_like(target, value.to(target.dtype)))


def sharing(tensors: Iterable[Tensor]) -> bool:
    """True when one of the tensors is shared out, so that every process must help to save it."""
    return any(map(is_shard, tensors))


def saved_by_all(model: Any, given: dict[str, Any] | None, names: Iterable[str]) -> bool:
    """True when processes share tensors of these adapters out, so that all must help to save them.

    ``given`` is the state dict to save, if it is not the model's own.
    """
    slots = [slot for name in names for slot in adapter_slots(model, name)]
    if given is None:
        shared = sharing(slot.tensor for slot in slots)
    else:  # accelerate gives one process alone the base model's shards beside whole adapters
        own = {key for slot in slots for key in (*slot.model_keys, slot.key)}
        shared = sharing(value for key, value in given.items() if clean(key) in own)
    return shared or tensor_parallel(model) is not None


_SAVE = "save_pretrained"
_WHAT = "`save_pretrained` of a model that processes share out"


def meet_to_save(model: Any, names: list[str], given: bool) -> None:
    """Compare with all processes what they are about to save, before any gathers.

    Raises:
        ValueError: they have different adapters, or one has called :func:`refuse_together`.
        RuntimeError: one has not come within the group's time-out.
    """
    if not shares_weights():
        return
    note = of_model(model, names=names, training=False)
    asked = {"what is saved": f"{names}{' of a `state_dict`' if given else ''}"}
    compare(_SAVE, _WHAT, _world(), {**note, "asked": asked})


def refuse_together(model: Any, given: dict[str, Any] | None, error: Exception) -> None:
    """Tell the other processes, which may be saving with this one, that it has failed before."""
    if shares_weights() and saved_by_all(model, given, list(model.peft_config)):
        refuse(_SAVE, _world(), error)


@contextmanager
def told_of_the_lost(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A context that says what has become of a save when another process does not go on with it."""
    try:
        yield
    except Exception as error:
        if not is_lost(error):
            raise
        raise RuntimeError(
            f"{_WHAT}: another process has ended, or does not answer ({error}). "
            f"{os.fspath(folder)!r} holds the last complete save"
        ) from error


def _world() -> range:
    return range(torch.distributed.get_world_size())


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
