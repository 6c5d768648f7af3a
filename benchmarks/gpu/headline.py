"""The part headline: the rows by which the goals of docs/goals.md are judged, in one table.

They are cases of the other parts, the most telling first, each measured as its own part does. Only
the first linear and the first decoding case compile HF PEFT with torch: each takes half a minute.
"""

from __future__ import annotations

from typing import Any

from . import experts as gpu_experts
from . import extra as gpu_extra
from . import model as gpu_model
from . import prefix as gpu_prefix
from .cases import Case

HeadlineCase = (
    Case
    | gpu_extra.HostCase
    | gpu_extra.MixedCase
    | gpu_prefix.PrefixCase
    | gpu_experts.ExpertsCase
    | gpu_model.ModelCase
)


def cases() -> list[HeadlineCase]:
    def linear(p: float, compiled: bool) -> Case:
        return Case("headline", "linear", "8B", 8192, 16, p, compiled=compiled)

    def block(name: Any, compiled: bool = False) -> Case:
        return Case("headline", name, "8B", 8192, 16, 0.1, compiled=compiled)

    def decode(M: int, compiled: bool = False) -> Case:
        return Case("headline", "linear", "8B", M, 16, 0.0, "infer", graph=True, compiled=compiled)

    mixed = gpu_extra.MixedCase(16)
    host = gpu_extra.HostCase()
    prefixes = gpu_prefix.cases()
    return [
        linear(0.1, True),
        decode(1, True),
        mixed,
        prefixes[0],
        linear(0.0, False),
        block("qkv"),
        block("mlp"),
        block("layer"),
        host,
        decode(16),
        prefixes[1],
        *gpu_experts.cases()[:2],
        gpu_model.cases()[0],
    ]


def least_s(case: HeadlineCase) -> int:
    """The seconds that must be left to start a case."""
    if isinstance(case, gpu_model.ModelCase):
        return 45
    if isinstance(case, gpu_experts.ExpertsCase):
        return 10
    return 12 if isinstance(case, Case) and case.block == "layer" else 5
