"""The launches that ship, on meta tensors: what ``benchmarks.static`` compiles. One case a kernel,
shape class, rank and mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from peftkern.kernels import bits, gemm, grad_a, mixed, outer, pair, shrink, small, update, write
from peftkern.kernels.common import Arch, Launch

BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
M, K, N = (
    8192,
    4096,
    4096,
)  # the shape DESIGN counts with; specialisation sees only divisibility by 16


class Case(NamedTuple):
    name: str
    launch: Launch
    matrix_bound: bool = False  # must use the architecture's fastest matrix instruction


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _named(name: str, launches: list[Launch], matrix_bound: bool = False) -> Iterator[Case]:
    for i, launch in enumerate(launches):
        yield Case(name if i == 0 else f"{name} +{i}", launch, matrix_bound)


def _tag(
    rank: int,
    group: int = 1,
    masked: bool = False,
    dtype: torch.dtype = BF16,
    adapter: torch.dtype = FP32,
) -> str:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    ranks = f"r{rank}x{group}" if group > 1 else f"r{rank}"
    return f"{ranks}{' mask' if masked else ''} {short[dtype]}/{short[adapter]}"


def low_rank_cases(arch: Arch) -> Iterator[Case]:
    """bits, shrink, grad_a and write."""
    yield from _named(
        "bits p=0.1", bits.plan_bits(meta(1, M, K // 32, dtype=INT32), K, 0.1, 7, bits.BitsConfig())
    )
    yield from outer_cases(arch)
    adapters = [(16, 1, False, BF16, FP32), (16, 1, True, BF16, FP32), (64, 1, True, BF16, FP32)]
    adapters += [(128, 1, False, BF16, FP32), (128, 1, True, BF16, FP32)]
    adapters += [(16, 3, False, BF16, FP32), (16, 3, True, BF16, FP32), (64, 2, True, BF16, BF16)]
    adapters += [(16, 1, True, FP32, FP32)]
    for r, group, masked, dtype, adapter in adapters:
        tag = _tag(r, group, masked, dtype, adapter)
        a = [meta(r, K, dtype=adapter)] * group
        for m in (M, 128) if r == 16 and dtype == BF16 else (M,):
            words = [meta(m, K // 32, dtype=INT32) if masked else None] * group
            x, s = meta(m, K, dtype=dtype), meta(m, r * group, dtype=dtype)
            config = shrink.default_config(m, K, [r] * group, arch)
            launches = shrink.plan_shrink(x, a, words, [1.0] * group, s, config)
            yield from _named(f"shrink M{m} {tag}", launches)
        # The kernels below do not change with M.
        x, s = meta(M, K, dtype=dtype), meta(M, r * group, dtype=dtype)
        words = [meta(M, K // 32, dtype=INT32) if masked else None] * group
        ds = [s[:, i * r : i * r + r] for i in range(group)]
        for k in (K, 14336):  # narrow strips, and wide ones
            xs = meta(M, k, dtype=dtype)
            keep = [meta(M, k // 32, dtype=INT32) if masked else None] * group
            grad_config = grad_a.default_config(M, k, arch, [r] * group)
            da = [meta(r, k, dtype=FP32)] * group
            launches = grad_a.plan_grad_a(xs, ds, keep, da, grad_config)
            yield from _named(f"grad_a K{k} {tag}", launches)
        config = write.default_config(M, [r] * group)
        launches = write.plan_write(x, ds, a, words, None, None, config)
        yield from _named(f"write dX {tag}", launches)
        if group == 1 and not masked:
            b, y, bias = meta(N, r, dtype=adapter), meta(M, N, dtype=dtype), meta(N, dtype=dtype)
            launches = write.plan_write(y, ds, [b.T], [None], bias, None, config)
            yield from _named(f"write Y {tag}", launches)


def joined_cases(arch: Arch) -> Iterator[Case]:
    """update and pair, where they apply: ranks of at most 128 together."""
    for r, group, masked, dtype, adapter in (
        (16, 1, False, BF16, FP32),
        (16, 1, True, BF16, FP32),
        (16, 3, True, BF16, FP32),
        (64, 2, True, BF16, BF16),
        (128, 1, True, BF16, FP32),
        (16, 1, True, FP32, FP32),
    ):
        tag = _tag(r, group, masked, dtype, adapter)
        x, s = meta(M, K, dtype=dtype), meta(M, r * group, dtype=dtype)
        a, b = [meta(r, K, dtype=adapter)] * group, [meta(N, r, dtype=adapter)] * group
        words = [meta(M, K // 32, dtype=INT32) if masked else None] * group
        ys, biases = [meta(M, N, dtype=dtype)] * group, [meta(N, dtype=dtype), *[None] * group]
        for m in (M, 4096):  # fewer rows a program below
            config = update.default_config(m, [r] * group, arch)
            launches = update.plan_update(
                x, a, b, words, biases[:group], [1.0] * group, s, ys, config
            )
            yield from _named(f"update M{m} {tag}", launches)
        ds = [s[:, i * r : i * r + r] for i in range(group)]
        for k in (K, 14336):
            words = [meta(M, k // 32, dtype=INT32) if masked else None] * group
            xs, low = meta(M, k, dtype=dtype), [meta(r, k, dtype=adapter)] * group
            das = [meta(r, k, dtype=FP32)] * group
            config_p = pair.default_config(M, k, [r] * group, arch, dtype.itemsize)
            launches = pair.plan_pair(xs, ds, low, words, meta(M, k, dtype=dtype), das, config_p)
            yield from _named(f"pair K{k} {tag}", launches)


def outer_cases(arch: Arch) -> Iterator[Case]:
    """dS and dB in one pass, or in two where the default says so."""
    for r, m in ((16, M), (16, 128), (32, M), (64, 128), (128, M)):
        y, b, s = meta(m, N), meta(N, r, dtype=FP32), meta(m, r)
        db, config = meta(N, r, dtype=FP32), outer.default_outer_config(m, N, r, arch)
        if config is None:
            launches = outer.plan_two_pass(y, b, s, 1.0, meta(m, r), db, arch)
        else:
            launches = outer.plan_outer(y, b, s, 1.0, meta(m, r), db, config)
        yield from _named(f"outer M{m} {_tag(r)}", launches)


def gemm_cases(arch: Arch) -> Iterator[Case]:
    """The fused GEMM: forward (W [N, K] and [K, N]), backward, groups, and the pointer variant."""
    for r, group, masked, dtype in (
        (16, 1, False, BF16),
        (64, 1, True, BF16),
        (16, 3, False, BF16),
        (16, 3, True, BF16),
        (16, 1, True, FP16),
        (16, 1, True, FP32),
    ):
        tag = _tag(r, group, masked, dtype)
        x, y, s = meta(M, K, dtype=dtype), meta(M, N, dtype=dtype), meta(M, r, dtype=dtype)
        w, a, b = meta(N, K, dtype=dtype), meta(r, K, dtype=FP32), meta(N, r, dtype=FP32)
        words = [meta(M, K // 32, dtype=INT32) if masked else None] * group
        fast = dtype != FP32  # fp32 multiplies exactly by default, off the matrix units
        config = gemm.default_config(
            M, N, r, arch, group=group, masked=masked, itemsize=dtype.itemsize
        )
        launches = gemm.plan_gemm(
            x, [y] * group, [w.T] * group, [s] * group, [a] * group, words, None, arch, config
        )
        yield from _named(f"gemm dX {tag}", launches, fast)
        if group > 1:
            continue
        config = gemm.default_config(M, N, r, arch, itemsize=dtype.itemsize)
        launches = gemm.plan_gemm(y, [x], [w], [s], [b.T], [None], None, arch, config)
        yield from _named(f"gemm Y {tag.replace(' mask', '')}", launches, fast)
        if dtype == BF16:
            conv1d = meta(K, N, dtype=dtype).T
            launches = gemm.plan_gemm(y, [x], [conv1d], [s], [b.T], [None], meta(N), arch, config)
            yield from _named(f"gemm Y [K,N] bias {tag.replace(' mask', '')}", launches, fast)
            few, one = meta(64, K), gemm.default_config(64, N, r, arch)
            launches = gemm.plan_gemm(
                meta(64, N), [few], [w], [meta(64, r)], [b.T], [None], None, arch, one
            )
            yield from _named(f"gemm Y M64 {tag.replace(' mask', '')}", launches, fast)
    pointers = gemm.GemmConfig(128, 128, 32 if arch.shared < 160_000 else 64)
    odd = meta(M, K + 1)[:, :K]  # rows off 16 bytes: no descriptor can hold them
    launches = gemm.plan_gemm(
        meta(M, N), [odd], [meta(N, K)], [meta(M, 16)], [meta(16, N)], [None], None, arch, pointers
    )
    yield from _named("gemm Y pointers r16 bf16/bf16", launches)


def decode_cases(arch: Arch) -> Iterator[Case]:
    """small: one row and sixteen."""
    for m in (1, 16):
        for r, dtype, adapter in (
            (16, BF16, FP32),
            (16, BF16, BF16),
            (64, BF16, FP32),
            (128, BF16, FP32),
            (16, FP32, FP32),
        ):
            launches = small.plan_small(
                meta(m, N, dtype=dtype), meta(m, K, dtype=dtype), meta(N, K, dtype=dtype),
                meta(r, K, dtype=adapter), meta(N, r, dtype=adapter),
                None, None, 1.0, small.default_config(m, N, r, arch),
            )  # fmt: skip
            yield from _named(f"decode M{m} {_tag(r, 1, False, dtype, adapter)}", launches)


def mixed_cases(arch: Arch) -> Iterator[Case]:
    """A batch that names adapters: decode of 1 and 16 samples, and prefill of 8."""
    for m, samples, ranks, dtype, adapter in (
        (1, 1, (16,), BF16, FP32),
        (1, 1, (16,) * 4, BF16, FP32),
        (16, 16, (16,), BF16, FP32),
        (16, 16, (8, 16, 32, 64), BF16, FP32),
        (16, 16, (16,) * 8, BF16, BF16),
        (16, 16, (256,) * 8, BF16, FP32),
        (16, 16, (64,) * 64, BF16, FP32),
        (16, 16, (8, 16, 32, 64), FP32, FP32),
        (48, 48, (16,) * 8, BF16, FP32),
        (M, 8, (16,), BF16, FP32),
        (M, 8, (8, 16, 32, 64), BF16, FP32),
        (M, 8, (16,) * 8, FP16, FP16),
        (M, 8, (128,) * 8, BF16, FP32),
        (M, M // 16, (16,) * 8, BF16, FP32),  # many short samples: tiles of many adapters
        (M, 8, (8, 16, 32, 64), FP32, FP32),
    ):
        As = [meta(r, K, dtype=adapter) for r in ranks]
        Bs = [meta(N, r, dtype=adapter) for r in ranks]
        several = "x".join(map(str, sorted(set(ranks))))
        tag = _tag(0, 1, False, dtype, adapter).removeprefix("r0 ")
        name = f"mixed M{m} T{m // samples} L{len(ranks)} r{several} {tag}"
        x, w = meta(m, K, dtype=dtype), meta(N, K, dtype=dtype)
        launches = _mixed(arch, x, w, As, Bs, samples, None)
        yield from _named(name, launches, m == M and dtype != FP32)
    # rows off 16 bytes everywhere, slices of longer ones: nothing can be read 16 bytes at a time
    for m, samples in ((16, 16), (M, 8)):
        x, w = meta(m, K + 1)[:, :K], meta(K, N + 1)[:, :N].T
        As = [meta(r, K + 1, dtype=FP32)[:, :K] for r in (8, 24)]
        Bs = [meta(N, 32, dtype=FP32)[:, :r] for r in (8, 24)]
        launches = _mixed(arch, x, w, As, Bs, samples, meta(N))
        yield from _named(f"mixed M{m} T{m // samples} L2 slices [K,N] bias", launches)


def _mixed(arch, x, w, As, Bs, samples, bias) -> list[Launch]:
    m = x.shape[0]
    config = mixed.default_config(
        m, N, m // samples, [a.shape[0] for a in As], arch,
        itemsize=x.element_size(), adapter_itemsize=As[0].element_size(),
        aligned=mixed.rows_aligned(x, *As),
    )  # fmt: skip
    y, index = meta(m, N, dtype=x.dtype), meta(samples, dtype=INT32)
    return mixed.plan_mixed(y, x, w, As, Bs, [1.0] * len(As), index, bias, config)


def cases(arch: Arch) -> Iterator[Case]:
    """Every case for ``arch``; names are unique, equal launches (same kernel and specialisation)
    may repeat.
    """
    yield from low_rank_cases(arch)
    yield from joined_cases(arch)
    yield from decode_cases(arch)
    yield from mixed_cases(arch)
    yield from gemm_cases(arch)
