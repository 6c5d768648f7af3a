"""The entry of the kernel for the gradients through a mixture's gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import experts_gate_grad
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.reference import pack_bits

from .entry import BF16, FP32, INT32, Case, KernelEntry, Operands, Timing, meta, named, tag
from .experts_gate import ALONE, GPT_OSS, QWEN3, Experts, small_route
from .experts_races import GATE_GRAD
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


def _traffic(f: Facts) -> Traffic:
    strips, groups, chunks = f["grid"]
    dh, b, s = f["dh"], f["b"], f["s"]
    streamed = chunks * (nbytes(dh) + nbytes(f["gu"]))
    rows = nbytes(f["weights"]) + nbytes(f["pairs"])  # each strip reads them, and S and dS'
    b = b if f["ds_parts"] is not None else None  # else another launch makes dS
    products = (b is not None) + (s is not None)
    down, words = nbytes(f["ds_down"]), chunks * nbytes(f["words"])
    low = f["N"] * f["R"] * products + f["K"] * f["R_DOWN"]
    return Traffic(
        "experts_gate_grad", 1,
        read=streamed + rows + nbytes(s) + nbytes(b) + down + words,
        written=sum(nbytes(f[n]) for n in ("dgu", "h", "ds_parts", "db", "dw_parts", "da")),
        flops=2 * dh.shape[0] * low,
        unit=unit_of(dh.dtype),
        requested=streamed + strips * (chunks * (rows + 8 * groups) + nbytes(s) + down)
        + nbytes(b) + words,
    )  # fmt: skip


def _integers(f: Facts) -> int:
    """A word's 32 bits take two operations each to become columns."""
    return 16 * nbytes(f["words"]) * f["grid"][2]


def _sum(f: Facts) -> Traffic:
    read = nbytes(f["dw_parts"]) + nbytes(f["ds_parts"]) + nbytes(f["pairs"])
    return Traffic(
        "experts_gate_sum", 1, read, nbytes(f["dw"]) + nbytes(f["ds"]), requested=read
    )  # fmt: skip


