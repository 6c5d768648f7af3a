"""The one table of all kernels' entries, for race, static, cost, sanitizer, counters and tests.

A line of :data:`peftkern.kernels.registry.KERNELS` names a file of ``kernels/``; the file of that
name here holds its :class:`~.entry.KernelEntry` as ``ENTRY``.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from peftkern.kernels.registry import KERNELS

from .entry import KernelEntry, Raced, Timing
from .traffic import Rule, Traffic


@functools.cache
def entries() -> dict[str, KernelEntry]:
    """{file of ``kernels/``: its entry}, in the order of the registry.

    Raises:
        ValueError: an entry and its line name different ops, or two kernels have one name.
    """
    found = {name: importlib.import_module(f"{__package__}.{name}").ENTRY for name in KERNELS}
    for name, entry in found.items():
        if set(entry.ops) != set(KERNELS[name]):
            raise ValueError(
                f"{name} has the ops {sorted(entry.ops)} here and {sorted(KERNELS[name])} in "
                "kernels/registry.py"
            )
    names = [kernel for entry in found.values() for kernel in entry.traffic]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"several entries have a kernel {', '.join(sorted(twice))}")
    return found


@functools.cache
def ops() -> dict[str, Raced]:
    """{op of the tuning tables: how it is raced}."""
    return {op: raced for entry in entries().values() for op, raced in entry.ops.items()}


@functools.cache
def rules() -> dict[str, Rule]:
    """{name of a kernel: its rule of traffic}."""
    return {name: rule for entry in entries().values() for name, rule in entry.traffic.items()}


@functools.cache
def timings() -> dict[str, Timing]:
    """{name of a kernel: what the model of time has to know of it}; most kernels have none."""
    return {name: timing for entry in entries().values() for name, timing in entry.timing.items()}


def traffic(launch: Any) -> Traffic:
    """Traffic of one ``peftkern.kernels.common.Launch``; its tensors may be on the meta device.

    Raises:
        KeyError: the kernel has no rule here.
    """
    kernel = launch.kernel.__name__
    if kernel not in rules():
        known = ", ".join(rules())
        raise KeyError(f"kernel {kernel} has no traffic rule; benchmarks.kernels has {known}")
    # zip ends at the last argument that is given; constants follow it
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return rules()[kernel](arguments | launch.meta | {"grid": launch.grid})
