"""Dropout masks of the Triton backend: who draws them, and from which seed.

The mask is a function of a seed drawn from torch's CPU generator, which gradient checkpointing
restores: the recomputed forward drops the same elements. It has the distribution of torch's
dropout, not its elements.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from ..kernels.bits import Draw, dropout_bits
from ..kernels.common import INTERPRET
from ..kernels.reference import reference_bits
from ..utils.private import dispatch_depth
from . import torch_backend
from .device import capturing, is_loaded

# the number of each thread's last seed: a new tensor for each would take twice the time
_last = threading.local()


def _seed(x: Tensor) -> int | Tensor:
    if capturing(x):
        # replays of a graph get new numbers only from the device's own generator
        return torch.randint(2**62, (1,), device=x.device)
    seed: int
    if dispatch_depth():  # a selective checkpoint may keep the tensor: it must not be written again
        seed = torch.randint(2**62, (1,), device="cpu").item()  # type: ignore[assignment]
        return seed
    try:
        number = _last.number
    except AttributeError:
        with torch.inference_mode(False):  # a tensor made there cannot be written elsewhere
            number = _last.number = torch.empty(1, dtype=torch.int64, device="cpu")
    seed = number.random_(0, 2**62).item()  # randint's own numbers
    return seed


# (device, K, p) of masks for which this process has run, and so loaded, the kernel
_drawn: set[tuple[int, int, float]] = set()


def words_of(x: Tensor, ps: list[float]) -> list[Tensor | None]:
    """The packed mask of x [M, K] for each projection, None for those that drop nothing.

    With equal probabilities all are drawn in one launch. The capture of a CUDA graph may load no
    kernel: if the kernel has not made such a mask before, torch's own operations make the same
    words there.
    """
    if not any(ps):
        return [None] * len(ps)
    (M, K), index = x.shape, x.get_device()
    alike = len(ps) > 1 and len(set(ps)) == 1 and ps[0] > 0.0
    kinds = {(index, K, p) for p in ps if p > 0.0}
    if capturing(x) and not kinds <= _drawn:
        seeds = [_seed(x)] * len(ps) if alike else [_seed(x) if p > 0.0 else 0 for p in ps]
        return [
            reference_bits(M, K, p, seed, group=i if alike else 0) if p > 0.0 else None
            for i, (p, seed) in enumerate(zip(ps, seeds, strict=True))
        ]
    words: list[Tensor | None]
    if alike:
        words = list(dropout_bits(M, K, ps[0], _seed(x), groups=len(ps), device=x.device))
    else:
        words = [dropout_bits(M, K, p, _seed(x), device=x.device) if p > 0.0 else None for p in ps]
    if M:  # without rows nothing is launched
        _drawn.update(kinds)
    return words


_draw = tuple.__new__  # a NamedTuple's constructor calls it, at twice the cost
# facts of calls in which this process has loaded a shrink that draws its masks
_drew: set[tuple[Any, ...]] = set()


def to_draw(
    x: Tensor, ps: list[float], drawn: bool, facts: tuple[Any, ...]
) -> tuple[list[Tensor | None], Draw | None]:
    """(words, None), or (words that the shrink is to fill, what it draws them from).

    The shrink draws them where one launch makes all of S (``drawn``), and all have the same
    probability. Their elements are those of :func:`words_of`. A kernel that draws is another one
    than a kernel that reads; where it has not run yet for a call with these ``facts``, a capture
    does without.
    """
    p, count, (M, K) = ps[0], len(ps), x.shape
    if not (drawn and p and M and K) or (count > 1 and ps.count(p) < count):
        return words_of(x, ps), None
    call = (x.get_device(), K, p, facts)
    if not is_loaded(call, x, _drew):
        return words_of(x, ps), None
    width, draw = (K + 31) // 32, _draw(Draw, (p, _seed(x)))
    # torch's operations are those of words_of: selective checkpointing counts them
    if count == 1:
        return [torch.empty((M, width), dtype=torch.int32, device=x.device)], draw
    return list(torch.empty((count, M, width), dtype=torch.int32, device=x.device)), draw


def draw(M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The packed mask [M, ceil(K / 32)] of ``seed`` (int64, one element), on its device."""
    if not (seed.is_cuda or INTERPRET.value):
        return torch_backend.draw(M, K, p, seed)
    words: Tensor = dropout_bits(M, K, p, seed, device=seed.device)
    return words
