"""``Ranks``: the processes of one run, as torchrun or ``accelerate launch`` starts them.

Every process does the same work on its share of the data. The first one, number 0, prints and
writes; what fails in one of them is an error in all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import CommandError, RunError, UserError

T = TypeVar("T")
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# how long a process that does not print waits to be ended by the launcher of the one that does
_PATIENCE = 20.0
# what accelerate's launcher asks for in the environment
_ASKED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``count``, and its number on its machine (for its GPU)."""

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """True in the process that prints and writes."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in each of them, by number; they are pickled."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """The sums of the values over all processes, in float64."""
        return [float(sum(column)) for column in zip(*self.gather(values), strict=True)]

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work()``, which every process does; if it fails in one, all raise.

        Raises UserError or RunError with the message of the first process where it failed.
        """
        if self.count == 1:
            return work()
        error: CommandError | None = None
        try:
            result = work()
        except CommandError as raised:
            error = raised
        except OSError as raised:
            error = RunError(f"cannot read or write: {raised}")
        said = self.gather(None if error is None else (type(error), str(error)))
        failed = [(i, what) for i, what in enumerate(said) if what is not None]
        if not failed:
            return result
        number, (kind, message) = failed[0]
        if len(failed) < self.count:
            message = f"in process {number} of {self.count}: {message}"
        raise kind(message, everywhere=True) from error

    def writes(self, work: Callable[[], Any]) -> None:
        """Let the first process do ``work()``; its errors are raised in all of them."""
        self.together(lambda: work() if self.first else None)

    def leave(self) -> None:
        """End the group, when all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            self.meet()
            dist.destroy_process_group()


ALONE = Ranks()


def started(env: Mapping[str, str] = os.environ) -> Ranks:
    """The processes that the launcher tells of in ``env``; torch is not loaded.

    Raises UserError when the variables of a launcher are there in part.
    """
    count = _number(env, "WORLD_SIZE", 1)
    if count <= 1:
        return ALONE
    absent = [name for name in _NEEDED if not env.get(name)]
    if absent:
        raise UserError(
            f"WORLD_SIZE is {count}, and {', '.join(absent)} not set: start several processes with "
            "torchrun or accelerate launch"
        )
    return Ranks(_number(env, "RANK", 0), count, _number(env, "LOCAL_RANK", 0))


def join(cpu: bool) -> Ranks:
    """The processes of this run, with their group made: gloo, and NCCL beside it for GPUs.

    Raises UserError when the launcher asks for what ``peftkern train`` is asked for by options, or
    when a machine has fewer GPUs than processes.
    """
    _refuse_the_launchers_settings()
    ranks = started()
    if ranks.count == 1:
        return ranks
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available() and not cpu
    if not dist.is_initialized():
        limit = datetime.timedelta(minutes=30)
        dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "gloo", timeout=limit)

    def check() -> None:
        if gpu and ranks.local >= torch.cuda.device_count():
            raise UserError(
                f"{ranks.local + 1} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "start at most one a GPU, or pass --cpu"
            )

    ranks.together(check)
    if gpu:
        torch.cuda.set_device(ranks.local)
    return ranks


def on_cpu(asked: bool) -> bool:
    """True when ``--cpu`` was given to the command or to ``accelerate launch``."""
    return asked or _true(os.environ.get("ACCELERATE_USE_CPU"))


def refuse_other_precision(bf16: bool) -> None:
    """Raise a UserError when accelerate's launcher asks for another precision than the command."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() or "no"
    if asked not in ("no", "bf16" if bf16 else "no"):
        raise UserError(
            f"accelerate launch asks for mixed precision {asked}, and the run computes in "
            f"{'bfloat16' if bf16 else 'float32'}: give peftkern train --bf16 or --no-bf16, and "
            "accelerate the same or --mixed_precision no"
        )


def prints() -> bool:
    """True in the process that prints errors which all processes have."""
    return number() == 0


def number() -> int:
    """The number of this process, as its launcher says."""
    return _number(os.environ, "RANK", 0)


def wait_for_the_first(in_step: bool) -> None:
    """Wait in a process that prints nothing for the one that prints.

    A launcher ends all processes as soon as one has failed. ``in_step`` as in :func:`has_printed`.
    """
    if in_step:
        has_printed(in_step)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_PATIENCE)


def has_printed(in_step: bool) -> None:
    """Let the processes end that wait for this one, if it may talk to them (``in_step``)."""
    if in_step and in_group():
        with contextlib.suppress(Exception):  # they may be gone
            started().meet()


def lost(error: BaseException) -> bool:
    """True for an error of torch's communication: another process is gone, or does not answer."""
    if not in_group():
        return False
    from ..utils.notes import is_lost

    return is_lost(error)


def in_group() -> bool:
    """True while this process belongs to a group of several."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _refuse_the_launchers_settings() -> None:
    for name, what in _ASKED.items():
        if _true(os.environ.get(name)):
            raise UserError(
                f"accelerate launch asks for {what}, which peftkern train does not take from it: "
                "start it with --multi_gpu and a configuration without"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("", "no"):
        raise UserError(
            f"accelerate launch asks for torch.compile ({compiler}), which peftkern train has not"
        )


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on", "y", "t")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    value = env.get(name) or str(default)
    if not value.isdigit():
        raise UserError(f"the environment variable {name} is {value!r}; it must be a number")
    return int(value)
