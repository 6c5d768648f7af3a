"""The entry of the kernel for a mixture's H and the S of the adapter that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftkern.kernels import experts_gate
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.experts_gates import Clamp
from peftkern.kernels.experts_route import Route, most_tiles, route

from .entry import BF16, FP32, INT32, Case, KernelEntry, Operands, meta, named, tag
from .experts_races import GATES
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


class Experts(NamedTuple):
    """A layer: T tokens of D columns, each with k of E experts, whose H has I columns."""

    T: int
    k: int
    E: int
    D: int
    I: int  # noqa: E741  # as everywhere for mixtures
    layout: str = "halves"
    clamp: Clamp | None = None

    @property
    def P(self) -> int:
        return self.T * self.k

    @property
    def N(self) -> int:
        """Columns of GU."""
        return self.I if self.layout == "alone" else 2 * self.I

    def route(self, block_m: int = 64, adapters: int = 1) -> Route:
        """A route on the meta device."""
        groups = self.E * adapters
        tiles = most_tiles(self.P, groups, block_m)
        parts = [meta(n, dtype=INT32) for n in (self.P, groups + 1, tiles, tiles)]
        return Route(*parts, block_m, self.k, self.E, adapters)

    def few(self, T: int = 16) -> Experts:
        return self._replace(T=T)


QWEN3 = Experts(8192, 8, 128, 2048, 768)  # Qwen3-30B-A3B
GPT_OSS = Experts(8192, 4, 32, 2880, 2880, "interleaved", Clamp(1.702, 7.0, 1.0))  # gpt-oss-20b
ALONE = Experts(8192, 6, 128, 2688, 1856, "alone")  # Nemotron-H's, relu2


def _traffic(f: Facts) -> Traffic:
    """Each expert's A counts once, as if each had a token."""
    words, (blocks, _, chunks) = f["words"], f["grid"]
    As = {id(a): a for a in f["As"] or ()}.values()
    factors = sum(nbytes(a) for a in As)
    read = chunks * nbytes(f["gu"]) + nbytes(words)
    each = max((nbytes(a) // a.shape[0] for a in As), default=0)
    return Traffic(
        "experts_gate", 1,
        read=read + factors,
        written=nbytes(f["h"]) + nbytes(f["s"]),
        flops=0 if f["As"] is None else 2 * f["h"].shape[0] * f["K"] * f["R"],
        unit=unit_of(f["gu"].dtype),
        requested=read + each * blocks,
    )  # fmt: skip


def launches(
    shape: Experts, r: int, name: str, masked: bool, arch: Arch, *,
    adapters: int = 1, block_m: int = 64, dtype: Any = BF16, adapter: Any = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; r is 0 without an adapter."""
    P, K = shape.P, shape.I
    As = [meta(shape.E, r, K, dtype=adapter) for _ in range(adapters)] if r else None
    words = meta(P, cdiv(K, 32), dtype=INT32) if masked else None
    config = experts_gate.default_config(P, K, r, arch, dtype.itemsize)
    return experts_gate.plan_gate(
        meta(P, shape.N, dtype=dtype), shape.route(block_m, adapters), name, shape.layout,
        meta(P, K, dtype=dtype), As, words, [1.0] * adapters if r else [],
        meta(P, r, dtype=dtype) if r else None, shape.clamp, config,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for what, shape, r, masked, name, adapters, dtype in (
        ("qwen3", QWEN3, 16, True, "silu", 1, BF16), ("qwen3", QWEN3, 16, False, "silu", 1, BF16),
        ("qwen3", QWEN3, 0, False, "silu", 1, BF16), ("qwen3", QWEN3, 64, True, "silu", 1, BF16),
        ("qwen3", QWEN3, 256, True, "silu", 1, BF16), ("qwen3", QWEN3, 16, True, "silu", 1, FP32),
        ("qwen3", QWEN3, 16, False, "silu", 4, BF16),
        ("qwen3 T16", QWEN3.few(), 16, False, "silu", 1, BF16),
        ("gpt-oss", GPT_OSS, 16, True, "silu", 1, BF16),
        ("gpt-oss", GPT_OSS, 0, False, "silu", 1, BF16),
        ("gelu_tanh", QWEN3, 16, True, "gelu_tanh", 1, BF16),
        ("relu2 alone", ALONE, 16, False, "relu2", 1, BF16),
    ):  # fmt: skip
        plan = launches(
            shape, r, name, masked, arch, adapters=adapters, dtype=dtype,
            block_m=64 if shape.T > 1024 else 16,
        )  # fmt: skip
        yield from named(f"experts_gate {what} {tag(r, adapters, masked, dtype)}", plan)


def small_route(o: Operands, k: int = 2, experts: int = 4) -> Route:
    """A route of o.M tokens; one expert has none, and some pairs belong to another process."""
    index = torch.arange(o.M * k, device=o.device).view(o.M, k) % (experts + 1)
    return route(torch.where(index == 1, 0, index), experts, 16)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    small = small_route(o)
    last = int(small.offsets[-1])
    gu = o(small.P, 2 * o.K)
    for split, r in ((1, 5), (2, 5), (1, 150)):
        config = experts_gate.ExpertsGateConfig(16, 32, split, 4, 2)
        a = o(4, r, o.K, dtype=FP32)
        found = experts_gate.gate(gu, small, "silu", "interleaved", [a], 2.0, config=config)
        yield f"experts_gate r{r} split {split}", [t[:last] for t in found if t is not None]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    small, a = small_route(o), o(4, o.r, o.K, dtype=FP32)
    gu = o(small.P, 2 * o.K)
    yield lambda: experts_gate.gate(gu, small, "silu", "halves", [a], 2.0)


ENTRY = KernelEntry(
    traffic={"_experts_gate_kernel": _traffic},
    cases=_cases,
    ops=GATES,
    sanitize=_sanitize,
    counted=_counted,
)
