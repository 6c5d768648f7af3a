"""A mixture of experts with low-rank updates for few tokens, from X to the sum over the experts.

    Y[t] = Σ_j weights[t, j] · down_e(gate(up_e(X[t])))        e = index[t, j]

where up_e(x) = x W_eᵀ + scale · (x A_eᵀ) B_eᵀ + bias_e with A and B of the token's own adapter, and
down_e likewise. Nothing is sorted: a program has a pair (a token and one of its experts) and reads
the W, A and B of that expert alone. Three launches:

- S of up: some ranks of a pair for each program, in parts over K;
- H: a program streams its rows of W, adds S Bᵀ and applies the gate. It has a block of H, so it
  makes this block's part of the S that reads H, with those columns of A;
- Y: a program has a token and a block of its outputs, walks over the token's k experts, and adds
  S Bᵀ of each, with the parts of S in their order. For large ranks they are added by a launch of
  their own.

From compute capability 9.0 on the second and the third start while the one before runs
(programmatic dependent launch) and wait for its end: the second after it has streamed W, the third
before it reads H. The first is an ordinary launch, so all that came before it has ended. Only
outputs and scratch memory are allocated and nothing syncs, so a CUDA graph can capture the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import checks
from .common import Arch, Launch, arch_of, cdiv, next_pow2, padded, row_stride, starts_early
from .experts_decode_tile import (
    _experts_few_down_kernel,
    _experts_few_shrink_kernel,
    _experts_few_up_kernel,
)
from .experts_gates import Clamp, check_name, constants
from .experts_low_rank import check_factors
from .experts_route import INDICES
from .launching import planned
from .reduce import plan_sum

MAX_PAIRS = 64
HELD_RANK = 64  # ranks that a program adds at a time
SHRINK_RANKS, SHRINK_COLUMNS = 4, 1024  # of a program that makes S of up
MOST_PARTS = 16  # of S of up


class FewLinear(NamedTuple):
    """One linear of all experts: weight [E, N, K], bias [E, N], and for each adapter A, B, scale.

    A is [E, r_i, K] and B [E, N, r_i], both None for an adapter without weights here; without any
    adapter the three are empty.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    a: Sequence[torch.Tensor | None] = ()
    b: Sequence[torch.Tensor | None] = ()
    scales: Sequence[float] = ()


@dataclass(frozen=True)
class ExpertsDecodeConfig:
    """Columns of H and of Y for a program (up_n, down_n), and of what it reads at a time.

    ``num_warps`` are those of a program of H; one of Y, whose tiles are half as large, has half.
    """

    up_n: int = 16
    up_k: int = 256
    down_n: int = 16
    down_k: int = 256
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        checks.blocks(self, low=1, up_n=self.up_n, down_n=self.down_n)
        checks.blocks(self, up_k=self.up_k, down_k=self.down_k)


