"""What one launch moves: the record that every count is made of, and its value for each of our
Triton kernels, read off the launch's own arguments and grid.

``read`` and ``written`` are bytes of device memory under the rule that holds for vendor kernels
too: each operand once for every sweep over it. Programs that run at the same time share what they
load through the L2 cache, so a tile that many of them load counts once; a rank chunk that walks the
whole of dY a second time counts it twice. ``requested`` is the other end: bytes that all programs
together ask for, repeats included, with masked lanes left out; the hardware's L2 counters should
show it (ring 4). It is 0 where a kernel is the vendor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch


class Traffic(NamedTuple):
    """Device traffic of ``launches`` kernel launches: bytes and floating-point operations."""

    name: str
    launches: int
    read: int
    written: int
    flops: int = 0
    unit: str = "none"  # which rate the flops run at: matrix, fp32, or none
    requested: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def unit_of(dtype: torch.dtype) -> str:
    """Products of two-byte floats run on the matrix unit; fp32 products do not, as torch is set."""
    return "matrix" if dtype.itemsize <= 2 else "fp32"


def nbytes(t: Any) -> int:
    """Bytes of a tensor's elements, of what a tensor descriptor describes, or 0 for None."""
    if t is None:
        return 0
    base = getattr(t, "base", t)  # a TensorDescriptor keeps its tensor there
    return math.prod(t.shape) * base.element_size()


def _total(ts: Iterable[Any]) -> int:
    return sum(nbytes(t) for t in ts)


def _once(ts: Iterable[Any]) -> int:
    """Bytes of the tensors in ``ts``, one that is there several times counted once."""
    return _total({id(t): t for t in ts if t is not None}.values())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


Facts = dict[str, Any]  # a launch's arguments and constants by name, and "grid"


def _bits(f: Facts) -> Traffic:
    seed = nbytes(f["seed_ptr"])
    return Traffic("bits", 1, seed, nbytes(f["out"]), requested=seed * math.prod(f["grid"]))


def _shrink(f: Facts) -> Traffic:
    x, As, words, (blocks, split) = f["x"], f["As"], f["words"], f["grid"]
    rank = sum(f["ranks"])
    return Traffic(
        "shrink", 1,
        read=nbytes(x) + _total(As) + _once(words),
        written=split * f["M"] * rank * f["out"].element_size(),
        flops=2 * f["M"] * f["K"] * rank,
        unit=unit_of(x.dtype),
        requested=nbytes(x) + blocks * _total(As) + _total(words),
    )  # fmt: skip


def _shrink_expand(f: Facts) -> Traffic:
    x, As, Bs, words, (blocks,) = f["x"], f["As"], f["Bs"], f["words"], f["grid"]
    once = _total(Bs) + _total(f["biases"])
    return Traffic(
        "shrink_expand", 1,
        read=nbytes(x) + _total(As) + _once(words) + once,
        written=nbytes(f["s_out"]) + _total(f["ys"]),
        flops=2 * f["M"] * sum(r * (f["K"] + n) for r, n in zip(f["ranks"], f["Ns"], strict=True)),
        unit=unit_of(x.dtype),
        requested=nbytes(x) + blocks * (_total(As) + once) + _total(words),
    )  # fmt: skip


def _sum(f: Facts) -> Traffic:
    read = _total(f["partials"])
    return Traffic("sum", 1, read, _total(f["outs"]), requested=read)


def _grad_sb(f: Facts) -> Traffic:
    dy, b, s, (blocks, split, chunks) = f["dy"], f["b"], f["s"], f["grid"]
    return Traffic(
        "grad_sb", 1,
        read=nbytes(dy) * chunks + nbytes(b) + nbytes(s),
        written=nbytes(f["ds_out"]) + nbytes(f["db_out"]),
        flops=4 * f["M"] * f["N"] * f["R"],
        unit=unit_of(dy.dtype),
        requested=nbytes(dy) * chunks + nbytes(b) * blocks + nbytes(s) * split,
    )  # fmt: skip


