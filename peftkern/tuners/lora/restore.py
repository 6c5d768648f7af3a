"""``Kept``: restores a weight, bit for bit, to its value before adapters were merged into it.

W' = round(W + B A) cannot be undone by subtraction alone: where W' has a larger exponent than W,
low bits of W are lost. A copy of W would double the memory of the adapted weights. Instead two
things are kept: what is needed to predict W from W' by subtraction, and the distance of each
element of W from its prediction. Distances are counted in steps of the dtype, which is the
difference of the bits as integers. In 16 bits most distances are 0, in 32 bits most fit in a byte.

The prediction must give the same bits later, on another device, with another number of threads, and
after the adapter was trained or deleted. So it uses copies of the factors, split into integers so
small that their products and sums are exact in float32 in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("peftkern")

BITS = 7  # of one piece: |piece| <= 64, so a product is <= 2^12
BLOCK = 2**24  # number of elements that are processed together
PIECES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 3}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32; unchanged when it is float64."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def as_integers(x: Tensor) -> Tensor:
    """The bits of ``x`` as integers of the same size and shape."""
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def _check_sum(x: Tensor) -> int:
    """A checksum of the bits of ``x``, the same on every device."""
    words = as_integers(x).flatten()
    several = 8 // x.element_size()  # elements added as one int64, which is many times faster
    whole = words.numel() // several * several
    if words.storage_offset() % several:
        words = words.clone()
    rest = int(words[whole:].sum(dtype=torch.int64))
    return int(words[:whole].view(torch.int64).sum()) + rest


def _rows(x: Tensor) -> list[slice]:
    """Slices of the first dimension with about ``BLOCK`` elements each."""
    step = max(1, BLOCK // max(1, x[:1].numel()))
    return [slice(i, i + step) for i in range(0, len(x), step)]


class _Product:
    """The product [..., M, N] of [..., M, r] and [..., r, N], with the same bits on every device.

    Its precision is about ``pieces`` * 7 bits.
    """

    def __init__(self, left: Tensor, right: Tensor, pieces: int) -> None:
        self.left, self.left_scale = self._cut(left, -1, pieces)
        self.right, self.right_scale = self._cut(right, -2, pieces)

    @staticmethod
    def _cut(x: Tensor, over: int, pieces: int) -> tuple[list[Tensor], Tensor]:
        """(int8 pieces, scale) with x ≈ scale · Σ piece_i · 2^(-7 i); the scale is a power of 2."""
        largest = x.abs().amax(over, keepdim=True)
        # limited, so that products of scaled pieces are normal numbers
        exponent = torch.frexp(largest).exponent.clamp(-50, 50)
        scale = torch.ldexp(torch.ones_like(largest), exponent - (BITS - 1))
        rest, found = x / scale, []
        for _ in range(pieces):
            piece = rest.round().clamp(-64, 64)
            found.append(piece.to(torch.int8))
            rest = (rest - piece) * 2**BITS
        return found, scale

    def rows(self, rows: slice, device: torch.device) -> Tensor:
        """The product's ``rows`` (of its first dimension), in float32."""
        stacked = self.left[0].dim() > 2  # a batch: one product for each index of dimension 0
        over = rows if stacked else slice(None)
        total: Tensor | None = None
        for order in range(len(self.left)):
            a = torch.cat([piece[rows] for piece in self.left[: order + 1]], -1)
            b = torch.cat([piece[over] for piece in self.right[: order + 1][::-1]], -2)
            # scaling whole rows and columns by powers of 2 changes no rounding
            a = a.to(device) * (self.left_scale[rows] * 2.0 ** (-BITS * order)).to(device)
            part = a @ (b.to(device) * self.right_scale[over].to(device))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.left, *self.right, self.left_scale, self.right_scale]


