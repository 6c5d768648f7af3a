"""Notes that the processes of a group leave for each other, without a collective.

A collective that one process alone calls hangs. A note goes through the store in which the
processes found each other: leaving one waits for nobody, and looking for the others' ends after a
time. So what is compared here never hangs a program in which the others do something else.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .gathering import shares_weights
from .private import default_store

# {topic: {what: its value, in words}}
Note = Mapping[str, Mapping[str, str]]
# how often this process has been at a place with these ranks
_COUNTS: dict[tuple[str, tuple[int, ...]], int] = {}
_LONGEST_PAUSE = 0.1  # seconds between two looks


def time_out() -> float:
    """The time-out of the process group, in seconds."""
    store = default_store() if shares_weights() else None
    return 0.0 if store is None else float(store.timeout.total_seconds())


def exchange(
    place: str, ranks: Sequence[int], note: Note, limit: float
) -> dict[int, Note | None] | None:
    """Leave ``note`` and look for those of the other ``ranks``, for ``limit`` seconds at most.

    Args:
        place: a name of the place in the program, to which all ranks come equally often.
        ranks: the global ranks that come, this one among them, in the same order on each.
        note: what this process says.
        limit: seconds; with 0 nothing is waited for.

    Returns:
        {rank: its note, or None when it left none in time}. None where there is nobody to talk to:
        no group, one rank, or a group without a store.
    """
    store = default_store() if len(ranks) > 1 and shares_weights() else None
    if store is None:
        return None
    members = tuple(ranks)
    count = _COUNTS[place, members] = _COUNTS.get((place, members), 0) + 1
    among = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    prefix = f"peftkern/{place}/{among}/{count}"
    text = json.dumps(note).encode()
    own = hashlib.sha256(text).hexdigest()
    me = torch.distributed.get_rank()
    # the details first: who finds the digest finds them too
    store.set(f"{prefix}/{me}/details", zlib.compress(text).hex())
    store.set(f"{prefix}/{me}", own)
    absent = _wait(store, {rank: f"{prefix}/{rank}" for rank in members}, limit)
    known: dict[str, Note] = {own: note}
    found: dict[int, Note | None] = {}
    for rank in members:
        if rank in absent:
            found[rank] = None
            continue
        digest = store.get(f"{prefix}/{rank}").decode()
        if digest not in known:
            packed = bytes.fromhex(store.get(f"{prefix}/{rank}/details").decode())
            known[digest] = json.loads(zlib.decompress(packed))
        found[rank] = known[digest]
    return found


def _wait(store: Any, keys: dict[int, str], limit: float) -> set[int]:
    """The ranks whose keys are not in the store when ``limit`` seconds have passed.

    It looks again and again: a blocking ``wait`` would keep the store from NCCL's watchdog.
    """
    end, pause = time.monotonic() + limit, 0.001
    while not store.check(list(keys.values())):
        if time.monotonic() >= end:
            return {rank for rank, key in keys.items() if not store.check([key])}
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return set()


def is_lost(error: BaseException) -> bool:
    """True for an error of torch's communication: another process is gone, or does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo's errors have no class of their own
    words = ("gloo", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
