"""The kernels' results as float64 torch formulas, and the layout of the packed dropout mask.

Shapes: X [M, K], W [N, K], A [r, K], B [N, r], S [M, r], Y [M, N]; a mask is bool [M, K], True
where an element is kept. The scale of an adapter (alpha / r, times 1 / (1 - p) with dropout) is
applied once in each direction: in S and in dS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64)


def _masked(t: Tensor, keep: Tensor | None) -> Tensor:
    return t if keep is None else t * keep.to(t.dtype)


def shrink(x: Tensor, a: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    """S [M, r] = scale * (X masked) Aᵀ."""
    return scale * (_masked(_wide(x), keep) @ _wide(a).T)


def expand(s: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """S Bᵀ + bias, [M, N]."""
    y = _wide(s) @ _wide(b).T
    return y if bias is None else y + _wide(bias)


def linear(
    x: Tensor,
    w: Tensor,
    s: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Y [M, N] = X Wᵀ + S Bᵀ + bias."""
    y = _wide(x) @ _wide(w).T
    if s is not None and b is not None:
        y = y + _wide(s) @ _wide(b).T
    return y if bias is None else y + _wide(bias)


def low_rank_grad_input(
    ds: Sequence[Tensor], a: Sequence[Tensor], keep: Sequence[Tensor | None]
) -> Tensor:
    """The sum over adapters of mask_i * (dS_i A_i), [M, K]."""
    parts = (_masked(_wide(d) @ _wide(v), m) for d, v, m in zip(ds, a, keep, strict=True))
    return sum(parts, start=next(parts))


def grad_input(
    dy: Sequence[Tensor],
    w: Sequence[Tensor],
    ds: Sequence[Tensor],
    a: Sequence[Tensor],
    keep: Sequence[Tensor | None],
) -> Tensor:
    """dX [M, K] = sum over projections of dY_i W_i + mask_i * (dS_i A_i)."""
    base = sum(_wide(d) @ _wide(v) for d, v in zip(dy, w, strict=True))
    return base + low_rank_grad_input(ds, a, keep)


def grad_s(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """dS [M, r] = scale * dY B, the gradient of X Aᵀ with the scale in it."""
    return scale * (_wide(dy) @ _wide(b))


def grad_b(dy: Tensor, s: Tensor) -> Tensor:
    """dB [N, r] = dYᵀ S."""
    return _wide(dy).T @ _wide(s)


def grad_a(x: Tensor, ds: Tensor, keep: Tensor | None = None) -> Tensor:
    """dA [r, K] = dSᵀ (X masked)."""
    return _wide(ds).T @ _masked(_wide(x), keep)


def mixed(
    x: Tensor,
    w: Tensor,
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
    index: Sequence[int],
    bias: Tensor | None = None,
) -> Tensor:
    """Y [M, N] of a batch whose samples name different adapters.

    Sample j, rows j T to j T + T - 1 with T = M / len(index), has the update scale_i (X A_iᵀ) B_iᵀ
    of adapter i = index[j]; it has none for -1 and for an adapter without weights.
    """
    y = linear(x, w, bias=bias)
    T = x.shape[0] // max(len(index), 1)
    for j, i in enumerate(index):
        a, b = (As[i], Bs[i]) if i >= 0 else (None, None)
        if a is not None and b is not None:
            part = slice(j * T, j * T + T)
            y[part] += expand(shrink(x[part], a, scales[i]), b)
    return y


def pack_bits(keep: Tensor) -> Tensor:
    """Pack bool [M, K] into int32 words [M, ceil(K / 32)].

    Bit j of word w is column 32 w + j; unused bits are 0.
    """
    if keep.dtype != torch.bool or keep.dim() != 2:
        raise TypeError(f"keep is {keep.dtype} {tuple(keep.shape)}; allowed: torch.bool [M, K]")
    M, K = keep.shape
    words = -(-K // 32)
    octets = torch.nn.functional.pad(keep, (0, 32 * words - K)).reshape(M, words, 4, 8)
    # eight bools as one int64 have a bit in each byte; the product collects them in the top byte
    lanes = octets.contiguous().view(torch.int64).reshape(M, words, 4)
    octet = ((lanes * 0x0102040810204080) >> 56) & 0xFF  # [M, words, 4]
    return octet.to(torch.uint8).view(torch.int32).reshape(M, words)


def unpack_bits(words: Tensor, K: int) -> Tensor:
    """Unpack int32 words [M, ceil(K / 32)] to bool [M, K], the inverse of :func:`pack_bits`."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != -(-K // 32):
        raise TypeError(
            f"words is {words.dtype} {tuple(words.shape)}; "
            f"allowed: torch.int32 [M, {-(-K // 32)}] for K = {K}"
        )
    shift = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shift) & 1).bool().flatten(1)[:, :K]


class Digits(NamedTuple):
    """A keep probability as (threshold + fraction / 2**31) / 2**digits.

    ``digits`` binary digits are drawn for each column, and what is left for each word of 32.
    """

    threshold: int
    digits: int
    fraction: int


def digits_of(p: float) -> Digits:
    """The digits of the keep probability 1 - p, exact to 2**-35.

    A word's columns share the last part, so two of them correlate by its variance over p (1 - p);
    the digits are the fewest, a multiple of 4, with which that is at most 1e-4.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}; allowed: 0 <= p < 1")
    for digits in range(4, 33, 4):
        threshold, rest = divmod((1.0 - p) * 2**digits, 1.0)
        if rest * (1.0 - rest) <= 1e-4 * p * (1.0 - p) * 4**digits:
            break
    fraction = round(rest * 2**31)
    if fraction == 2**31:
        threshold, fraction = threshold + 1, 0
    return Digits(int(threshold), digits, fraction)


# odd multipliers of row, word, seed (low and high half) and group
SPREAD = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)