class _Block:
    """The former values of a block of rows, relative to a guess that can be computed again."""

    def __init__(self, before: Tensor, guess: Tensor | None) -> None:
        self.copy: Tensor | None = None
        self.index = self.value = self.near = None
        count, item = before.numel(), before.dtype.itemsize
        if guess is None:
            self.copy = before.clone()
            return
        distance = (as_integers(before) - as_integers(guess)).flatten()
        near = distance.to(torch.int8)
        far = near != distance
        near_cost = count + int(far.count_nonzero()) * (4 + item)
        few_cost = int(distance.count_nonzero()) * (4 + item)
        if min(near_cost, few_cost) >= count * item:
            self.copy = before.clone()
            return
        if near_cost < few_cost:
            self.near = near
            distance -= near  # a multiple of 256; 0 where the distance fits in a byte
        index = distance.nonzero().squeeze(1)
        self.index, self.value = index.to(torch.int32), distance[index]

    def restored(self, guess: Tensor | None) -> Tensor:
        if guess is None or self.index is None or self.value is None:
            assert self.copy is not None
            return self.copy
        bits = as_integers(guess).flatten()
        if self.near is not None:
            bits += self.near.to(bits.device)
        bits[self.index.to(bits.device).long()] += self.value.to(bits.device)
        return bits.view(guess.dtype).reshape(guess.shape)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.copy, self.index, self.value, self.near) if t is not None]


class Kept:
    """A record that restores the weight ``before`` from the weight ``after``.

    Memory: for 16-bit weights about r (M + N) · 2 bytes, and 6 bytes for each element whose low
    bits the merge has lost (their share is about that of the update in the weight). For float32 one
    byte for each element. Never more than a copy and the factors. A copy is kept for float64
    weights, for a variant whose result is not a sum, and for adapters that are not finite. Some
    float32 copies of ``BLOCK`` elements are needed while the record is made and used.

    Args:
        before: the weight without the adapters.
        after: the weight with them, same shape and dtype.
        factors: (left [..., r], right [r, ...], scaling) of each adapter whose scaled product was
            added; None when ``after`` is not such a sum.
    """

    bias: Tensor | None = None

    def __init__(
        self,
        before: Tensor,
        after: Tensor,
        factors: Sequence[tuple[Tensor, Tensor, float]] | None,
    ) -> None:
        self.dtype, self.sum = after.dtype, _check_sum(after)
        self.product = self._product(factors) if factors else None
        self.blocks = [
            (rows, _Block(before[rows], self._guess(after, rows))) for rows in _rows(after)
        ]

    def _product(self, factors: Sequence[tuple[Tensor, Tensor, float]]) -> _Product | None:
        pieces = PIECES.get(self.dtype)
        left = torch.cat([at_least_float32(a) * s for a, _, s in factors], -1).float()
        right = torch.cat([at_least_float32(b) for _, b, _ in factors], -2).float()
        if pieces is None or left.shape[-1] * pieces * 2 ** (2 * BITS - 2) >= 2**24:
            return None
        if not bool(left.isfinite().all() and right.isfinite().all()):
            return None
        return _Product(left, right, pieces)

    def _guess(self, after: Tensor, rows: slice) -> Tensor | None:
        """The prediction of ``before[rows]`` by subtraction; None without a product."""
        if self.product is None:
            return None
        part = after[rows]
        update = self.product.rows(rows, part.device).reshape(part.shape)
        return torch.sub(part, update, out=update).to(part.dtype)

    @torch.no_grad()
    def restored(self, after: Tensor) -> Tensor:
        """``before``, bit for bit, on the device of ``after``.

        When other code wrote into ``after`` meanwhile, that change is kept and the adapters are
        subtracted; without factors the change is lost. A warning is logged.
        """
        changed = after.dtype != self.dtype or _check_sum(after) != self.sum
        if changed:
            logger.warning(
                "a merged weight was changed; %s",
                "unmerging loses that change"
                if self.product is None
                else "its adapters are taken out by subtraction",
            )
        before = torch.empty_like(after)
        for rows, block in self.blocks:
            guess = self._guess(after, rows)
            by_guess = changed and guess is not None
            before[rows] = guess if by_guess else block.restored(guess)  # type: ignore[assignment]
        return before

    @property
    def nbytes(self) -> int:
        """The memory of this record in bytes."""
        tensors = [t for _, block in self.blocks for t in block.tensors]
        tensors += self.product.tensors if self.product is not None else []
        tensors += [] if self.bias is None else [self.bias]
        return sum(t.nbytes for t in tensors)
