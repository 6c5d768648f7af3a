"""The launches that ship, on meta tensors: what ``benchmarks.static`` compiles. One case a kernel,
shape class, rank and mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from peftkern.kernels import (
    bits,
    decode,
    dora_grad,
    dora_norm,
    expand,
    gemm,
    grad_a,
    grad_sb,
    grad_xa,
    mixed,
    prefix_attention,
    prefix_backward,
    prefix_decode,
    prefix_tile,
    shrink,
    shrink_expand,
)
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
    """bits, shrink, grad_a and expand."""
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
        config = expand.default_config(M, [r] * group)
        launches = expand.plan_expand(x, ds, a, words, None, None, config)
        yield from _named(f"expand dX {tag}", launches)
        if group == 1 and not masked:
            b, y, bias = meta(N, r, dtype=adapter), meta(M, N, dtype=dtype), meta(N, dtype=dtype)
            launches = expand.plan_expand(y, ds, [b.T], [None], bias, None, config)
            yield from _named(f"expand Y {tag}", launches)


def joined_cases(arch: Arch) -> Iterator[Case]:
    """shrink_expand and grad_xa, where they apply: ranks of at most 128 together."""
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
            config = shrink_expand.default_config(m, [r] * group, arch)
            launches = shrink_expand.plan_shrink_expand(
                x, a, b, words, biases[:group], [1.0] * group, s, ys, config
            )
            yield from _named(f"shrink_expand M{m} {tag}", launches)
        ds = [s[:, i * r : i * r + r] for i in range(group)]
        for k in (K, 14336):
            words = [meta(M, k // 32, dtype=INT32) if masked else None] * group
            xs, low = meta(M, k, dtype=dtype), [meta(r, k, dtype=adapter)] * group
            das = [meta(r, k, dtype=FP32)] * group
            config_p = grad_xa.default_config(M, k, [r] * group, arch, dtype.itemsize)
            launches = grad_xa.plan_grad_xa(
                xs, ds, low, words, meta(M, k, dtype=dtype), das, config_p
            )
            yield from _named(f"grad_xa K{k} {tag}", launches)


def outer_cases(arch: Arch) -> Iterator[Case]:
    """dS and dB in one pass, or in two where the default says so."""
    for r, m in ((16, M), (16, 128), (32, M), (64, 128), (128, M)):
        y, b, s = meta(m, N), meta(N, r, dtype=FP32), meta(m, r)
        db, config = meta(N, r, dtype=FP32), grad_sb.default_config(m, N, r, arch)
        if config is None:
            launches = grad_sb.plan_two_pass(y, b, s, 1.0, meta(m, r), db, arch)
        else:
            launches = grad_sb.plan_grad_sb(y, b, s, 1.0, meta(m, r), db, config)
        yield from _named(f"grad_sb M{m} {_tag(r)}", launches)


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
    """decode: one row and sixteen."""
    for m in (1, 16):
        for r, dtype, adapter in (
            (16, BF16, FP32),
            (16, BF16, BF16),
            (64, BF16, FP32),
            (128, BF16, FP32),
            (16, FP32, FP32),
        ):
            launches = decode.plan_decode(
                meta(m, N, dtype=dtype), meta(m, K, dtype=dtype), meta(N, K, dtype=dtype),
                meta(r, K, dtype=adapter), meta(N, r, dtype=adapter),
                None, None, 1.0, decode.default_config(m, N, r, arch),
            )  # fmt: skip
            yield from _named(f"decode M{m} {_tag(r, 1, False, dtype, adapter)}", launches)


def dora_cases(arch: Arch) -> Iterator[Case]:
    """Norms, the gain in the fused product, and the gradient's pass."""
    for r, dtype, adapter, transposed in (
        (16, BF16, FP32, False),
        (16, BF16, BF16, False),
        (16, BF16, FP32, True),
        (128, BF16, FP32, False),
        (16, FP32, FP32, False),
    ):
        w = meta(K, N, dtype=dtype).T if transposed else meta(N, K, dtype=dtype)
        config = dora_norm.default_config(N, K, arch, dtype.itemsize)
        a, b = meta(r, K, dtype=adapter), meta(N, r, dtype=adapter)
        launches = dora_norm.plan_norms(w, a, b, 1.0, meta(N, dtype=FP32), config)
        layout = "[K,N] " if transposed else ""
        yield from _named(f"dora norms {layout}{_tag(r, 1, False, dtype, adapter)}", launches)
    gain, sums = meta(N, dtype=FP32), meta(N, dtype=FP32)
    for dtype in (BF16, FP32):
        dy, v, dz = (meta(M, N, dtype=dtype) for _ in range(3))
        config = dora_grad.default_config(M, N, arch)
        bias = meta(N, dtype=dtype)
        launches = dora_grad.plan_scale_grad(dy, gain, v, bias, dz, sums, config)
        yield from _named(f"dora gradient bias {str(dtype).removeprefix('torch.')}", launches)
    x, w, s, b = meta(M, K), meta(N, K), meta(M, 16), meta(N, 16, dtype=FP32)
    config = gemm.default_config(M, N, 16, arch, gain=True)
    launches = gemm.plan_gemm(
        meta(M, N), [x], [w], [s], [b.T], [None], meta(N), arch, config, gain, meta(M, N)
    )
    yield from _named("dora gemm Y V bias r16 bf16/fp32", launches, True)


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


