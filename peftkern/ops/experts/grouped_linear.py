"""One linear of the experts with its adapters, on all sorted rows by torch's grouped products.

The formulas are those of :mod:`.loop_linear`. Products of factors have a group for each expert, or
in a mixed batch for each pair of an expert and an adapter; their ranks are filled up with zeros to
whole 16 bytes, which torch's kernels want.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..bits import unpack_bits
from ..torch_products import in_dtype
from .loop_linear import low_rank
from .parts import ExpertLinear, LinearGrads


class Groups(NamedTuple):
    """The groups of sorted rows."""

    tokens: Tensor  # [P]
    experts: Tensor  # int32 [E], the end of each expert's rows
    ends: Tensor  # int32, the end of each group; without choices the same
    adapter: Tensor | None  # [P], of a mixed batch; the number of adapters for none
    rest: Tensor | None  # bool [P, 1], the rows of no group, if there may be any


def grouped_mm_runs(x: Tensor) -> str | None:
    """The reason that torch has no grouped product for x's dtype and device, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"torch has no grouped product of {x.dtype}"
    if x.is_cuda:
        if x.dtype != torch.bfloat16:
            return f"torch's grouped product of {x.dtype} waits for the device too"
        if torch.cuda.get_device_capability(x.device) < (8, 0):
            return "torch's grouped product needs compute capability 8.0"
    return None


def aligned(weight: Tensor) -> bool:
    """True when rows of a weight [E, N, K], of X and of Y start at whole 16 bytes."""
    whole = 16 // weight.element_size()
    *outer, row = sorted(weight.stride(), reverse=True)
    sizes = (*outer, *weight.shape[1:])
    return row == 1 and not any(s % whole for s in sizes) and weight.data_ptr() % 16 == 0


class _Stack(NamedTuple):
    """Adapters whose products are made together: one, or all of a mixed batch."""

    members: list[int]
    A: Tensor  # [groups, r, K]
    B: Tensor  # [groups, N, r]
    factor: float | Tensor  # scale / (1 - p), or that of each row [P, 1]
    words: Tensor | None