def default_config(
    T: int, k: int, width: int, N: int, K: int, arch: Arch, itemsize: int = 2,
    transposed: bool = False, interleaved: bool = False,
) -> ExpertsDecodeConfig:  # fmt: skip
    """The widest blocks whose programs fill the device; ``width`` is that of H.

    ``transposed``: outputs, not inputs, are beside each other in W, so blocks of 32 are read in
    longer rows. ``interleaved``: a column of H is two of W.
    """
    widest = 32 if transposed else 16

    def block(rows: int, columns: int) -> int:
        n = widest
        while n > 4 and rows * cdiv(columns, n) < arch.sms * 9 // 10:
            n //= 2
        return n

    most = 512 // itemsize * 16 // widest
    return ExpertsDecodeConfig(
        up_n=block(T * k, width),
        up_k=max(32, min(most // 2 if interleaved else most, next_pow2(K))),
        down_n=block(T, N),
        down_k=max(32, min(most, next_pow2(width))),
    )


class _Low(NamedTuple):
    """A or B of all adapters as a kernel takes them; empty ones are None."""

    tensors: tuple[torch.Tensor, ...] | None
    ranks: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]  # for each dimension, of each adapter

    @classmethod
    def of(cls, ts: Sequence[torch.Tensor | None], axis: int) -> _Low:
        some = next((t for t in ts if t is not None), None)
        if some is None:
            return cls(None, (), ((),) * 3)
        full = [some if t is None else t for t in ts]
        ranks = tuple(0 if t is None else t.shape[axis] for t in ts)
        return cls(tuple(full), ranks, tuple(tuple(t.stride(i) for t in full) for i in range(3)))

    @property
    def most(self) -> int:
        return max(self.ranks, default=0)


def plan_decode(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: FewLinear,
    down: FewLinear,
    name: str,
    layout: str,
    choice: torch.Tensor | None,
    clamp: tuple[float, float, float] | None,
    y: torch.Tensor,
    config: ExpertsDecodeConfig,
    arch: Arch,
) -> list[Launch]:
    """The launches that fill ``y`` [T, N] (contiguous); the arguments are checked already."""
    (T, K), k, E = x.shape, index.shape[1], up.weight.shape[0]
    P, width, N = T * k, down.weight.shape[2], y.shape[1]
    a, b = _Low.of(up.a, 1), _Low.of(up.b, 2)
    next_a, next_b = _Low.of(down.a, 1), _Low.of(down.b, 2)
    r, next_r = a.most, next_a.most
    early = starts_early(x, arch)
    pdl: dict[str, Any] = dict(launch_pdl=True)  # an option that only NVIDIA's compiler knows
    shape: dict[str, Any] = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    launches, fp32 = [], torch.float32

    parts, count = None, 1
    if a.tensors is not None:
        blocks = max(1, cdiv(K, SHRINK_COLUMNS))
        k_part = cdiv(blocks, MOST_PARTS) * SHRINK_COLUMNS
        count = max(1, cdiv(K, k_part))
        parts = x.new_empty((count, P, r), dtype=fp32)
        args: tuple[Any, ...] = (
            x, index, choice, a.tensors, parts, tuple(map(float, up.scales)), a.ranks, *a.strides,
            k, E, K, k_part, r, row_stride(x), P * r,
        )  # fmt: skip
        meta: dict[str, Any] = dict(
            COUNT=len(up.a), BLOCK_K=SHRINK_COLUMNS, BLOCK_R=SHRINK_RANKS, EARLY=early,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        grid: tuple[int, ...] = (P, cdiv(r, SHRINK_RANKS), count)
        launches.append(Launch(_experts_few_shrink_kernel, grid, args, meta))

    tiles = cdiv(width, config.up_n)
    h = x.new_empty((P, width))
    next_parts = None
    if next_a.tensors is not None:
        next_parts = x.new_empty((tiles, P, next_r), dtype=fp32)
    # parts of S that a program of Y would read, against its rows of W
    apart = tiles * next_r * 4 * 4 > config.down_n * width * x.element_size()
    second = early and parts is not None
    third = early and not apart
    args = (
        x, index, choice, up.weight, up.bias, b.tensors, parts, h, next_a.tensors, next_parts,
        b.ranks, *b.strides, tuple(map(float, down.scales)), next_a.ranks, *next_a.strides,
        P, k, E, K, width, r, next_r, row_stride(x), *up.weight.stride(),
        0 if up.bias is None else up.bias.stride(0), P * r, P * next_r, *constants(clamp),
    )  # fmt: skip
    meta = dict(
        ACT=name, CLAMPED=clamp is not None, LAYOUT=layout, COUNT=max(len(up.a), len(down.a)),
        PARTS=count, BLOCK_N=config.up_n, BLOCK_K=config.up_k,
        BLOCK_R=min(HELD_RANK, padded(r)), NEXT_BLOCK_R=min(HELD_RANK, padded(next_r)),
        STAGES=config.num_stages, EARLY=second, NEXT_EARLY=third,
    ) | shape | (pdl if second else {})  # fmt: skip
    launches.append(Launch(_experts_few_up_kernel, (P * tiles,), args, meta))

    if next_parts is not None and apart:
        whole = x.new_empty((1, P, next_r), dtype=fp32)
        launches.append(plan_sum([(next_parts, whole[0])]))
        next_parts, tiles = whole, 1
    args = (
        h, index, choice, weights, down.weight, down.bias, next_b.tensors, next_parts, y,
        next_b.ranks, *next_b.strides, T, k, E, width, N, next_r, *down.weight.stride(),
        0 if down.bias is None else down.bias.stride(0), P * next_r, tiles,
    )  # fmt: skip
    meta = dict(
        COUNT=len(down.a), BLOCK_N=config.down_n, BLOCK_K=config.down_k,
        BLOCK_R=min(HELD_RANK, padded(next_r)), BLOCK_P=min(16, next_pow2(tiles)),
        STAGES=config.num_stages + 2, EARLY=third,
        num_warps=max(1, config.num_warps // 2), num_stages=config.num_stages,
    ) | (pdl if third else {})  # fmt: skip
    launches.append(Launch(_experts_few_down_kernel, (T * cdiv(N, config.down_n),), args, meta))
    return launches


def _check_linear(name: str, part: FewLinear, columns: int, dtype: torch.dtype) -> FewLinear:
    """``part``, checked to read rows of ``columns``, with dense biases."""
    w, bias, a, b, scales = part
    if w.dim() != 3 or w.shape[2] != columns:
        raise ValueError(
            f"{name}.weight has shape {tuple(w.shape)}; allowed: [E, N, {columns}], as its input"
        )
    if w.dtype != dtype:
        raise TypeError(f"{name}.weight has dtype {w.dtype}; allowed: {dtype}, that of x")
    E, N, _ = w.shape
    if bias is not None:
        checks.shape(f"{name}.bias", bias, (E, N), "[experts, outputs] of weight")
        bias = bias if bias.stride(1) == 1 else bias.contiguous()
    if not len(a) == len(b) == len(scales) <= checks.MAX_ADAPTERS:
        raise ValueError(
            f"{name}.a, .b and .scales have {len(a)}, {len(b)} and {len(scales)} entries; "
            f"allowed: equal counts, at most {checks.MAX_ADAPTERS}"
        )
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        if (one is None) != (other is None):
            raise ValueError(f"{name}.a[{i}] and .b[{i}]: allowed: both, or neither")
        if one is not None and other is not None and one.shape[1] != other.shape[-1]:
            raise ValueError(
                f"{name}.a[{i}] has rank {one.shape[1]}, .b[{i}] {other.shape[-1]}; allowed: one"
            )
    if all(t is None for t in a):
        return FewLinear(w, bias)
    a = check_factors(f"{name}.a", a, len(a), E, 1, columns, dtype)
    b = check_factors(f"{name}.b", b, len(b), E, 2, N, dtype)
    return FewLinear(w, bias, a, b, scales)


@planned("up", "down")
def decode(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: FewLinear,
    down: FewLinear,
    name: str = "silu",
    layout: str = "halves",
    *,
    choice: torch.Tensor | None = None,
    clamp: Clamp | tuple[float, float, float] | None = None,
    config: ExpertsDecodeConfig | None = None,
) -> torch.Tensor:
    """Y [T, N] in x's dtype, for at most 64 pairs, in three launches; two without adapters of up.

    Args:
        x: [T, K] fp16/bf16/fp32, any row stride.
        index: integers [T, k], the experts of each token. One out of range adds nothing.
        weights: the routing weights [T, k], fp32 or x's dtype.
        up, down: the linears, weights of any strides; a and b fp32 or x's dtype, any strides, ranks
            from 1 to 256.
        name, layout, clamp: the gate, as in :func:`.experts_gate.gate`.
        choice: integers [T], the adapter of each token; one out of range is none. Without it there
            is one adapter at most, for all tokens.

    Raises:
        TypeError, ValueError: naming the argument, before any launch.
    """
    x = checks.rows("x", x)
    check_name(name, layout, clamp)
    checks.matrix("index", index)
    (T, K), k, P = x.shape, index.shape[1], index.numel()
    for what, t in (("index", index), ("choice", choice)):
        if t is not None and t.dtype not in INDICES:
            raise TypeError(f"{what} has dtype {t.dtype}; allowed: int64, int32, int16, uint8")
    checks.shape("index", index, (T, k), "a row for each row of x")
    if P > MAX_PAIRS:
        raise ValueError(
            f"index has {P} entries; allowed: at most {MAX_PAIRS} (use the grouped kernels)"
        )
    checks.shape("weights", weights, (T, k), "as index")
    if weights.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"weights has dtype {weights.dtype}; allowed: torch.float32, {x.dtype}")
    up = _check_linear("up", up, K, x.dtype)
    wide = up.weight.shape[1]
    if layout != "alone" and wide % 2:
        raise ValueError(f"up.weight has {wide} outputs; allowed: an even number, of G and U")
    width = wide if layout == "alone" else wide // 2
    down = _check_linear("down", down, width, x.dtype)
    if down.weight.shape[0] != up.weight.shape[0]:
        raise ValueError(
            f"down.weight has {down.weight.shape[0]} experts; allowed: {up.weight.shape[0]}, as up"
        )
    counts = {len(part.a) for part in (up, down) if part.a}
    if len(counts) > 1:
        raise ValueError("up and down have different numbers of adapters; allowed: one number")
    if choice is not None:
        checks.shape("choice", choice, (T,), "x has T rows")
    elif counts and counts != {1}:
        raise ValueError(f"choice is None with {counts.pop()} adapters; allowed: None with one")
    checks.device(
        x=x, index=index, weights=weights, choice=choice, up_weight=up.weight, up_bias=up.bias,
        up_a=up.a, up_b=up.b, down_weight=down.weight, down_bias=down.bias, down_a=down.a,
        down_b=down.b,
    )  # fmt: skip
    y = x.new_empty((T, down.weight.shape[1]))
    if not y.numel():
        return y
    if not P or not width or not up.weight.shape[0]:
        return y.zero_()
    arch = arch_of(x.device)
    config = config or default_config(
        T, k, width, y.shape[1], K, arch, x.element_size(),
        up.weight.stride(1) == 1 < up.weight.stride(2), layout == "interleaved",
    )  # fmt: skip
    for launch in plan_decode(
        x, index.contiguous(), weights.contiguous(), up, down, name, layout,
        None if choice is None else choice.contiguous(), clamp, y, config, arch,
    ):  # fmt: skip
        launch.run()
    return y
