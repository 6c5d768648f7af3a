"""``Kept``: restores a weight, bit for bit, to its value before adapters were merged into it.

W' = round(W + P) with P = B A cannot be undone by subtraction alone: where W' has a larger exponent
than W, low bits of W are lost. A copy of W would double the memory of the adapted weights. But
round(W' - P) is W elsewhere, so that the elements of W are kept for which it is not.

That holds if P has the same bits both times, on another device, with another number of threads, and
after the adapter was trained or deleted. So P is a product of copies, by :mod:`.exact_product`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .exact_product import ExactProduct, Part

logger = logging.getLogger("peftkern")

# Elements that are processed together: on a CPU so few that all intermediate results of a thread
# stay in its cache, elsewhere so many that starting operations costs little.
CPU_STEP, STEP = 2**17, 2**22
SUBTRACTED = "its adapters are taken out by subtraction"
Factors = tuple[Tensor, Tensor, float]  # left [..., M, r], right [..., r, N], scaling
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
    rest = int(words[whole:].sum(dtype=torch.int64)) if whole < words.numel() else 0
    return int(words[:whole].view(torch.int64).sum()) + rest


class Step(NamedTuple):
    """The elements of a weight, seen as a product's matrices, that are processed together."""

    part: Part
    start: int  # the number of the first one


def steps(x: Tensor, end: int | None = None) -> Iterator[Step]:
    """The steps in which ``x`` [M, N] or [E, M, N] is processed, in the order of its elements.

    With ``end``, those before the one that starts with that element.
    """
    for step in _all_steps(x):
        if step.start == end:
            return
        yield step