class GroupedLinear:
    def __init__(self, part: ExpertLinear, x: Tensor, groups: Groups, words: Tensor | None) -> None:
        self.part, self.groups = part, groups
        self.low, _ = low_rank(part, x, groups.adapter is not None)
        n = len(part.factors)
        if groups.adapter is None:
            whole = [[i] for i in range(n) if part.factors[i].A.numel()]
        else:
            whole = [[*range(n)]] if any(f.A.numel() for f in part.factors) else []
        self.stacks = [self._stack(members, words) for members in whole]

    def _stack(self, members: list[int], words: Tensor | None) -> _Stack:
        (E, N, K), own = self.part.weight.shape, [self.part.factors[i] for i in members]
        mixed = self.groups.adapter is not None
        slots, least = len(own) + mixed, 16 // self.low.itemsize
        ranks = [f.rank(E) for f in own]
        r = -(-max(ranks) // least) * least
        like = self.part.weight
        make = like.new_empty if not mixed and ranks == [r] else like.new_zeros
        A, B = (make(shape, dtype=self.low) for shape in ((E, slots, r, K), (E, slots, N, r)))
        for i, (f, rank) in enumerate(zip(own, ranks, strict=True)):
            a, b = f.of_experts(E)
            A[:, i, :rank].copy_(a)
            B[:, i, :, :rank].copy_(b)
        factors = [f.scale / (1.0 - f.p) for f in own]
        factor: float | Tensor = factors[0]
        if self.groups.adapter is not None:
            table = torch.tensor([*factors, 0.0], dtype=self.low, device=like.device)
            factor = table[self.groups.adapter][:, None]
        if words is not None:
            words = words[0 if mixed else members[0]] if any(f.p for f in own) else None
        return _Stack(members, A.view(-1, r, K), B.view(-1, N, r), factor, words)

    def _rows(self, y: Tensor) -> Tensor:
        """y without what a grouped product leaves in rows of no group."""
        return y if self.groups.rest is None else y.masked_fill_(self.groups.rest, 0.0)

    def _dropped(self, stack: _Stack, x: Tensor) -> Tensor:
        x = in_dtype(self.low, x)
        return x if stack.words is None else self._mask(stack, x.shape[1]).mul_(x)

    def _mask(self, stack: _Stack, columns: int) -> Tensor:
        assert stack.words is not None
        return unpack_bits(stack.words, columns, self.low).contiguous()

    def bias_of_rows(self) -> Tensor | None:
        """[P, N]"""
        if self.part.bias is None:
            return None
        rows = torch.arange(len(self.groups.tokens), device=self.part.bias.device)
        expert = torch.searchsorted(self.groups.experts, rows, right=True)
        return self.part.bias[expert.clamp_(max=len(self.part.bias) - 1)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(Y [P, N], the stacks' S side by side) for sorted rows x [P, K]."""
        ends, made = self.groups.ends, []
        y = self._rows(grouped_mm(x, self.part.weight.transpose(1, 2), offs=self.groups.experts))
        if (bias := self.bias_of_rows()) is not None:
            y.add_(bias)
        total = in_dtype(self.low, y) if self.stacks else y
        for stack in self.stacks:
            s = grouped_mm(self._dropped(stack, x), stack.A.transpose(1, 2), offs=ends)
            s = self._rows(s).mul_(stack.factor)
            total.add_(self._rows(grouped_mm(s, stack.B.transpose(1, 2), offs=ends)))
            made.append(s)
        s_all = None if not made else made[0] if len(made) == 1 else torch.cat(made, 1)
        return in_dtype(x.dtype, total), s_all

    def no_grads(self) -> LinearGrads:
        return LinearGrads(None, [(None, None)] * len(self.part.factors))

    def backward(
        self,
        dy: Tensor,
        w: Tensor | None,
        x: Tensor | None,
        s: Tensor | None,
        wanted: Sequence[tuple[bool, bool]],
        wants_bias: bool,
        needs_x: bool,
    ) -> tuple[Tensor | None, LinearGrads]:
        """(dX [P, K] without w, the gradients); the arguments are those of the loop's linear."""
        ends = self.groups.ends
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(wanted)
        dx, dyl, at = None, in_dtype(self.low, dy), 0
        if needs_x:
            dx = self._rows(grouped_mm(dy, self.part.weight, offs=self.groups.experts))
            dx = in_dtype(self.low, dx) if self.stacks else dx
        for stack in self.stacks:
            r = stack.A.shape[1]
            wants_a = any(wanted[i][0] for i in stack.members)
            wants_b = any(wanted[i][1] for i in stack.members)
            dA = dB = None
            if wants_b:
                assert s is not None
                own = s[:, at : at + r] if w is None else s[:, at : at + r] * w.to(self.low)
                dB = _outer(dyl, own, ends)
            at += r
            if wants_a or needs_x:
                ds = self._rows(grouped_mm(dyl, stack.B, offs=ends)).mul_(stack.factor)
                if dx is not None:
                    update = self._rows(grouped_mm(ds, stack.A, offs=ends))
                    if stack.words is not None:
                        update.mul_(self._mask(stack, update.shape[1]))
                    dx.add_(update)
                if wants_a:
                    assert x is not None
                    ds = ds if w is None else ds.mul_(w)
                    dA = _outer(ds, self._dropped(stack, x), ends)
            self._part_grads(stack, dA, dB, wanted, pairs)
        dbias = self._bias_grad(dy, w) if wants_bias else None
        return None if dx is None else in_dtype(dy.dtype, dx), LinearGrads(dbias, pairs)

    def _part_grads(
        self,
        stack: _Stack,
        dA: Tensor | None,
        dB: Tensor | None,
        wanted: Sequence[tuple[bool, bool]],
        pairs: list[tuple[Tensor | None, Tensor | None]],
    ) -> None:
        """Put the gradients of each of the stack's adapters into ``pairs``, in PEFT's layout."""
        E, N, K = self.part.weight.shape
        for slot, i in enumerate(stack.members):
            f = self.part.factors[i]
            r, a, b = f.rank(E), None, None
            if dA is not None and wanted[i][0]:
                a = dA.view(E, -1, dA.shape[1], K)[:, slot, :r].reshape(r * E, K).to(f.A.dtype)
            if dB is not None and wanted[i][1]:
                b = dB.view(E, -1, N, dB.shape[2])[:, slot, :, :r].permute(1, 2, 0)
                b = b.contiguous().view(N, r * E).to(f.B.dtype)
            pairs[i] = a, b

    def _bias_grad(self, dy: Tensor, w: Tensor | None) -> Tensor:
        """[E, N]: the sum of w dY over each expert's rows."""
        least = 16 // dy.element_size()
        ones = dy.new_ones((len(dy), 1)) if w is None else w.to(dy.dtype)
        return _outer(ones.expand(-1, least).contiguous(), dy, self.groups.experts)[:, 0]


def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """aᵀ b of each group [groups, columns of a, columns of b]; zeros for one without rows."""
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    made = grouped_mm(a.t(), b, offs=ends)
    return made.masked_fill_(empty[:, None, None], 0.0)
