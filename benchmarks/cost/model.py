"""A model of the time of one launch: a few formulas over what is counted and compiled.

Nothing here is measured. :func:`time_of` has the formulas, :mod:`.gpus` the rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from peftkern.kernels.common import Launch

from ..kernels.entry import Timing
from ..kernels.table import timings, traffic
from ..kernels.traffic import Facts, Traffic
from ..static.key import source_text
from .compiled import facts_of, resident
from .gpus import GPUS, Gpu, memory, products

# Microseconds, assumed: from the end of a launch to the start of the next, in a graph or in a
# stream whose host is ahead; and of the host for one eager launch.
GAP = 1.0
HOST = {"torch": 5.0, "triton": 10.0}
WAVES = 0.25  # the share of the time lost in incomplete waves from which on "waves" binds
ALLOWS = "gdc_launch_dependents"  # in the source of a kernel that lets the next one start
FAST = ("wgmma", "tcgen05")


class Modelled(NamedTuple):
    """The modelled time of a launch on one GPU, in microseconds.

    ``terms`` are memory, L2, math, in flight, waves and launch (see :func:`time_of`); ``binds`` is
    the one to work on. The rest is what they came from; a vendor's kernel has no programs.
    """

    us: float
    terms: dict[str, float]
    binds: str
    name: str = ""
    programs: int = 0
    slots: int = 0  # programs that the GPU holds at a time
    in_flight: float = 0.0  # bytes that a program has asked for and not got, at any time
    waits: float = 0.0  # what an early start saves of the launch in front, if that allows it
    allows: bool = False  # it lets the next launch start early
    follows: bool = False  # it has nothing to do before the launch in front ends

    @property
    def body(self) -> float:
        """The time without the launch itself."""
        return self.us - self.terms["launch"]


class Programs(NamedTuple):
    """What the model needs to know of a launch's programs beside its traffic."""

    count: int
    slots: int
    in_flight: float
    streams: bool = False  # it writes while it still loads


def time_of(launch: Launch, gpu: str | Gpu) -> Modelled:
    """The modelled time of one Triton launch on a GPU; its tensors may be on the meta device.

    With P programs of which the GPU's multiprocessors (``sms``) hold ``slots`` at a time (by
    registers, shared memory, threads and tensor memory of the compiled kernel)::

        memory     = (read + written) / bandwidth
        L2         = requested / l2                 what all programs load, repeats included
        math       = FLOPs / (matrix or fp32)       x 1/mma for mma.sync beside wgmma or tcgen05
                     or integer operations / integer
        in flight  = chain x max(1, P / slots)
        chain      = requested / P / F x latency    + written / bandwidth in a single wave that
                     writes after its last load
        F          = bytes that a program has in flight (Little's law): of each operand that its
                     loops load the tiles that the compiled code asks for ahead, one at least
        wave(n)    = longest of n/P memory, n/P L2, n/P math x (the busiest multiprocessor's
                     programs / their mean), chain
        body       = (P // slots) wave(slots) + wave(P % slots)
        waves      = body - longest of memory, L2, math, in flight
        launch     = GAP + latency                  0 with launch_pdl (see in_a_graph)
        latency    = that of device memory, or of L2 for what a launch just before has written;
                     with launch_pdl such a chain is one latency longer, until that launch's end
                     is seen
        us         = body + launch

    ``binds`` is "launch" if that is half of ``us`` or more, else "waves" if they are a quarter or
    more, else the longest of the four. Requests of several multiprocessors for one line count each,
    without multicast or merging: L2 is an upper bound for products of wide tiles.

    Raises:
        KeyError: the kernel has no rule of traffic, or ``gpu`` is not in ``GPUS``.
        RuntimeError: it does not compile for that GPU.
    """
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    compiled = facts_of(launch, gpu.compiled)
    kernel, t = launch.kernel.__name__, traffic(launch)
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    facts: Facts = arguments | launch.meta | {"grid": launch.grid}
    grid = math.prod(launch.grid)
    timing = timings().get(kernel, Timing())
    pieces, slots = grid, resident(compiled, gpu.compiled) * gpu.arch[0]
    if timing.pieces is not None:
        pieces = timing.pieces(facts)
        slots = min(slots, grid) if pieces > grid else slots
    in_flight = _in_flight(compiled, facts, t.requested / pieces)
    programs = Programs(pieces, slots, in_flight, timing.streams)
    arithmetic = products(t, gpu)
    if t.unit == "matrix" and not any(compiled["instructions"].get(i) for i in FAST):
        arithmetic /= gpu.mma
    if timing.integers is not None:
        arithmetic = max(arithmetic, timing.integers(facts) / (gpu.integer * 1e6))
    if timing.near:
        gpu = gpu._replace(latency=gpu.near)
    early = bool(launch.meta.get("launch_pdl"))
    found = formula(t, arithmetic, gpu, programs, early=early, follows=timing.near)
    return found._replace(allows=_allows(launch.kernel))


