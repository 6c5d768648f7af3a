"""Rates of named GPUs, and the least time that counted launches take on one (roofline)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..kernels.traffic import Traffic


class Gpu(NamedTuple):
    """Rates that a kernel can reach on one GPU, and the facts that default configs depend on.

    ``bandwidth`` of device memory and ``l2`` (reads from the L2 cache) are in TB/s, ``matrix``
    (bf16 matrix products) and ``fp32`` in TFLOP/s, ``integer`` in 10^12 operations/s; ``arch`` is
    (multiprocessors, capability, shared bytes). ``fp8`` is the rate of fp8 products with block
    scales over ``matrix``, on GPUs that have them. ``mma`` is the share of ``matrix`` that the
    older instruction mma.sync reaches where there is a newer one (wgmma, tcgen05). ``latency`` and
    ``near`` are those of reads under load, from device memory and from L2, in us.
    """

    bandwidth: float
    matrix: float
    fp32: float
    arch: tuple[int, int, int]
    l2: float
    integer: float
    mma: float = 1.0
    latency: float = 0.75
    near: float = 0.3
    fp8: float = 1.75

    @property
    def compiled(self) -> str:
        """The architecture that its kernels are compiled for, such as "sm_90"."""
        return f"sm_{self.arch[1]}"


# Shares of a data sheet's bandwidth and dense bf16 rate that others report of kernels on an H100;
# assumed of every GPU without rates of its own. No file under benchmarks/results holds a rate that
# was measured here.
_BANDWIDTH, _MATRIX = 0.90, 0.80


def _integer(sms: int, ghz: float) -> float:
    """64 integer lanes a multiprocessor at the data sheet's boost clock, in 10^12 a second."""
    return sms * 64 * ghz / 1e3


def _sheet(bandwidth: float, matrix: float, fp32: float, l2: float, ghz: float, *arch: int) -> Gpu:
    sms, capability, shared = arch
    # mma.sync on sm_100: a quarter is assumed, the ratio of sm_80's rate a clock to sm_100's
    mma = {90: 0.63, 100: 0.25}.get(capability, 1.0)
    return Gpu(
        _BANDWIDTH * bandwidth, _MATRIX * matrix, _MATRIX * fp32, (sms, capability, shared), l2,
        _integer(sms, ghz), mma,
    )  # fmt: skip


# H100 and H200 (SXM): 3.05 and 4.3 TB/s, 790 TFLOP/s and an L2 of 5.5 TB/s are what others report
# of kernels there; mma.sync reaches 63% of the peak (arXiv 2402.13499). The other GPUs are
# their data sheets' bandwidth and dense bf16 rate times the shares above. Their L2 is assumed: two
# of an H100's for the two dies of a B200; 5 TB/s for the RTX 4090 and the L40S, 4 for the A100.
# Of large fp8 products with scales of rows or blocks NVIDIA reports 1.75 times the bf16 rate on
# Hopper, in cuBLAS 12.9, and at least 1.25 times of most others; those of a layer here are large.
# The latencies are assumed of all: with them 8 KB in flight a multiprocessor are 1.4 TB/s on an
# H100, from device memory.
_HOPPER = _sheet(3.35, 989.0, 67.0, 5.5, 1.98, 132, 90, 232448)
GPUS = {
    "H100": _HOPPER._replace(bandwidth=3.05, matrix=790.0),
    "H200": _HOPPER._replace(bandwidth=4.3, matrix=790.0),
    "A100": _sheet(2.04, 312.0, 19.5, 4.0, 1.41, 108, 80, 166912),
    "L40S": _sheet(0.864, 362.0, 91.6, 5.0, 2.52, 142, 89, 101376),
    "B200": _sheet(8.0, 2250.0, 75.0, 11.0, 1.85, 148, 100, 232448),
    "RTX4090": _sheet(1.008, 165.2, 82.6, 5.0, 2.52, 128, 89, 101376),
}


def microseconds(launches: Iterable[Traffic], gpu: Gpu) -> float:
    """Roofline time in microseconds, a lower bound of the launches one after another.

    Each launch takes the longer of its memory time and its arithmetic time; launch overhead and
    tails are left out (:mod:`.model` has them).
    """
    return sum(max(memory(t, gpu), products(t, gpu)) for t in launches)


def memory(t: Traffic, gpu: Gpu) -> float:
    """Microseconds of a launch's device bytes at the rate of device memory."""
    return t.bytes / (gpu.bandwidth * 1e6)


def products(t: Traffic, gpu: Gpu) -> float:
    """Microseconds of a launch's FLOPs at the rate of their unit."""
    fp8 = gpu.matrix * gpu.fp8
    rate = {"matrix": gpu.matrix, "fp8": fp8, "fp32": gpu.fp32, "none": float("inf")}[t.unit]
    return t.flops / (rate * 1e6)
