"""The entry of the kernel for prefix attention, forward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from peftkern.kernels import prefix_attention, prefix_tile
from peftkern.kernels.common import Arch, Launch

from . import prefix
from .entry import FP32, Case, KernelEntry, Operands, meta, named
from .traffic import Facts, Traffic, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    q, (own, others, rest) = nbytes(f["q"]), prefix.sources(f)
    B, H, _, D = f["q"].shape
    return Traffic(
        "attend", 1,
        read=q + own + others + rest + nbytes(f["sinks"]),
        written=nbytes(f["o"]) + nbytes(f["lse"]),
        flops=4 * B * H * D * prefix.pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=q + rest + prefix.per_program(f, f["BLOCK_M"]),
    )  # fmt: skip


def launches(x: prefix_tile.Problem, arch: Arch) -> list[Launch]:
    """The launches with the default config."""
    B, H, _, T, _, _, D = x.sizes
    hidden = x.keep is not None or x.window is not None
    config = prefix_attention.default_config(D, arch, x.q.element_size(), hidden, x.causal)
    return prefix_attention.plan_attend(x, x.rows_like_q(), meta(B, H, T, dtype=FP32), config)


def _cases(arch: Arch) -> Iterator[Case]:
    for name, x, fast in prefix.training():
        yield from named(f"prefix fwd {name}", launches(x, arch), fast)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config = prefix_attention.AttendConfig(16, 16, 4, 2)
    for s in prefix.samples(o):
        out, _ = prefix_attention.attend(s.q, *s.sources, **s.options, config=config)
        yield f"prefix attention {s.name}", [out]


ENTRY = KernelEntry(traffic={"_attend_kernel": _traffic}, cases=_cases, sanitize=_sanitize)