_allowing: dict[Any, bool] = {}  # by plain function


def _allows(kernel: Any) -> bool:
    """True for a kernel that signals that the launch behind it may start."""
    if kernel.fn not in _allowing:
        _allowing[kernel.fn] = ALLOWS in source_text(kernel)
    return _allowing[kernel.fn]


def _in_flight(compiled: dict[str, Any], facts: Facts, whole: float) -> float:
    """Bytes that one program has in flight, which loads ``whole`` bytes altogether.

    Those of a step are on their way while the program waits for them, those of later steps where
    the compiled loop has asked for them already: they go to shared memory, which bounds them. The
    facts name an operand once, and a kernel of a group of G loads each of its tuple. Without a loop
    a program asks for all before it waits.
    """
    loads = compiled["loads"]
    looped = {name: (size, ahead) for name, (size, ahead, _) in loads.items() if ahead is not None}
    if not looped:
        return whole
    waited = sum(size for size, ahead in looped.values() if not ahead)
    copied = sum(
        size * ahead * (facts.get("G", 1) if isinstance(facts.get(name), (list, tuple)) else 1)
        for name, (size, ahead) in looped.items()
    )
    return min(whole, float(waited + min(copied, compiled["shared"])))


def formula(
    t: Traffic,
    arithmetic: float,
    gpu: Gpu,
    programs: Programs | None,
    *,
    early: bool = False,
    follows: bool = False,
) -> Modelled:
    """The formulas of :func:`time_of`, with ``arithmetic`` for math; without programs, those of one
    wave: a vendor's kernel is taken to keep enough in flight and to fill its waves. ``early``: it
    has launch_pdl; ``follows``: all that it reads is what the launch in front writes.
    """
    size = memory(t, gpu)
    l2 = max(t.requested, t.read) / (gpu.l2 * 1e6)
    terms = {"memory": size, "L2": l2, "math": arithmetic, "in flight": 0.0}
    if programs is None:
        body = max(terms.values())
    else:
        count, slots, in_flight, streams = programs
        sms = gpu.arch[0]
        chain = t.requested / count / in_flight * gpu.latency if in_flight else 0.0
        if early and follows:
            chain += gpu.latency
        if count <= slots and not streams:
            chain += t.written / (gpu.bandwidth * 1e6)
        terms["in flight"] = chain * max(1.0, count / slots)

        def wave(n: int) -> float:
            if not n:
                return 0.0
            busiest = -(-n // sms) * sms / n
            return max(n / count * max(size, l2, arithmetic * busiest), chain)

        body = count // slots * wave(slots) + wave(count % slots)
    longest = max(terms, key=lambda name: terms[name])
    terms["waves"] = max(0.0, body - terms[longest])
    start = t.launches * (GAP + gpu.latency)
    terms["launch"] = 0.0 if early else start
    us = body + terms["launch"]
    binds = longest
    if terms["launch"] >= us / 2:
        binds = "launch"
    elif terms["waves"] >= WAVES * us:
        binds = "waves"
    held = programs or Programs(0, 0, 0.0)
    waits = start if early else 0.0
    return Modelled(
        us, terms, binds, t.name, held.count, held.slots, held.in_flight, waits, follows=follows
    )


def vendor(t: Traffic, gpu: str | Gpu) -> Modelled:
    """The modelled time of launches that are not ours, from their counted traffic alone."""
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    return formula(t, products(t, gpu), gpu, None)


def in_a_graph(launches: Sequence[Modelled]) -> float:
    """The modelled time of launches one after another, without the host.

    A launch with launch_pdl runs beside the one in front of it, if that one signals that its
    dependents may start: both take the longer of their times, or what they ask of memory, L2 and
    arithmetic together. One that only reads what the other has written waits for all of it, and
    saves the launch alone. Without the signal it is a launch as any other.
    """
    total = 0.0
    before: Modelled | None = None
    for m in launches:
        total += m.us
        if m.waits and before is not None and before.allows and not m.follows:
            shared = max(before.terms[n] + m.terms[n] for n in ("memory", "L2", "math"))
            total += max(before.body, m.body, shared) - before.body - m.body
        elif before is None or not before.allows:
            total += m.waits
        before = m
    return total


def eager(launches: Sequence[Modelled]) -> float:
    """The same with a host that starts each launch: the longer of its time and the GPU's."""
    host = sum(HOST["triton" if m.programs else "torch"] for m in launches)
    return max(in_a_graph(launches), host)