def _grad_a(f: Facts) -> Traffic:
    x, ds, words = f["x"], f["ds"], f["words"]
    return Traffic(
        "grad_a", 1,
        read=nbytes(x) + _total(ds) + _once(words),
        written=_total(f["outs"]),
        flops=2 * f["M"] * f["K"] * sum(f["ranks"]),
        unit=unit_of(x.dtype),
        requested=nbytes(x) + f["grid"][0] * _total(ds) + _total(words),
    )  # fmt: skip


def _grad_xa(f: Facts) -> Traffic:
    x, ds, As, words = f["x"], f["ds"], f["As"], f["words"]
    strips, blocks = f["grid"][0], _cdiv(f["M"], f["BLOCK_M"])
    return Traffic(
        "grad_xa", 1,
        read=nbytes(x) + _total(ds) + _total(As) + _once(words),
        written=nbytes(f["d_out"]) + _total(f["outs"]),
        flops=4 * f["M"] * f["K"] * sum(f["ranks"]),
        unit=unit_of(x.dtype),
        requested=nbytes(x) + strips * _total(ds) + blocks * _total(As) + _total(words),
    )  # fmt: skip


def _low_rank(f: Facts) -> tuple[int, int, int]:
    """(read, requested, flops) of the part that expand and gemm share: Ls, Rs, words, bias."""
    tiles_m, tiles_n = _cdiv(f["M"], f["BLOCK_M"]), _cdiv(f["N"], f["BLOCK_N"])
    left, right, bias = _total(f["Ls"]), _total(f["Rs"]), nbytes(f["bias"])
    return (
        left + right + _once(f["words"]) + bias,
        left * tiles_n + right * tiles_m + _total(f["words"]) + bias * tiles_m,
        2 * f["M"] * f["N"] * sum(f["ranks"]),
    )


def _expand(f: Facts) -> Traffic:
    read, requested, flops = _low_rank(f)
    add = nbytes(f["add"])
    unit = unit_of(f["Ls"][0].dtype)
    return Traffic("expand", 1, read + add, nbytes(f["out"]), flops, unit, requested + add)


def _gemm(f: Facts) -> Traffic:
    read, requested, flops = _low_rank(f)
    xs, ws = _total(f["xs"]), _total(f["ws"])
    tiles_m, tiles_n = _cdiv(f["M"], f["BLOCK_M"]), _cdiv(f["N"], f["BLOCK_N"])
    x = f["xs"][0]
    return Traffic(
        "gemm", 1,
        read=read + _once(f["xs"]) + _once(f["ws"]) + nbytes(f["gain"]),
        written=nbytes(f["y"]) + nbytes(f["v"]),
        flops=flops + 2 * f["M"] * f["N"] * sum(f["Ks"]),
        unit=unit_of(getattr(x, "base", x).dtype),
        requested=requested + xs * tiles_n + ws * tiles_m + nbytes(f["gain"]) * tiles_m,
    )  # fmt: skip


def _norm(f: Facts) -> Traffic:
    w, a, b, (blocks, split) = f["w"], nbytes(f["a"]), nbytes(f["b"]), f["grid"]
    return Traffic(
        "norm", 1,
        read=nbytes(w) + a + b,
        written=nbytes(f["out"]),
        flops=f["N"] * f["K"] * (2 * f["R"] + 4),
        unit=unit_of(w.dtype),
        requested=nbytes(w) + a * blocks + b * split,
    )  # fmt: skip


def _root(f: Facts) -> Traffic:
    read = nbytes(f["partials"])
    return Traffic("root", 1, read, nbytes(f["out"]), requested=read)


def _scale_grad(f: Facts) -> Traffic:
    row, (_, split) = nbytes(f["gain"]) + nbytes(f["bias"]), f["grid"]
    read = nbytes(f["dy"]) + nbytes(f["v"])
    return Traffic(
        "scale_grad", 1,
        read=read + row,
        written=nbytes(f["dz"]) + nbytes(f["sums"]),
        flops=4 * f["M"] * f["N"],
        unit="fp32",
        requested=read + row * split,
    )  # fmt: skip


