"""Two special rows of the part decode: the host's time of a call, and a batch of mixed adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks as gpu_blocks
from . import providers as gpu_providers
from .cases import Case
from .device import Device, randn
from .numerics import LIMITS, relative
from .timing import Timed, interleave, quantiles

CALLS = 200


@dataclass(frozen=True)
class HostCase:
    """The host's time of one call without gradients at [M, 64] x [64, 64].

    The shape is so small that the host never waits for the device.
    """

    M: int = 1
    key: str = "host cost 64x64 infer"


@dataclass(frozen=True)
class MixedCase:
    """A batch of M rows in samples of T rows; three of four samples name one of the adapters."""

    M: int = 16
    T: int = 1
    adapters: int = 8
    r: int = 16

    @property
    def key(self) -> str:
        return f"mixed q_proj 8B M={self.M} T={self.T} r={self.r} adapters={self.adapters}"

    @property
    def samples(self) -> int:
        return self.M // self.T


def cases() -> list[HostCase | MixedCase]:
    return [HostCase(), MixedCase(16), MixedCase(1), MixedCase(4096, 512), MixedCase(64)]


def measure_host(case: HostCase, device: Device) -> dict[str, Any]:
    shape = Case("decode", "linear", "tiny", case.M, 8, 0.0, "infer")
    found, plain, missing = gpu_providers.providers(shape, device, 1)
    x = randn(device, case.M, 64, dtype=torch.bfloat16)
    row: dict[str, Any] = {
        "key": case.key, "part": "decode", "case": shape.as_json(), "providers": {},
        "missing": missing,
    }  # fmt: skip
    # times are of the layer itself, not of the block around it
    layers = {
        name: next(iter(gpu_blocks.linears(p.modules[0], shape).values()))
        for name, p in found.items()
        if p.modules
    }
    times: dict[str, list[float]] = {name: [] for name in layers}
    calls = 3 if device.dry else CALLS
    with torch.no_grad():
        for i in range(3 if device.dry else 25):
            names = list(layers)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                with found[name].mode():
                    times[name].append(_host_seconds(layers[name], x, calls, device) * 1e6)
    for name, spent in times.items():
        kept = spent[1:] if device.dry else spent[4:]  # the first rounds compile and warm up
        row["providers"][name] = {"us": quantiles(kept), "ok": True, "checked": "by other rows"}
    base = row["providers"][gpu_providers.PLAIN]["us"]["p50"]
    for entry in row["providers"].values():
        entry["over_plain_us"] = entry["us"]["p50"] - base
    return row


def _host_seconds(layer: nn.Module, x: Tensor, calls: int, device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    spent = time.perf_counter() - start
    device.synchronize()
    return spent / calls


def measure_mixed(case: MixedCase, device: Device, seconds: float) -> dict[str, Any]:
    """The row of the mixed kernel, the bare product and HF PEFT's loop over adapters, in graphs."""
    from peftkern.kernels import mixed, reference

    size = 64 if device.dry else 4096
    L, M, r = case.adapters, case.M, case.r
    torch.manual_seed(4)
    copies = 1 if device.dry else 8
    x = randn(device, M, size, dtype=torch.bfloat16)
    ws = [randn(device, size, size, dtype=torch.bfloat16, scale=size**-0.5) for _ in range(copies)]
    a = [(0.05 * torch.randn(r, size, device=device.torch)).bfloat16() for _ in range(L)]
    b = [(0.3 * torch.randn(size, r, device=device.torch)).bfloat16() for _ in range(L)]
    choice = [i % L if i % 4 else -1 for i in range(1, case.samples + 1)]
    index = torch.tensor(choice, dtype=torch.int32, device=device.torch)
    scales, T = [2.0] * L, M // case.samples

    def kernel() -> Tensor:
        return [mixed.mixed(x, w, a, b, scales, index) for w in ws][0]

    def product() -> Tensor:
        return [torch.nn.functional.linear(x, w) for w in ws][0]

    def loop() -> Tensor:  # as PEFT's adapter_names does it, but with indices on the device
        outs = []
        for w in ws:
            y = torch.nn.functional.linear(x, w)
            for j, rows in groups:
                low = torch.nn.functional.linear(x[rows], a[j])
                y[rows] += torch.nn.functional.linear(low, b[j]) * 2.0
            outs.append(y)
        return outs[0]

    where = {j: [m for m in range(M) if choice[m // T] == j] for j in range(L)}
    groups = [(j, torch.tensor(v, device=device.torch)) for j, v in where.items() if v]
    exact = reference.mixed(x, ws[0], a, b, scales, choice)
    row: dict[str, Any] = {
        "key": case.key, "part": "decode", "providers": {}, "missing": {},
        "case": {"M": M, "T": T, "r": r, "adapters": L, "K": size, "N": size, "graph": True},
    }  # fmt: skip
    works: dict[str, Timed] = {}
    entrants: dict[str, Callable[[], Tensor]] = {
        gpu_providers.PLAIN: product, "loop over adapters": loop, "peftkern mixed": kernel,
    }  # fmt: skip
    with torch.no_grad():
        for name, run in entrants.items():
            entry = row["providers"][name] = {}
            error = None if name == gpu_providers.PLAIN else relative(run(), exact)
            entry["errors"] = {} if error is None else {"y": error}
            entry["ok"] = error is None or error <= LIMITS["bfloat16"]
            entry["checked"] = "float64"
            if entry["ok"]:
                works[name] = Timed(device.capture(run), copies)
        for name, q in interleave(works, device, seconds).items():
            row["providers"][name]["us"] = q
    return row


def measure(case: HostCase | MixedCase, device: Device, *, seconds: float) -> dict[str, Any]:
    if isinstance(case, HostCase):
        return measure_host(case, device)
    return measure_mixed(case, device, seconds)
