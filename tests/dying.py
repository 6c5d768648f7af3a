"""Two processes that save a model which they share out, until one of them dies."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

import peftkern
from peftkern.checkpoint import saving, writing
from tests import ranks
from tests.sharded import WAYS, adapted

RANKS = 2
TIME_OUT = 5  # seconds, of the group in which a rank waits for one that never comes
NEXT = "the next save"


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _at(owner: Any, name: str) -> Callable[[], Any]:
    return lambda: mock.patch.object(owner, name, _die)


# {when a rank dies: (its number, what it dies in, what the other one says)}
DYING: dict[str, tuple[int, Callable[[], Any], str]] = {
    "before the save": (1, _at(saving, "meet_to_save"), "rank 1 has not come within 5 seconds"),
    "while all gather": (1, _at(saving, "check_whole"), "another process has ended"),
    # the weights are written already, beside the old ones
    "while it writes": (0, _at(writing, "_save_config"), "another process has ended"),
}


def weights(value: float, model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(value)


def save(folder: Path, when: str, rank: int) -> str:
    """Save ones, and then twos while a rank dies; or, as the next ranks, threes alone."""
    model = WAYS["fsdp2, layers"](adapted("lora"))
    if when == NEXT:
        for each in DYING:
            weights(3.0, model)
            model.save_pretrained(folder / each)
        return ""
    weights(1.0, model)
    model.save_pretrained(folder / when)
    weights(2.0, model)
    victim, death, _ = DYING[when]
    try:
        if rank == victim:
            with death():
                model.save_pretrained(folder / when)
        else:
            model.save_pretrained(folder / when)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        # the group is broken: it is not left in good order
        torch.save(said, folder / f"{when}.pt")
        os._exit(0)
    raise AssertionError("the save went on without one of the processes")


def values(folder: Path) -> set[float]:
    """The numbers in an adapter's file, as it loads."""
    found = peftkern.load_peft_weights(folder, device="cpu")
    assert len(found) == 28
    return {float(number) for weight in found.values() for number in weight.unique()}


def start(folder: Path, when: str) -> int:
    """Run a case in two processes of its own; returns the number of a third one, which has both."""
    child = os.fork()
    if child == 0:
        (group := folder / f"group of {when}").mkdir()
        try:
            seconds = TIME_OUT if when.startswith("before") else 60
            ranks.fork(group, RANKS, functools.partial(save, folder, when), seconds)
        finally:
            os._exit(0)
    return child


def run(folder: Path) -> None:
    """Run every case, and save {case: what is there after it}."""
    for child in [start(folder, when) for when in DYING]:
        os.waitpid(child, 0)
    found = {when: (torch.load(folder / f"{when}.pt"), values(folder / when)) for when in DYING}
    os.waitpid(start(folder, NEXT), 0)
    found[NEXT] = "", set.union(*(values(folder / when) for when in DYING))
    torch.save(found, folder / "dying.pt")
