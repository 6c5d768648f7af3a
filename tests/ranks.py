"""Processes that train together: forked by a module of this folder, read by its tests.

``python -m tests.NAME FOLDER`` calls :func:`fork`; :func:`results` starts it.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.children import python

NEEDS_GLOO = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo here"
)


def whole(t: Any) -> Tensor:
    """A tensor of which this process may have a part."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def fork(folder: Path, ranks: int, run: Callable[[int], Any], seconds: int = 60) -> NoReturn:
    """Run ``run(rank)`` in ``ranks`` processes of one gloo group, and end this one.

    What ``run`` returns is saved in the folder. The status is that of the process that failed
    worst. ``seconds`` is the time-out of the group.
    """
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)  # torch 2.11's pool of threads does not outlive a fork
                _join(folder, ranks, rank, seconds)
                torch.save(run(rank), _file(folder, rank))
                dist.destroy_process_group()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    failed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, failed)))


def _join(folder: Path, ranks: int, rank: int, seconds: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), ranks)
    limit = datetime.timedelta(seconds=seconds)
    store.set_timeout(limit)  # as torch does with a store that it makes itself
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pt"


def results(module: str, folder: Path, ranks: int, *more: str) -> list[Any]:
    """What the processes of ``python -m module folder`` returned, in the order of their ranks.

    ``more`` are further arguments.
    """
    done = python("-m", module, str(folder), *more)
    assert done.returncode == 0, done.stderr
    return [torch.load(_file(folder, rank)) for rank in range(ranks)]
