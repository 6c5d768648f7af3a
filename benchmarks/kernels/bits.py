"""The entry of the kernel that draws the bits of dropout masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import bits
from peftkern.kernels.common import Arch

from .entry import INT32, Case, K, KernelEntry, M, Operands, Timing, meta, named
from .traffic import Facts, Traffic, drawn_operations, nbytes


def _traffic(f: Facts) -> Traffic:
    seed = nbytes(f["seed_ptr"])
    return Traffic("bits", 1, seed, nbytes(f["out"]), requested=seed * math.prod(f["grid"]))


def _integers(f: Facts) -> int:
    return drawn_operations(math.prod(f["out"].shape), f)


def _cases(arch: Arch) -> Iterator[Case]:
    out = meta(1, M, K // 32, dtype=INT32)
    yield from named("bits p=0.1", bits.plan_bits(out, K, 0.1, 7, bits.BitsConfig()))


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    yield "bits", [bits.dropout_bits(o.M, o.K, 0.1, 7, device=o.device).float()]
    seed = torch.tensor([7], device=o.device)
    words = bits.dropout_bits(o.M, o.K, 0.3, seed, groups=3, device=o.device)
    yield "bits, three masks, seed on the device", [words.float()]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    yield lambda: bits.dropout_bits(o.M, o.K, 0.1, 7, device=o.device)


ENTRY = KernelEntry(
    traffic={"_bits_kernel": _traffic},
    timing={"_bits_kernel": Timing(integers=_integers)},
    cases=_cases,
    sanitize=_sanitize,
    counted=_counted,
)
