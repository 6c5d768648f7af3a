"""How many bytes a streaming kernel must have on the way, and the stages that keep them there.

A multiprocessor that waits for memory gets (bytes on the way) / latency (Little's law), so a pass
over X runs at the memory's speed only if the loads issued and not yet arrived cover bandwidth times
latency. A loop of ``num_stages`` has the tiles of num_stages - 1 steps on the way for each program.
"""

from __future__ import annotations

from .common import Arch, cdiv

LATENCY = 700e-9  # seconds from a load to its data under load, from device memory

# bytes a second of the fastest GPU of a capability: nine tenths of the data sheet's. A slower one
# (an H100, where sm_90 is an H200) has more on the way than it needs.
_BANDWIDTH = {80: 1.84e12, 86: 0.84e12, 89: 0.91e12, 90: 4.32e12, 100: 7.2e12, 120: 1.61e12}


def needed(arch: Arch) -> float:
    """Bytes that the whole device must have on the way to run at its memory's speed."""
    known = [c for c in _BANDWIDTH if c <= arch.capability]
    return _BANDWIDTH[max(known, default=min(_BANDWIDTH))] * LATENCY


def stages(
    arch: Arch,
    programs: int,
    tile: int,
    beside: int = 0,
    resident: int = 1,
    least: int = 3,
    most: int = 6,
    late: int = 0,
) -> int:
    """num_stages, ``least`` to ``most``, of a loop that loads ``tile`` bytes of X in each step.

    ``beside`` are the bytes of a step's other loads (adapters, S, mask words), and a multiprocessor
    has ``resident`` programs at a time. ``late`` stages hold tiles that have arrived and are not
    used yet. Shared memory, which holds all stages, is the limit.
    """
    share = needed(arch) / max(1, min(programs, arch.sms * resident))
    room = arch.shared // resident // (tile + beside)
    return max(2, min(most, room, max(least, 1 + late + cdiv(int(share), tile))))
