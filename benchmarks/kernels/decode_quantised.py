"""The entry of the kernel for few rows on a quantised W."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import decode_quantised as kernel
from peftkern.kernels.common import Arch, Launch

from .decode import GROUPS
from .entry import BF16, FP32, Case, K, KernelEntry, N, Operands, meta, named, tag
from .quantised import FORMATS, drawn, packed_bytes
from .traffic import Facts, Traffic, cdiv, nbytes, total, unit_of

# the groups in which threads need all registers, or the assembler would spill for some architecture
CROWDED = (
    (1, "awq", "qkv"),
    (1, "gptq", "gate,up"),
    (1, "awq", "gate,up"),
    (1, "nvfp4", "gate,up"),
    (16, "gptq", "gate,up"),
)


def _traffic(f: Facts) -> Traffic:
    x, M, (programs,), K, ranks = f["x"], f["M"], f["grid"], f["K"], f["ranks"]
    packed, Bs, biases = packed_bytes(f), total(f["Bs"]), total(f["biases"])
    s = f["s"]
    again = programs * nbytes(x)
    for n, r in zip(f["Ns"], ranks, strict=True):
        again += cdiv(n, f["BLOCK_N"]) * f["PARTS"] * M * r * s.element_size()
    return Traffic(
        "decode_quantised", 1,
        read=nbytes(x) + packed + Bs + nbytes(s) + biases,
        written=total(f["ys"]),
        flops=sum(2 * M * n * (K + r) for n, r in zip(f["Ns"], ranks, strict=True)),
        unit="fp32" if M == 1 else unit_of(x.dtype),
        requested=packed + Bs + again + biases,
    )  # fmt: skip


def launches(
    m: int,
    ns: Sequence[int],
    k: int,
    ranks: Sequence[int],
    arch: Arch,
    form: str = "nf4 nested",
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
) -> list[Launch]:
    """The launches for a group of projections [N_i, K] of ranks r_i, on meta tensors."""
    ws = [FORMATS[form](meta, n, k) for n in ns]
    config = kernel.default_config(m, ns, k, ws[0], arch, dtype.itemsize)
    return kernel.plan_decode_quantised(
        [meta(m, n, dtype=dtype) for n in ns], meta(m, k, dtype=dtype), ws,
        [meta(r, k, dtype=adapter) for r in ranks],
        [meta(n, r, dtype=adapter) for n, r in zip(ns, ranks, strict=True)],
        [None] * len(ns), [1.0] * len(ns), config, arch,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    for m in (1, 16, 64):
        for form in FORMATS:
            found = launches(m, [N], K, [16], arch, form)
            yield from named(f"decode_quantised M{m} {form} {tag(16)}", found)
    for m in (1, 16):
        for name, ns in GROUPS.items():
            found = launches(m, ns, K, [16] * len(ns), arch)
            yield from named(f"decode_quantised M{m} nf4 nested {name} {tag(16, len(ns))}", found)
        found = launches(m, [N], K, [256], arch)
        yield from named(f"decode_quantised M{m} nf4 nested {tag(256)}", found)
        found = launches(m, [N], K, [16], arch, "nf4 nested", FP32)
        name = tag(16, 1, False, FP32, FP32)
        yield from named(f"decode_quantised M{m} nf4 nested {name}", found)
    for m, form, name in CROWDED:
        ns = GROUPS[name]
        found = launches(m, ns, K, [16] * len(ns), arch, form)
        yield from named(f"decode_quantised M{m} {form} {name} {tag(16, len(ns))}", found)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    config = kernel.DecodeQuantisedConfig(16, 32, 4, 2, 2)
    x, a = o(3, 72), o(5, 72, dtype=FP32)
    b = o(40, 5, dtype=FP32)
    for name, form in FORMATS.items():
        w = form(drawn(o.device), 40, 72)
        for rows in (1, 3):
            ys = kernel.decode_quantised(x[:rows], [w, w], [a, a], [b, b], 2.0, config=config)
            yield f"decode_quantised {name} M={rows}", ys


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    n, k = o.N, o.K // 64 * 64
    x, a, b = o.x[:16, :k].contiguous(), o.a[:, :k].contiguous(), o.b
    for name in ("nf4 nested", "fp8", "int4"):
        w = FORMATS[name](drawn(o.device), n, k)
        for rows in (1, 16):
            yield lambda w=w, rows=rows: kernel.decode_quantised(x[:rows], [w], [a], [b])


ENTRY = KernelEntry(
    traffic={"_decode_quantised_kernel": _traffic},
    cases=_cases,
    sanitize=_sanitize,
    counted=_counted,
)