def prefix_problem(
    T: int,
    S: int,
    D: int,
    dtype: torch.dtype = BF16,
    *,
    shared: bool = True,
    padded: bool = False,
    B: int = 8,
    heads: tuple[int, int] = (32, 8),
    P: int = 128,
    **options: Any,
) -> prefix_tile.Problem:
    """q, k and v as transformers has them: [B, rows, heads, D] seen transposed."""
    H, H_kv = heads
    q, k, v = (
        meta(B, n, h, D, dtype=dtype).transpose(1, 2) for n, h in ((T, H), (S, H_kv), (S, H_kv))
    )
    prefix = [meta(*(() if shared else (B,)), H_kv, P, D, dtype=dtype) for _ in range(2)]
    keep = meta(B, S, dtype=torch.bool) if padded else None
    return prefix_tile.check(q, k, v, *prefix, keep=keep, **options)


def prefix_training(x: prefix_tile.Problem, arch: Arch) -> tuple[list[Launch], list[Launch]]:
    """Forward and backward launches with the default configs."""
    B, H, _, T, _, _, D = x.sizes
    o, lse, size = x.rows_like_q(), meta(B, H, T, dtype=FP32), x.q.element_size()
    forward = prefix_attention.plan_attend(
        x, o, lse, prefix_attention.default_config(D, arch, size)
    )
    grads = prefix_backward.Grads(
        x.rows_like_q(), torch.empty_like(x.k), torch.empty_like(x.v),
        *(torch.empty_like(x.prefix_key, dtype=FP32) for _ in range(2)),
    )  # fmt: skip
    config = prefix_backward.default_config(x.sizes, x.shared, arch, size)
    backward = prefix_backward.plan_backward(
        x, o, lse, torch.empty_like(o), torch.empty_like(lse), grads, config
    )
    return forward, backward


def prefix_decoding(x: prefix_tile.Problem, arch: Arch) -> list[Launch]:
    B, H, _, T, _, _, _ = x.sizes
    config = prefix_decode.default_config(x.sizes, x.shared, arch, x.q.element_size())
    return prefix_decode.plan_decode(x, x.rows_like_q(), meta(B, H, T, dtype=FP32), config)


def prefix_cases(arch: Arch) -> Iterator[Case]:
    """Prefix attention: training shapes, masks, a prefix a row, and decoding."""
    window: dict[str, Any] = dict(window=256)
    everything = window | dict(
        padded=True, softcap=50.0, sinks=meta(32, dtype=BF16), q_offset=meta(1, dtype=INT32),
        no_prefix=meta(8, dtype=torch.bool),
    )  # fmt: skip
    for D, dtype, name, options in (
        (128, BF16, "causal", {}),
        (64, BF16, "causal", {}),
        (256, BF16, "causal", {}),
        (128, BF16, "padded", dict(padded=True)),
        (64, BF16, "both ways padded per row", dict(padded=True, causal=False, shared=False)),
        (128, BF16, "window", window),
        (256, BF16, "window softcap padded", window | dict(softcap=50.0, padded=True)),
        (64, BF16, "window sinks padded", window | dict(sinks=meta(32, dtype=BF16), padded=True)),
        (64, BF16, "all", everything),
        (128, BF16, "all", everything),
        (256, BF16, "all", everything),
        (96, FP16, "padded per row", dict(padded=True, shared=False)),
        (64, FP32, "padded", dict(padded=True)),
        (128, FP32, "padded", dict(padded=True)),
        (256, FP32, "causal", {}),
    ):
        tag = f"D{D} {name} {str(dtype).removeprefix('torch.')}"
        x = prefix_problem(1024, 1024, D, dtype, **options)
        fast = dtype != FP32 and D in (64, 128)
        forward, backward = prefix_training(x, arch)
        yield from _named(f"prefix fwd {tag}", forward, fast)
        if prefix_backward.declines(dtype, D):
            continue
        for launch, what in zip(backward, ("rows", "keys", "sum"), strict=False):
            yield Case(f"prefix bwd {what} {tag}", launch, fast and what != "sum")
    for D, T, name, options in (
        (128, 1, "causal", {}),
        (64, 1, "padded", dict(padded=True)),
        (256, 1, "window padded", window | dict(padded=True)),
        (128, 1, "offset on the device", dict(q_offset=meta(1, dtype=INT32), padded=True)),
        (128, 1, "per row", dict(shared=False)),
        (128, 8, "softcap", dict(softcap=50.0)),
        (128, 1, "all", everything),
        (256, 1, "all", everything),
        (256, 1, "fp32", dict(dtype=FP32)),
    ):
        x = prefix_problem(T, 512, D, **options)
        yield from _named(f"prefix decode D{D} T{T} {name}", prefix_decoding(x, arch))


def cases(arch: Arch) -> Iterator[Case]:
    """Every case for ``arch``; names are unique, equal launches (same kernel and specialisation)
    may repeat.
    """
    yield from low_rank_cases(arch)
    yield from joined_cases(arch)
    yield from decode_cases(arch)
    yield from mixed_cases(arch)
    yield from gemm_cases(arch)
    yield from dora_cases(arch)
    yield from prefix_cases(arch)