def _decode(f: Facts) -> Traffic:
    """The decode kernels."""
    x, w, s, a, b = f["x"], f["w"], f["s"], nbytes(f["a"]), nbytes(f["b"])
    M, (programs,) = f.get("M", 1), f["grid"]
    N, K, R = f["N"], f["K"], f["R"]
    low = (2 * M * K * R * programs if s is None else 0) + 2 * M * N * R
    return Traffic(
        "decode", 1,
        read=nbytes(x) + nbytes(w) + a + b + nbytes(s) + nbytes(f["bias"]),
        written=nbytes(f["y"]),
        flops=2 * M * N * K + low,
        unit="fp32" if M == 1 else unit_of(x.dtype),
        requested=nbytes(w) + b + programs * (nbytes(x) + a + nbytes(s)) + nbytes(f["bias"]),
    )  # fmt: skip


def _mixed(f: Facts) -> Traffic:
    """A batch that names adapters. What is read depends on the index, which is data: counted is
    the worst, every tile meeting as many of the largest adapters as it touches samples."""
    x, w, index, ranks = f["x"], f["w"], f["index"], [r // 16 for r in f["ranks"]]
    M, N, K, T = f["M"], f["N"], f["K"], f["T"]
    tiles_m, tiles_n = _cdiv(M, f["BLOCK_M"]), _cdiv(N, f["BLOCK_N"])

    def lanes(rows: int) -> int:
        return sum(sorted(ranks)[-(_cdiv(rows - 1, T) + 1) :])

    here, all_of = lanes(min(M, f["BLOCK_M"])), lanes(M)
    a, b = K * f["As"][0].element_size(), N * f["Bs"][0].element_size()
    walks = max(1, _cdiv(here, f["BLOCK_R"]))  # X is walked once for each chunk of lanes
    once = nbytes(w) + nbytes(f["bias"])
    return Traffic(
        "mixed", 1,
        read=nbytes(x) + once + nbytes(index) + all_of * (a + b),
        written=nbytes(f["y"]),
        flops=2 * M * N * K + 2 * M * here * (K * tiles_n + N),
        unit=unit_of(x.dtype),
        requested=tiles_n * (walks * nbytes(x) + nbytes(index) + tiles_m * here * a)
        + tiles_m * (once + here * b),
    )  # fmt: skip


def _pairs(f: Facts) -> int:
    """(query, key) pairs of one head that see each other; an offset on the device counts as its
    default, padding and rows without a prefix as seen."""
    T, S, P = f["T"], f["S"], f["P"]
    if not f["CAUSAL"]:
        return T * (S + P)
    offset = f["q_offset"] if f["q_offset_at"] is None else S - T
    total = 0
    for t in range(T):
        last = P + min(S, offset + t + 1)
        first = max(0, P + offset + t + 1 - f["window"]) if f["WINDOW"] else 0
        total += max(0, last - first)
    return total


def _sources(f: Facts) -> tuple[int, int, int]:
    """Bytes of the own keys and values, of the prefix's, and of the small things beside them."""
    own, prefix = nbytes(f["k"]) + nbytes(f["v"]), nbytes(f["prefix_key"]) * 2
    rest = _total(f[n] for n in ("keep", "no_prefix", "q_offset_at"))
    return own, prefix, rest


def _per_program(f: Facts, rows: int) -> int:
    """Bytes of keys and values that all programs with a tile of ``rows`` query rows ask for."""
    B, H, T, _ = f["q"].shape
    size = 2 * f["D"] * f["q"].element_size()
    offset = f["q_offset"] if f["q_offset_at"] is None else f["S"] - T
    keys = 0
    for t0 in range(0, T, rows):
        last = min(t0 + rows, T) - 1
        seen = min(f["S"], offset + last + 1) if f["CAUSAL"] else f["S"]
        first = f["P"] + offset + t0 - f["window"] + 1 if f["WINDOW"] else 0
        hidden = max(0, first) // f["BLOCK_N"] * f["BLOCK_N"]
        keys += max(0, seen + f["P"] - hidden)
    return B * H * keys * size


def _attend(f: Facts) -> Traffic:
    q, (own, prefix, rest) = nbytes(f["q"]), _sources(f)
    B, H, _, D = f["q"].shape
    return Traffic(
        "attend", 1,
        read=q + own + prefix + rest + nbytes(f["sinks"]),
        written=nbytes(f["o"]) + nbytes(f["lse"]),
        flops=4 * B * H * D * _pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=q + rest + _per_program(f, f["BLOCK_M"]),
    )  # fmt: skip


def _prefix_decode(f: Facts) -> Traffic:
    q, (own, prefix, rest) = nbytes(f["q"]), _sources(f)
    B, H, _, D = f["q"].shape
    splits = f["SPLITS_S"] + (f["SPLITS_P"] if f["P"] else 0)
    return Traffic(
        "prefix_decode", 1,
        read=q + own + prefix + rest,
        written=nbytes(f["part_o"]) + nbytes(f["part_lse"]),
        flops=4 * B * H * D * _pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=q * splits + own * f["BLOCKS_S"] + prefix * f["BLOCKS_P"] + rest,
    )  # fmt: skip


def _merge(f: Facts) -> Traffic:
    read = nbytes(f["part_o"]) + nbytes(f["part_lse"])
    written = nbytes(f["o"]) + nbytes(f["lse"])
    return Traffic("merge", 1, read, written, requested=read + nbytes(f["part_lse"]))


def _grad_rows(f: Facts) -> Traffic:
    own, prefix, rest = _sources(f)
    rows = nbytes(f["q"]) + nbytes(f["o"]) + nbytes(f["grad_o"]) + nbytes(f["lse"])
    B, H, _, D = f["q"].shape
    return Traffic(
        "grad_rows", 1,
        read=rows + own + prefix + rest,
        written=nbytes(f["grad_q"]) + nbytes(f["delta"]),
        flops=6 * B * H * D * _pairs(f),
        unit=unit_of(f["q"].dtype),
        requested=rows + rest + _per_program(f, f["BLOCK_M"]),
    )  # fmt: skip


def _grad_keys(f: Facts) -> Traffic:
    """The rows are walked once for the own keys and once for the prefix, by programs that share
    them as far as they run together."""
    own, prefix, rest = _sources(f)
    rows = nbytes(f["q"]) + nbytes(f["grad_o"]) + nbytes(f["lse"]) + nbytes(f["delta"])
    B, H, _, D = f["q"].shape
    tiles_p, tiles_s = _cdiv(f["P"], f["BLOCK_N"]), _cdiv(f["S"], f["BLOCK_N"])
    gradients = ("grad_k", "grad_v", "grad_pk", "grad_pv")
    return Traffic(
        "grad_keys", 1,
        read=rows * (bool(tiles_p) + bool(tiles_s)) + own + prefix + rest,
        written=_total(f[name] for name in gradients),
        flops=8 * B * H * D * _pairs(f),
        unit=unit_of(f["q"].dtype),
        # half of what lies under the diagonal is skipped in whole tiles; bounded by all of it
        requested=rows * (tiles_p + tiles_s) + own + prefix + rest,
    )  # fmt: skip


_KERNELS: dict[str, Callable[[Facts], Traffic]] = {
    "_bits_kernel": _bits,
    "_shrink_kernel": _shrink,
    "_shrink_expand_kernel": _shrink_expand,
    "_sum_kernel": _sum,
    "_grad_sb_kernel": _grad_sb,
    "_grad_a_kernel": _grad_a,
    "_grad_xa_kernel": _grad_xa,
    "_expand_kernel": _expand,
    "_gemm_kernel": _gemm,
    "_norm_kernel": _norm,
    "_root_kernel": _root,
    "_scale_grad_kernel": _scale_grad,
    "_gemv_kernel": _decode,
    "_rows_kernel": _decode,
    "_mixed_kernel": _mixed,
    "_attend_kernel": _attend,
    "_decode_kernel": _prefix_decode,
    "_merge_kernel": _merge,
    "_grad_rows_kernel": _grad_rows,
    "_grad_keys_kernel": _grad_keys,
}


def traffic(launch: Any) -> Traffic:
    """Traffic of one ``peftkern.kernels.common.Launch``; its tensors may be on the meta device.

    Raises:
        KeyError: the kernel has no rule here.
    """
    kernel = launch.kernel.__name__
    if kernel not in _KERNELS:
        known = ", ".join(_KERNELS)
        raise KeyError(f"kernel {kernel} has no traffic rule; benchmarks.cost.kernels has {known}")
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))  # constants follow
    return _KERNELS[kernel](arguments | launch.meta | {"grid": launch.grid})
