"""Rates of named GPUs, and the least time that counted launches take on one (roofline)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..kernels.traffic import Traffic


class Gpu(NamedTuple):
    """Rates that a kernel can reach on one GPU, and the facts that default configs depend on.

    ``bandwidth`` of device memory is in TB/s, ``matrix`` (bf16 matrix products) and ``fp32`` in
    TFLOP/s; ``arch`` is (multiprocessors, capability, shared bytes).
    """

    bandwidth: float
    matrix: float
    fp32: float
    arch: tuple[int, int, int]


# Shares of a data sheet's bandwidth and dense bf16 rate that others report of kernels on an H100;
# assumed of every GPU. No file under benchmarks/results holds a rate that was measured here.
_BANDWIDTH, _MATRIX = 0.90, 0.80


def _sheet(bandwidth: float, matrix: float, fp32: float, *arch: int) -> Gpu:
    sms, capability, shared = arch
    return Gpu(_BANDWIDTH * bandwidth, _MATRIX * matrix, _MATRIX * fp32, (sms, capability, shared))


GPUS = {
    "H100": Gpu(3.0, 790.0, _MATRIX * 67.0, (132, 90, 232448)),
    "H200": _sheet(4.8, 989.0, 67.0, 132, 90, 232448),
    "A100": _sheet(2.04, 312.0, 19.5, 108, 80, 166912),
    "L40S": _sheet(0.864, 362.0, 91.6, 142, 89, 101376),
    "B200": _sheet(8.0, 2250.0, 75.0, 148, 100, 232448),
    "RTX4090": _sheet(1.008, 165.2, 82.6, 128, 89, 101376),
}


def microseconds(launches: Iterable[Traffic], gpu: Gpu) -> float:
    """Roofline time in microseconds, a lower bound of the launches one after another.

    Each launch takes the longer of its memory time and its arithmetic time; launch overhead and
    tails are left out.
    """
    total = 0.0
    for t in launches:
        rate = {"matrix": gpu.matrix, "fp32": gpu.fp32, "none": float("inf")}[t.unit]
        total += max(t.bytes / (gpu.bandwidth * 1e6), t.flops / (rate * 1e6))
    return total
