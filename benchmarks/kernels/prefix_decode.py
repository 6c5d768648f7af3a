"""The entry of the kernel for prefix attention of a few query rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from peftkern.kernels import prefix_decode, prefix_tile
from peftkern.kernels.common import Arch, Launch

from . import prefix
from .entry import FP32, INT32, Case, KernelEntry, Operands, Timing, meta, named
from .traffic import Facts, Traffic, nbytes, unit_of


def _decode(f: Facts) -> Traffic:
    q, (own, others, rest) = nbytes(f["q"]), prefix.sources(f)
    B, H, _, D = f["q"].shape
    splits = f["SPLITS_S"] + (f["SPLITS_P"] if f["P"] else 0)
    return Traffic(
        "prefix_decode", 1,
        read=q + own + others + rest,
        written=nbytes(f["part_o"]) + nbytes(f["part_lse"]),
        flops=4 * B * H * D * prefix.pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=q * splits + own * f["BLOCKS_S"] + others * f["BLOCKS_P"] + rest,
    )  # fmt: skip


def _merge(f: Facts) -> Traffic:
    read = nbytes(f["part_o"]) + nbytes(f["part_lse"])
    written = nbytes(f["o"]) + nbytes(f["lse"])
    return Traffic("merge", 1, read, written, requested=read + nbytes(f["part_lse"]))


def launches(x: prefix_tile.Problem, arch: Arch) -> list[Launch]:
    """The launches with the default config."""
    B, H, _, T, _, _, _ = x.sizes
    config = prefix_decode.default_config(x.sizes, x.shared, arch, x.q.element_size())
    return prefix_decode.plan_decode(x, x.rows_like_q(), meta(B, H, T, dtype=FP32), config, arch)


def _cases(arch: Arch) -> Iterator[Case]:
    for D, T, name, options in (
        (128, 1, "causal", {}),
        (64, 1, "padded", dict(padded=True)),
        (256, 1, "window padded", prefix.WINDOW | dict(padded=True)),
        (128, 1, "offset on the device", dict(q_offset=meta(1, dtype=INT32), padded=True)),
        (128, 1, "per row", dict(shared=False)),
        (128, 8, "softcap", dict(softcap=50.0)),
        (128, 1, "all", prefix.everything()),
        (256, 1, "all", prefix.everything()),
        (256, 1, "fp32", dict(dtype=FP32)),
    ):
        x = prefix.problem(T, 512, D, **options)
        yield from named(f"prefix decode D{D} T{T} {name}", launches(x, arch))


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config = prefix_decode.DecodeConfig(16, 16, 16, 2, 2)
    for s in prefix.samples(o):
        out, _ = prefix_decode.decode(s.q[:, :, :2], *s.sources, **s.options, config=config)
        yield f"prefix attention of two rows {s.name}", [out]


ENTRY = KernelEntry(
    traffic={"_decode_kernel": _decode, "_merge_kernel": _merge},
    timing={"_merge_kernel": Timing(near=True)},
    cases=_cases,
    sanitize=_sanitize,
)