def launches(
    shape: Experts, r: int, name: str, arch: Arch, *,
    down: int | None = None, masked: bool = False, sums: bool = True, dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
) -> list[Launch]:  # fmt: skip
    """The launches of one call on meta tensors; r is 0 without an adapter.

    ``down``: the rank of down's adapter, None for r.
    """
    P, K, N, E, r_down = shape.P, shape.I, shape.N, shape.E, r if down is None else down
    # as PEFT has it: expert e in columns e, e + E, ...
    b = meta(N, r * E, dtype=adapter).view(N, r, E).permute(2, 0, 1) if r else None
    s = meta(P, r, dtype=dtype) if r and sums else None
    out = experts_gate_grad.ExpertsGateGrads(
        meta(P, N, dtype=dtype), meta(P, dtype=FP32), meta(P, r, dtype=dtype) if r else None,
        None if s is None else meta(E, N, r, dtype=FP32),
        meta(E, r_down, K, dtype=FP32) if r_down else None,
    )  # fmt: skip
    item = dtype.itemsize
    inside = r_down if experts_gate_grad.fits(r, s is not None, r_down, arch, item) else 0
    return experts_gate_grad.plan_gate_grad(
        meta(P, K, dtype=dtype), meta(P, N, dtype=dtype), shape.route(), name, shape.layout,
        meta(shape.T, shape.k, dtype=FP32), b, s, 1.0, shape.clamp,
        meta(P, r_down, dtype=dtype) if r_down else None,
        meta(P, cdiv(K, 32), dtype=INT32) if masked else None, out,
        experts_gate_grad.default_config(r, shape.layout, arch, item, inside), arch,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for what, shape, r, name, dtype in (
        ("qwen3", QWEN3, 16, "silu", BF16), ("qwen3", QWEN3, 0, "silu", BF16),
        ("qwen3", QWEN3, 32, "silu", BF16), ("qwen3", QWEN3, 64, "silu", BF16),
        ("qwen3", QWEN3, 256, "silu", BF16), ("qwen3", QWEN3, 16, "silu", FP32),
        ("gpt-oss", GPT_OSS, 16, "silu", BF16), ("gpt-oss", GPT_OSS, 64, "silu", BF16),
        ("gpt-oss", GPT_OSS, 0, "silu", BF16), ("gpt-oss", GPT_OSS, 16, "silu", FP32),
        ("gelu_tanh", QWEN3, 16, "gelu_tanh", BF16), ("relu2 alone", ALONE, 16, "relu2", BF16),
    ):  # fmt: skip
        plan = launches(shape, r, name, arch, dtype=dtype)
        yield from named(f"experts_gate_grad {what} {tag(r, dtype=dtype)}", plan)
    for what, shape, r, down in (
        ("qwen3", QWEN3, 16, 16), ("gpt-oss", GPT_OSS, 16, 16), ("relu2 alone", ALONE, 16, 16),
        ("qwen3", QWEN3, 32, 32), ("gpt-oss", GPT_OSS, 32, 32), ("gpt-oss", GPT_OSS, 64, 64),
        ("qwen3 down 16", QWEN3, 0, 16), ("qwen3 down 64", QWEN3, 0, 64),
        ("qwen3 down 32", QWEN3, 16, 32), ("gpt-oss down 64", GPT_OSS, 16, 64),
    ):  # fmt: skip
        name = "relu2" if shape is ALONE else "silu"
        plan = launches(shape, r, name, arch, down=down, masked=True)
        yield from named(f"experts_gate_grad {what} {tag(r, masked=True)}", plan[:1])
    plan = launches(QWEN3, 16, "silu", arch, down=256, masked=True)  # H is written
    yield from named(f"experts_gate_grad qwen3 down 256 {tag(16, masked=True)}", plan)
    plan = launches(QWEN3, 16, "silu", arch, sums=False)
    yield from named(f"experts_gate_grad qwen3 without S {tag(16)}", plan[:1])


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    small = small_route(o)
    last = int(small.offsets[-1])
    dh, gu, weights = o(small.P, o.K), o(small.P, 2 * o.K), o(o.M, small.k, dtype=FP32)
    for layout, r in (("halves", 5), ("interleaved", 5), ("halves", 150)):
        config = experts_gate_grad.ExpertsGateGradConfig(16, 32, 32, 32, 4, 2)
        b, s = o(4, 2 * o.K, r, dtype=FP32), o(small.P, r)
        for down in (r, 7, 200):  # beside dB, in less, and of an H that is written
            found = experts_gate_grad.gate_grad(
                dh, gu, small, "silu", layout, weights, b, s, 2.0, ds_down=o(small.P, down),
                bits=pack_bits(dh > 0), config=config,
            )  # fmt: skip
            dgu, dw, ds, db, da = found
            rows = [t[:last] for t in (dgu, ds) if t is not None]
            whole = [t for t in (dw, db, da) if t is not None]
            yield f"experts_gate_grad {layout} r{r}, down {down}", rows + whole


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    small, b = small_route(o), o(4, 2 * o.K, o.r, dtype=FP32)
    dh, gu, weights = o(small.P, o.K), o(small.P, 2 * o.K), o(o.M, small.k, dtype=FP32)
    s = o(small.P, o.r)
    yield lambda: experts_gate_grad.gate_grad(
        dh, gu, small, "silu", "halves", weights, b, s, ds_down=s
    )


ENTRY = KernelEntry(
    traffic={"_experts_gate_grad_kernel": _traffic, "_experts_gate_sum_kernel": _sum},
    timing={
        "_experts_gate_grad_kernel": Timing(integers=_integers),
        "_experts_gate_sum_kernel": Timing(near=True),
    },
    cases=_cases,
    ops=GATE_GRAD,
    sanitize=_sanitize,
    counted=_counted,
)
