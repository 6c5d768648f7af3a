"""Measures one case of the parts linear, group, layer and decode, for one row.

It builds the providers, checks each against float64, and times the correct ones.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import numerics as gpu_numerics
from .cases import Case, floor
from .device import Device, randn
from .providers import PEFT_BF16, PEFT_COMPILED, PLAIN, Provider, providers
from .store import Watch
from .timing import Timed, interleave

MOST_COPIES = 24
COMPILE_LIMIT_S = 60.0  # the budget that must be left for torch.compile to be measured


def copies_for(case: Case, device: Device) -> int:
    """The number of sets of weights to rotate through, so that none is still in the L2 cache."""
    size = 4 if case.dtype == "float32" else 2
    weights = sum(K * N for K, N in case.shapes.values())
    flows = case.M * sum(K + N for K, N in case.shapes.values())
    footprint = size * (weights + flows)
    if device.dry:
        return 1
    return max(1, min(MOST_COPIES, -(-3 * device.l2 // footprint)))


def need_bytes(case: Case, copies: int) -> int:
    """An estimate of the most bytes that a case needs, with its float64 reference."""
    weights = sum(K * N for K, N in case.shapes.values())
    flows = case.M * sum(K + N for K, N in case.shapes.values())
    return copies * 2 * (weights + flows) + 8 * (weights + 6 * flows)


def inputs(case: Case, device: Device, copies: int) -> tuple[list[Any], list[list[Any]]]:
    """(x of each copy, dY of every output of each copy)."""
    torch.manual_seed(7)
    dtype = getattr(torch, case.dtype)
    names = list(case.shapes)
    K = case.shapes[names[0]][0]
    outs = [N for _, N in case.shapes.values()]
    if case.block in ("mlp", "layer"):
        outs = outs[-1:]
    xs, dys = [], []
    for _ in range(copies):
        x = randn(device, case.M, K, dtype=dtype)
        xs.append(x.requires_grad_(case.what == "train"))
        dys.append([randn(device, case.M, N, dtype=dtype) for N in outs])
    return xs, dys


def step(provider: Provider, xs: list[Any], dys: list[Any], case: Case) -> Callable[[], None]:
    """A function that calls the provider on every copy once, with gradients in training."""
    copies = len(provider.calls)
    if case.what == "infer":

        def infer() -> None:
            with torch.no_grad():
                for i in range(copies):
                    provider.calls[i](xs[i])

        return infer
    wanted = [
        [xs[i], *(t for ab in provider.adapters[i].values() for t in ab)] for i in range(copies)
    ]

    def train() -> None:
        for i in range(copies):
            torch.autograd.grad(provider.calls[i](xs[i]), wanted[i], dys[i])

    return train


def _attempt(
    case: Case, row: dict[str, Any], plain: Any, xs: Any, dys: Any, works: dict[str, Timed],
    device: Device, name: str, provider: Provider, entry: dict[str, Any],
) -> None:  # fmt: skip
    beside = row["providers"].get(PEFT_BF16, {}).get("errors")
    entry.update(gpu_numerics.check(provider, plain[0], xs[0], dys[0], case, device, beside))
    if entry["ok"]:
        works[name] = _timed(provider, xs, dys, case, device)


def measure(
    case: Case,
    device: Device,
    ceilings: dict[str, float],
    *,
    seconds: float,
    left_s: float,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The row of a case.

    The timed rounds get ``seconds``; ``left_s`` seconds are left of the part's budget.

    Raises:
        Broken: the device is unusable after a provider ran.
    """
    began = time.monotonic()
    watch = watch or Watch()
    shown = case
    if device.dry:
        case = case.tiny()
    copies = copies_for(case, device)
    row: dict[str, Any] = {
        "key": shown.key,
        "part": shown.part,
        "case": case.as_json(),
        "copies": copies,
        "floor": floor(case, ceilings),
        "providers": {},
        "missing": {},
    }
    if need_bytes(case, copies) > device.free():
        row["error"] = f"needs about {need_bytes(case, copies) / 2**30:.0f} GiB, not free here"
        return row
    late = left_s < COMPILE_LIMIT_S and not device.dry
    built, plain, row["missing"] = providers(
        case, device, copies, wanted=lambda name: not (name == PEFT_COMPILED and late)
    )
    if case.compiled and late:
        row["missing"][PEFT_COMPILED] = "left out: too little of the budget is left"
    xs, dys = inputs(case, device, copies)
    works: dict[str, Timed] = {}
    for name in [n for n, provider in built.items() if provider.dropout_off and case.p > 0]:
        row["missing"][name] = "it has no dropout"
        del built[name]
    attempt = partial(_attempt, case, row, plain, xs, dys, works, device)
    watch.each(row, built, device, attempt)
    if works:
        for name, q in interleave(works, device, seconds).items():
            row["providers"][name]["us"] = q
    row["seconds"] = round(time.monotonic() - began, 2)
    del built, plain, xs, dys, works, attempt
    gc.collect()
    device.empty()
    return row


def _timed(provider: Provider, xs: Any, dys: Any, case: Case, device: Device) -> Timed:
    run = step(provider, xs, dys, case)
    with provider.mode():
        run()  # the other copies may compile too, which must not be timed
        if case.graph:
            run = device.capture(run)
    return Timed(run, len(provider.calls), provider.mode)


def warm(case: Case, device: Device) -> None:
    """Compile all launches of a case by running each provider once, without check or timing.

    Several processes do this for different cases at once; Triton and inductor keep the results on
    disk.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    case = case.tiny() if device.dry else case
    if need_bytes(case, 1) > device.free() // 4:
        return
    built, _, _ = providers(case, device, 1, wanted=lambda name: name != PLAIN)
    xs, dys = inputs(case, device, 1)
    for provider in built.values():
        if provider.dropout_off and case.p > 0:
            continue
        try:
            with provider.mode():
                step(provider, xs, dys, case)()
        except Exception:  # the measurement will fail the same way and report it
            if device.is_broken():
                raise
    device.synchronize()