def _all_steps(x: Tensor) -> Iterator[Step]:
    size = CPU_STEP * torch.get_num_threads() if x.device.type == "cpu" else STEP
    rows, columns = x.shape[-2:]
    many = max(1, size // max(1, columns))
    if x.dim() == 2:
        for row in range(0, rows, many):
            yield Step((slice(row, row + many),), row * columns)
    elif rows < many:
        several = many // max(1, rows)
        for one in range(0, len(x), several):
            yield Step((slice(one, one + several), slice(None)), one * rows * columns)
    else:
        for one in range(len(x)):
            for row in range(0, rows, many):
                yield Step((one, slice(row, row + many)), (one * rows + row) * columns)


class Kept:
    """A record that restores a weight from what merging has made of it.

    :meth:`seal` completes it once the merged weight is there.
    """

    bias: Tensor | None = None
    lost = "unmerging loses that change"

    def seal(self, after: Tensor) -> None:
        """Note what the merged weight is, to tell later whether other code has changed it."""
        self.dtype, self.sum = after.dtype, _check_sum(after)

    @torch.no_grad()
    def restored(self, after: Tensor) -> Tensor:
        """The weight from before, bit for bit, on the device of ``after``.

        When other code wrote into ``after`` meanwhile, that change is kept and the adapters are
        subtracted; of what is no sum of products the change is lost. A warning is logged.
        """
        changed = after.dtype != self.dtype or _check_sum(after) != self.sum
        if changed:
            logger.warning("a merged weight was changed; %s", self.lost)
        return self._restored(after, changed)

    def _restored(self, after: Tensor, changed: bool) -> Tensor:
        raise NotImplementedError

    @property
    def tensors(self) -> list[Tensor]:
        """What is held for the weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """The memory of this record in bytes."""
        return sum(t.nbytes for t in (*self.tensors, *(() if self.bias is None else (self.bias,))))


class KeptCopy(Kept):
    """A copy of the weight ``before``; copies of factors (left, right, scaling) that were added."""

    def __init__(self, before: Tensor, factors: Sequence[Factors] = ()) -> None:
        self.copy = before.clone()
        self.factors = [(left.clone(), right.clone(), scale) for left, right, scale in factors]
        if factors:
            self.lost = SUBTRACTED

    def _restored(self, after: Tensor, changed: bool) -> Tensor:
        if not (changed and self.factors):
            return self.copy.to(after.device, after.dtype)
        rest = at_least_float32(after).clone()
        for left, right, scale in self.factors:
            rest -= (left @ right).mul_(scale).to(rest).view(rest.shape)
        return rest.to(after.dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.copy, *(t for left, right, _ in self.factors for t in (left, right))]


class KeptSum(Kept):
    """Adds the product of two factors to a weight, and takes it out again.

    Memory: 6 bytes for each element of a 16-bit weight whose low bits the merge has lost, 8 bytes
    for float32 (their share is about that of the update in the weight), never more than a copy; and
    4 r (M + N) bytes.

    Args:
        left, right: the finite factors [..., M, r] and [..., r, N].
    """

    lost = SUBTRACTED

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.product = ExactProduct(left, right)
        # (numbers of elements, their bits) where the prediction is wrong, or all of the weight
        self.listed: list[tuple[Tensor, Tensor]] = []
        self.copy: Tensor | None = None

    def add(self, weight: Tensor) -> None:
        """Add the product to ``weight`` [..., M, N], contiguous and of 2 or 4 bytes an element.

        After an error the weight is as it was.
        """
        product = self.product.on(weight.device)
        count = 0  # of elements that are listed
        last: tuple[Step, Tensor] | None = None  # the last step that may be written, its new value
        try:
            for step in steps(weight):
                before = weight[step.part]
                update = product(step.part)
                after = torch.add(before, update).to(before.dtype)
                if self.copy is None:
                    guess = torch.sub(after, update, out=update).to(before.dtype)
                    count += self._list(step.start, before, guess)
                    end = step.start + before.numel()
                    if count * (4 + before.element_size()) > end * before.element_size():
                        self._copy(weight, step.start)
                last = step, after
                before.copy_(after)
            if self.listed:
                numbers, values = zip(*self.listed, strict=True)
                self.listed = [(torch.cat(numbers), torch.cat(values))]
        except BaseException:
            if last is not None:
                step, after = last
                weight[step.part].copy_(after)
                self._take_out(weight, weight, step.start + after.numel())
            raise

    def _list(self, start: int, before: Tensor, guess: Tensor) -> int:
        """List the elements from number ``start`` on whose guess is wrong; returns how many."""
        bits = as_integers(before).view(-1)
        found = _differing(bits, as_integers(guess).view(-1))
        if len(found):
            values = bits.index_select(0, found)
            self.listed.append(((found + start).to(_numbers(start + len(bits))), values))
        return len(found)

    def _copy(self, weight: Tensor, end: int) -> None:
        """Keep a copy of the weight, in which the elements before number ``end`` are merged."""
        copy = weight.clone()
        self._take_out(copy, copy, end)
        self.copy, self.listed = copy, []

    def _restored(self, after: Tensor, changed: bool) -> Tensor:
        merged = after.contiguous().view(self.product.shape)
        if self.copy is not None and not changed:
            return self.copy.to(after.device).view(after.shape)
        before = torch.empty_like(merged)
        self._take_out(merged, before, None, not changed)
        return before.view(after.shape)

    def _take_out(self, merged: Tensor, out: Tensor, end: int | None, exact: bool = True) -> None:
        """Write into ``out`` what the elements of ``merged`` before number ``end`` were."""
        if self.copy is not None and exact:
            out.view(-1)[:end] = self.copy.view(-1)[:end]
            return
        product = self.product.on(merged.device)
        for step in steps(merged, end):
            update = product(step.part)
            after = merged[step.part]
            out[step.part] = torch.sub(after, update, out=update)
        bits = as_integers(out).view(-1)
        for numbers, values in self.listed if exact else ():
            if end is not None:
                numbers, values = numbers[numbers < end], values[numbers < end]
            bits[numbers.to(bits.device).long()] = values.to(bits.device)

    @property
    def tensors(self) -> list[Tensor]:
        whole = [] if self.copy is None else [self.copy]
        listed = [t for pair in self.listed for t in pair]
        return [*whole, *listed, *self.product.tensors]


def _numbers(count: int) -> torch.dtype:
    """The type of elements' numbers below ``count``."""
    return torch.int32 if count < 2**31 else torch.int64


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """The indices where the integers ``a`` and ``b`` [n] differ, in ascending order."""
    x = torch.bitwise_xor(a, b)
    several = 8 // x.element_size()
    if len(x) % several == 0:  # where few differ, words of 8 bytes are searched faster
        words = x.view(torch.int64).nonzero().squeeze(1)
        if len(words) * several * 8 < len(x):
            found = x.view(-1, several).index_select(0, words).nonzero()
            return words.index_select(0, found[:, 0]).mul_(several).add_(found[:, 1])
    return x.nonzero().squeeze(1)