def shared_draw(seed: int | Tensor, row: Tensor, word: Tensor, group: int) -> Tensor:
    """A number of 31 bits for each word, by which its columns draw the last part of p together.

    Neighbours in a row or column get numbers far apart, and a random seed shifts all of them.
    """
    low = 0xFFFFFFFF
    of_row, of_word, of_low, of_high, of_group = SPREAD
    shift = ((seed & low) * of_low + ((seed >> 32) & low) * of_high + group * of_group) & low
    return ((row * of_row + word * of_word + shift) & low) >> 1


def philox_words(
    seed: int | Tensor, row: Tensor, word: Tensor, call: int, group: int, rounds: int
) -> list[Tensor]:
    """Four random words (32 bits, as int64) of Philox-4x32 for each row and word.

    The counter is (word, row, call, group), the key the seed.
    """
    low = 0xFFFFFFFF
    row, word = torch.broadcast_tensors(row.to(torch.int64), word.to(torch.int64))
    c0, c1 = word & low, row & low
    c2, c3 = torch.full_like(c0, call), torch.full_like(c0, group)
    k0, k1 = seed & low, (seed >> 32) & low

    def product(constant: int, c: Tensor) -> tuple[Tensor, Tensor]:
        # 32 x 32 -> 64 bits by halves, as one int64 product would overflow into the sign
        lo = constant * (c & 0xFFFF)
        hi = constant * (c >> 16) + (lo >> 16)
        return hi >> 16, ((hi & 0xFFFF) << 16) | (lo & 0xFFFF)

    for _ in range(rounds):
        hi_a, lo_a = product(0xD2511F53, c0)
        hi_b, lo_b = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def reference_bits(
    M: int, K: int, p: float, seed: int | Tensor, *, group: int = 0, rounds: int = 7
) -> Tensor:
    """The words of :func:`.bits.dropout_bits`, int32 [M, ceil(K / 32)], from torch alone.

    For tests and for use without Triton (int64 arithmetic). A seed that is a tensor is not read on
    the host; the words are made on its device.
    """
    threshold, digits, fraction = digits_of(p)
    words = -(-K // 32)
    device = seed.device if isinstance(seed, Tensor) else None
    row = torch.arange(M, device=device)[:, None]
    word = torch.arange(words, device=device)[None, :]
    keep = torch.where(shared_draw(seed, row, word, group) < fraction, 0xFFFFFFFF, 0)
    for call in range(digits // 4):
        for j, fresh in enumerate(philox_words(seed, row, word, call, group, rounds)):
            keep = fresh | keep if threshold >> (4 * call + j) & 1 else fresh & keep
    if threshold >> digits:
        keep = torch.full_like(keep, 0xFFFFFFFF)
    left = (K - 32 * word).clamp(0, 32)
    keep = keep & ((1 << left) - 1)
    return torch.where(keep >= 2**31, keep - 2**32, keep).to(torch.int32)
