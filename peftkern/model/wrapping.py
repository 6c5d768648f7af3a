"""Ranks compare their adapters where torch's wrappers for several processes make them meet.

That is where DistributedDataParallel wraps a model, and before the first forward of a model that
FSDP has sharded: there every rank comes, or the program ends in torch's own collective. Nothing is
asked in later steps. DeepSpeed shows nothing of its wrapper: ZeRO-3's first forward is late for
weights of other shapes, and of ZeRO-1 and ZeRO-2 a model knows nothing. For these, and for loops of
one's own, there is :func:`check_ranks`.

torch calls a function when a module gets a child, which shows both of its wrappers; fully_shard
(FSDP2) makes none, but gives the model another class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import register_module_module_registration_hook

from ..tuners.agreement import compare, group_of, has_adapters, of_model
from ..utils.gathering import is_shard, shares_weights
from ..utils.notes import Note, time_out
from ..utils.private import FSDP

# how long a rank waits for the others' notes, in seconds, before it goes on to torch's collectives
# without them: with adapters, and without any, when it is likely that nobody has one
WITH, WITHOUT = 60.0, 10.0
_COMPARED = "peftkern_compared"


def check_ranks(model: nn.Module, ranks: Sequence[int] | None = None) -> None:
    """Raise an error, on every rank, unless all have the same adapters in ``model``.

    All ranks must call, each with its model; no collective is called. Compared are the adapters'
    names and configurations, which are active, the layers, and the names and shapes of all that
    trains. DDP, FSDP and tensor parallelism do it by themselves; call this before
    ``deepspeed.initialize``, or in a training loop of your own.

    Args:
        model: a PeftModel, or any model.
        ranks: the global ranks that have it, the same on each; None: all.

    Raises:
        ValueError: two ranks differ; the message has what differs and the values of both.
        RuntimeError: a rank has not called within the time-out of the process group.
    """
    if not shares_weights():
        return
    members = list(range(dist.get_world_size())) if ranks is None else list(ranks)
    compare("check_ranks", "check_ranks", members, _note(model))


def watch_wrappers() -> None:
    """Let torch say what its wrappers are put around."""
    if dist.is_available():
        register_module_module_registration_hook(_registered)


def _registered(parent: nn.Module, name: str, child: Any) -> None:
    if name == "module":
        if isinstance(parent, nn.parallel.DistributedDataParallel) and child is not None:
            ranks = dist.get_process_group_ranks(parent.process_group)
            _compare(child, "DistributedDataParallel", ranks)
    elif name == FSDP.removesuffix(".") and isinstance(parent, _fsdp("FullyShardedDataParallel")):
        _arm(parent)


def note_class(model: nn.Module) -> None:
    """Take note of the class that a PeftModel has got: FSDP2 has sharded it, perhaps."""
    if isinstance(model, _fsdp("FSDPModule")):
        _arm(model)


def _fsdp(name: str) -> Any:
    """A class of torch's FSDP, which may not be imported yet; then nothing is an instance of it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def _arm(module: nn.Module) -> None:
    """Compare adapters in the first call of ``module``, before the hooks that gather weights."""
    module.register_forward_pre_hook(_in_first_call, prepend=True)


def _disarm(module: nn.Module) -> None:
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook is _in_first_call:
                del part._forward_pre_hooks[key]


def _in_first_call(module: Any, _: Any) -> None:
    """A hook: the outermost module that FSDP has sharded is called, by all of its ranks."""
    if is_compiling():
        return
    trains = module.training and torch.is_grad_enabled()
    ranks = _meeting(module, trains)
    if ranks is None:
        return
    _disarm(module)  # those within it, too
    _compare(module, "FSDP", ranks)


def _meeting(module: Any, trains: bool) -> list[int] | None:
    """The ranks that come to this forward for certain; None when that is not known of all."""
    if isinstance(module, _fsdp("FullyShardedDataParallel")):
        if not trains and module.sharding_strategy.name == "NO_SHARD":
            return None  # gathers nothing
        return list(dist.get_process_group_ranks(module.process_group))
    shard: Any = next(filter(is_shard, module.parameters()), None)
    if shard is None:
        return []
    # replicas meet in a backward alone
    return None if shard.device_mesh.ndim > 1 and not trains else group_of(shard)


def compare_under_zero(model: nn.Module) -> None:
    """Compare adapters in the first forward under ZeRO-3, in which all ranks gather weights."""
    if model.__dict__.get(_COMPARED) or is_compiling():
        return
    model.__dict__[_COMPARED] = True
    groups: Any = (getattr(p, "ds_process_group", None) for p in model.parameters())
    group = next((g for g in groups if g is not None), None)
    if group is not None:
        _compare(model, "ZeRO-3", dist.get_process_group_ranks(group))


def _note(module: nn.Module) -> Note:
    # FSDP1's flat weights are cut without regard to shapes
    kind = _fsdp("FullyShardedDataParallel")
    return of_model(module, shapes=not any(isinstance(part, kind) for part in module.modules()))


def _compare(module: nn.Module, wrapper: str, ranks: list[int]) -> None:
    if len(ranks) < 2:
        return
    note = _note(module)
    # a part of the group's time-out: the others may wait in torch's collective, which has it too
    limit = min(WITH if has_adapters(note) else WITHOUT, time_out() / 2)
    compare(wrapper, f"{wrapper} over {len(ranks)} ranks", ranks, note, limit)
