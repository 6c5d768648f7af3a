"""The entry of the grouped product of a mixture's experts, forward and in the input's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peftkern.kernels import bits, experts_gemm
from peftkern.kernels.common import Arch, Launch
from peftkern.kernels.experts_route import route

from .entry import BF16, FP16, FP32, INT32, Case, KernelEntry, Operands, Timing, meta, named
from .experts import LAYERS, Layer, meta_route
from .experts_races import GEMM
from .traffic import Facts, Traffic, cdiv, nbytes, unit_of


def even_tiles(pairs: int, groups: int, block_m: int) -> int:
    """The tiles of a routing that spreads the pairs evenly, for counts: a real one is data."""
    each, more = divmod(pairs, groups)
    return more * cdiv(each + 1, block_m) + (groups - more) * cdiv(each, block_m)


def peft_b(layer: Layer, N: int, r: int, dtype: torch.dtype) -> Tensor:
    """B [E, N, r] as a view of PEFT's lora_B [N, r·E]."""
    return meta(N, r * layer.experts, dtype=dtype).view(N, r, layer.experts).permute(2, 0, 1)


def _tiles(f: Facts) -> int:
    return even_tiles(f["P"], f["GROUPS"], f["BLOCK_M"])


def _traffic(f: Facts) -> Traffic:
    """Counts of an even routing; a rank is that of all adapters' largest."""
    P, N, K, groups = f["P"], f["N"], f["K"], min(f["P"], f["GROUPS"])
    tiles_m, tiles_n, item = _tiles(f), cdiv(N, f["BLOCK_N"]), f["x"].element_size()
    experts = min(f["GROUPS"] // f["ADAPTERS"], P)
    rank = max(f["ranks"], default=0) // (16 if len(f["ranks"]) > 1 else 1)
    b_item = f["bs"][0].element_size() if f["bs"] else 0
    left, words = P * rank * item, nbytes(f["words"])
    bias = N * f["bias"].element_size() if f["bias"] is not None else 0
    places = 4 * P * (f["GATHER"] + f["SCATTER"] > 0) + 12 * tiles_m
    return Traffic(
        "experts gemm", 1,
        read=nbytes(f["x"]) + experts * (N * K * item + bias)
        + groups * N * rank * b_item + left + words + places,
        written=P * N * item,
        flops=2 * tiles_m * f["BLOCK_M"] * N * (K + rank),
        unit=unit_of(f["x"].dtype),
        requested=tiles_n * (P * K * item + left + places) + words
        + tiles_m * (N * K * item + N * rank * b_item + bias),
    )  # fmt: skip


def _pieces(f: Facts) -> int:
    return _tiles(f) * cdiv(f["N"], f["BLOCK_N"])


def launches(
    layer: Layer,
    part: str,
    arch: Arch,
    *,
    block_m: int = 128,
    r: int = 16,
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
    masked: bool = False,
    transposed: bool = False,
    bias: bool = False,
    adapters: int = 1,
    as_peft: bool = False,
    config: experts_gemm.ExpertsGemmConfig | None = None,
) -> list[Launch]:
    """The launches of one product of a layer: ``part`` is "up", "down", "dH" or "dX".

    ``transposed``: the parameter is [E, K, N], as gpt-oss keeps it. r 0: without an adapter.
    ``as_peft``: B is PEFT's parameter itself, else a copy [E, N, r].
    """
    T, k, E, D, inner = layer
    P, wide = T * k, 2 * inner
    N, K = {"up": (wide, D), "down": (D, inner), "dH": (inner, D), "dX": (D, wide)}[part]
    gather, scatter, forward = part in ("up", "dH"), part in ("down", "dX"), part in ("up", "down")
    w = meta(E, N, K, dtype=dtype)
    if transposed == forward:
        w = meta(E, K, N, dtype=dtype).transpose(1, 2)
    bs = []
    if r:
        b = meta(E, N, r, dtype=adapter) if forward else meta(E, r, N, dtype=adapter).mT
        bs = [peft_b(layer, N, r, adapter) if as_peft else b] * adapters
    words = meta(P, cdiv(N, 32), dtype=INT32) if masked else None
    if config is None:
        config = experts_gemm.default_config(
            block_m, N, arch, masked=masked, itemsize=dtype.itemsize
        )
    return experts_gemm.plan_gemm(
        meta(P, N, dtype=dtype), meta(T if gather else P, K, dtype=dtype),
        meta_route(layer, adapters, block_m), w, meta(P, r, dtype=dtype) if r else None, bs,
        meta(E, N, dtype=dtype) if bias else None, words, gather, scatter, arch, config,
    )  # fmt: skip


def _cases(arch: Arch) -> Iterator[Case]:
    """The four products of a layer, with what models and batches change of them."""
    q = LAYERS["qwen3"]
    few, some, tens = q._replace(T=64), q._replace(T=256), q._replace(T=1024)
    one, two, wide = dict(masked=True), dict(transposed=True, bias=True), dict(r=64, masked=True)
    for part, layer, tag, change in (
        ("up", q, "r16 bf16/fp32", {}),
        ("down", q, "r16 bf16/fp32", {}),
        ("dH", q, "r16 bf16/fp32", {}),
        ("dX", q, "r16 bf16/fp32", {}),
        ("dH", q, "r16 mask bf16/fp32", one),
        ("dX", q, "r16 mask bf16/fp32", one),
        ("dX", q, "r64 mask bf16/fp32", wide),
        ("up", q, "[K,N] bias r16 bf16/fp32", two),
        ("down", q, "[K,N] bias r16 bf16/fp32", two),
        ("dX", q, "[K,N] r16 mask bf16/fp32", dict(transposed=True, masked=True)),
        ("up", q, "PEFT's B r16 bf16/fp32", dict(as_peft=True)),
        ("up", q, "r128 bf16/bf16", dict(r=128, adapter=BF16)),
        ("up", q, "r16x4 bf16/fp32", dict(adapters=4)),
        ("dX", q, "r16x4 mask bf16/fp32", dict(adapters=4, masked=True)),
        ("up", q, "r0 bf16", dict(r=0)),
        ("up", tens, "M64 r16 bf16/fp32", dict(block_m=64)),
        ("down", tens, "M64 r16 bf16/fp32", dict(block_m=64)),
        ("dX", tens, "M64 r16 mask bf16/fp32", dict(block_m=64, masked=True)),
        ("up", some, "M32 r16 bf16/fp32", dict(block_m=32)),
        ("up", few, "M16 r16 bf16/fp32", dict(block_m=16)),
        ("down", few, "M16 [K,N] r16 bf16/fp32", dict(block_m=16, transposed=True)),
        ("up", q, "r16 fp16/fp32", dict(dtype=FP16)),
        ("up", q, "r16 fp32/fp32", dict(dtype=FP32)),
        ("dX", q, "r16 mask fp32/fp32", dict(dtype=FP32, masked=True)),
        ("up", few, "M16 r16 fp32/fp32", dict(block_m=16, dtype=FP32)),
    ):  # fmt: skip
        fast = change.get("dtype") != FP32 and change.get("block_m", 128) >= 64
        yield from named(f"experts {part} {tag}", launches(layer, part, arch, **change), fast)


def _sanitize(o: Operands) -> Iterator[tuple[str, list[Tensor]]]:
    E, k = 4, 2
    index = torch.stack([torch.arange(o.M), torch.arange(o.M) + 1], 1).to(o.device) % (E + 1)
    x, w = o.x, o(E, o.N, o.K)
    for tma in (False, True):
        for transposed in (False, True):
            r = route(index, E, 16)
            c = experts_gemm.ExpertsGemmConfig(
                64, 32, group_m=2, tma=tma, num_warps=4, num_stages=2
            )
            weight = o(E, o.K, o.N).transpose(1, 2) if transposed else w
            s, b = o(o.M * k, o.r), o(E, o.N, o.r, dtype=FP32)
            y = experts_gemm.gemm(
                x, r, weight, s, [b], bias=o(E, o.N), gather=True, scatter=transposed, config=c
            )
            kept = bits.dropout_bits(o.M * k, o.K, 0.1, 7, device=o.device)
            back = weight.transpose(1, 2)
            low = o(E, o.K, o.r, dtype=FP32)
            dx = experts_gemm.gemm(
                y, r, back, s, [low], gather=False, scatter=True, bits=kept, config=c
            )
            yield f"experts gemm tma={tma} transposed={transposed}", [y, dx]


def _counted(o: Operands) -> Iterator[Callable[[], Any]]:
    index = torch.arange(2 * o.M, device=o.device).view(-1, 2) % 4
    r, w = route(index, 4, 128), o(4, o.N, o.K)
    s, b = o(2 * o.M, o.r), o(4, o.N, o.r, dtype=FP32)
    yield lambda: experts_gemm.gemm(o.x, r, w, s, [b], gather=True, scatter=False)


ENTRY = KernelEntry(
    traffic={"_experts_gemm_kernel": _traffic},
    timing={"_experts_gemm_kernel": Timing(pieces=_pieces)},
    cases=_cases,
    ops=GEMM,
    sanitize=_sanitize,
    counted=_counted,
)
