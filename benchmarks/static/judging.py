"""Judges the facts of one compiled launch: limits of the architecture, and signs of a slow kernel.

Of the second kind, each has a rule, and each an entry of :mod:`.exemptions` may excuse:

- *pipeline*: a launch with several stages has a loop with loads, and each load of at least a
  sixteenth of a step's bytes has copies in flight while a step is computed.
- *products*: the assembler does not say that it makes asynchronous products (wgmma) wait for each
  other; and a step of a matrix-bound launch with bulk copies leaves its products in flight.
- *width*: a thread moves 16 bytes in one access, or less where the tile has less for each thread.
- *waves*: programs do not fill the device a few times and then leave most of it idle: with more
  than one wave and fewer than four, the last one is at least a quarter full. It is judged on the
  GPUs that docs/goals.md aims at.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from peftkern.kernels.common import Arch

from . import exemptions


class Target(NamedTuple):
    """An architecture: the facts for default configs, and the limits of one multiprocessor."""

    arch: Arch
    threads: int
    programs: int
    shared_per_sm: int
    backend: str = "cuda"


TARGETS = {
    "sm_80": Target(Arch(108, 80, 166912), 2048, 32, 167936),
    "sm_86": Target(Arch(84, 86, 101376), 1536, 16, 102400),
    "sm_89": Target(Arch(128, 89, 101376), 1536, 24, 102400),
    "sm_90": Target(Arch(132, 90, 232448), 2048, 32, 233472),
    "sm_100": Target(Arch(148, 100, 232448), 2048, 32, 233472),
    "sm_120": Target(Arch(170, 120, 101376), 1536, 24, 102400),
    "gfx942": Target(Arch(304, 80, 65536), 2048, 32, 65536, "hip"),
}
TENSOR_MEMORY = 512  # columns, sm_100
MATRIX = {"sm_90": "wgmma", "sm_100": "tcgen05"}  # other architectures only have mma.sync
HEADLINE = ("sm_90", "sm_100")
WIDEST = 16  # bytes a thread and access; sm_100 has 32 for some, which nothing here counts on
MINOR = 16  # a load of less than 1 / MINOR of a step's bytes does not hold the loop up


def resident(target: Target, row: dict[str, Any]) -> int:
    """Programs that a multiprocessor runs at once.

    Registers are rounded up to NVIDIA's granularity.
    """
    per_warp = -(-row["registers"] * 32 // 256) * 256
    fits = [
        target.threads // (32 * row["warps"]),
        target.programs,
        65536 // max(1, per_warp * row["warps"]),
    ]
    if row["shared"]:
        fits.append(target.shared_per_sm // (row["shared"] + 1024))
    return min(fits)


def occupancy(target: Target, row: dict[str, Any]) -> float:
    """The share of a multiprocessor's threads that resident programs fill, from 0 to 1."""
    return resident(target, row) * 32 * row["warps"] / target.threads


def waves(target: Target, row: dict[str, Any]) -> float | None:
    """How often the launch's programs fill the device; None if not one of them fits."""
    slots = target.arch.sms * resident(target, row)
    return math.prod(row["grid"]) / slots if slots else None


def in_loop(row: dict[str, Any]) -> dict[str, int]:
    """{load that a step of a loop waits for: tiles of it that are in flight meanwhile}.

    Small ones are left out.
    """
    asked = {name: f for name, f in row["loads"].items() if f[1] is not None}
    step = sum(nbytes for nbytes, *_ in asked.values())
    return {name: ahead for name, (nbytes, ahead, _) in asked.items() if nbytes * MINOR >= step}


def width(row: dict[str, Any]) -> int | None:
    """The fewest bytes a thread and access, of loads and stores with 16 bytes for each thread.

    0 if all of them are bulk copies, None if there are none.
    """
    wide = [
        f[-1]
        for kind in ("loads", "stores")
        for f in row[kind].values()
        if f[0] >= WIDEST * 32 * row["warps"]
    ]
    return min((w for w in wide if w), default=0 if wide else None)


def narrow(row: dict[str, Any]) -> list[str]:
    """Loads and stores in which a thread moves less than it could, each with its bytes."""
    threads, found = 32 * row["warps"], []
    for kind in ("loads", "stores"):
        for name, (nbytes, *_, width) in row[kind].items():
            wanted = min(WIDEST, nbytes // threads)
            if width is None and wanted:
                found.append(f"{kind[:-1]} of {name} of unknown width")
            elif width and width < wanted:
                found.append(f"{kind[:-1]} of {name} {width} bytes wide, {wanted} possible")
    return found


def _slow(row: dict[str, Any]) -> dict[str, str]:
    """{rule: how the launch breaks it}."""
    found: dict[str, str] = {}
    stages = row["config"].get("num_stages", 1)
    serial = [name for name, ahead in in_loop(row).items() if ahead < 1]
    if stages > 1 and not in_loop(row):
        found["pipeline"] = f"num_stages={stages} without a loop that loads"
    elif stages > 1 and serial:
        found["pipeline"] = f"num_stages={stages}, no copy of {', '.join(serial)} in flight"
    asynchronous = row["matrix_bound"] and row["arch"] in MATRIX and row["config"].get("TMA")
    if row["serialized"]:
        found["products"] = "the assembler runs products one by one"
    elif asynchronous and not row["products"]:
        found["products"] = "no product in flight"
    if wide := narrow(row):
        found["width"] = "; ".join(wide)
    count = row["waves"]
    if row["arch"] in HEADLINE and count is not None and 1 < count < 4 and 0 < count % 1 < 0.25:
        found["waves"] = f"{count:.2f} waves: the last is nearly empty"
    return found


def judge(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The row with its facts, their limits, and a ``problem`` if it has one.

    ``exempt`` names the exemptions that the row needed.
    """
    row = row | facts
    if "error" in row:
        return row
    name, target = row["arch"], TARGETS[row["arch"]]
    cuda = target.backend == "cuda"
    row["limit"] = target.arch.shared
    row["occupancy"] = round(occupancy(target, row), 3) if cuda else None
    row["waves"] = waves(target, row) if cuda else None
    row["ahead"] = min(in_loop(row).values(), default=None)
    row["width"] = width(row)
    problems = [row["launcher"]] if row.get("launcher") else []
    if row["spilled"]:
        problems.append(f"spills {row['spilled']} bytes")
    if row["shared"] > row["limit"]:
        problems.append(f"shared {row['shared']} over {row['limit']}")
    # With too much tensor memory the compiler does not fail: it emits an empty kernel, and the
    # launch fails.
    if row["tensor_memory"] > TENSOR_MEMORY:
        problems.append(f"tensor memory {row['tensor_memory']} columns over {TENSOR_MEMORY}")
    if row["matrix_bound"] and MATRIX.get(name, "") not in ("", *row["instructions"]):
        problems.append(f"no {MATRIX[name]}")
    row["exempt"] = []
    for rule, words in _slow(row).items() if cuda else ():
        excuse = exemptions.find(rule, row)
        if excuse is None:
            problems.append(words)
        else:
            row["exempt"].append(excuse.name)
    return row | ({"problem": "; ".join(problems)} if problems else {})
