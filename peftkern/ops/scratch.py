"""Memory for the temporary tensors of a call on a CPU, which its thread keeps for the next call.

Blocks of some hundred KB go back to the system when they are freed at the heap's end, and each of
their pages is a fault when it is written again: 0.6 ms for the copies of 64 adapters' factors.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..utils.private import dispatch_depth

# Larger needs are met by fresh memory: a thread should hold no more for good.
LIMIT = 16 * 1024 * 1024
_VIEWS = 256


class _Buffer:
    """One dimension of memory, and views of it: making one costs a microsecond."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):  # calls in and out of inference mode write into it
            self.memory = torch.empty(count, dtype=dtype, device="cpu")
        self.count = count
        self.views: dict[tuple[int, int, int, int], Tensor] = {}

    def view(self, start: int, a: int, b: int, c: int) -> Tensor:
        key = (start, a, b, c)
        found = self.views.get(key)
        if found is None:
            if len(self.views) >= _VIEWS:
                self.views.clear()
            with torch.inference_mode(False):
                found = self.memory.as_strided((a, b, c), (b * c, c, 1), start)
            self.views[key] = found
        return found


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, _Buffer] = {}


_kept = _Kept()


class Scratch:
    """A buffer from which a call takes tensors, one behind the other.

    While an object has the buffer no other one gets it: a call within a call makes its own, and
    so does the next call when :meth:`give_back` was not reached. No value outlives it.

    Args:
        like: a tensor with the dtype and device wanted. Without a plain tensor on a CPU, under a
            dispatch mode, or for more than ``LIMIT`` bytes there is no buffer.
        count: elements needed.

    Attributes:
        at: the first element that is not taken; it can be set back to take the same ones again.
    """

    __slots__ = ("_buffer", "_dtype", "at")

    def __init__(self, like: Tensor | None, count: int = 0) -> None:
        self.at = 0
        self._buffer: _Buffer | None = None
        if (
            like is None
            or like.__class__ is not Tensor
            or not like.is_cpu
            or count * like.itemsize > LIMIT
            or dispatch_depth()
        ):
            return
        self._dtype = like.dtype
        buffer = _kept.buffers.pop(like.dtype, None)
        if buffer is None or buffer.count < count:
            buffer = _Buffer(count, like.dtype)
        self._buffer = buffer

    def take(self, a: int, b: int, c: int) -> Tensor | None:
        """Uninitialised [a, b, c] for ``out=``; without a buffer None, and torch makes a tensor."""
        if self._buffer is None:
            return None
        start, self.at = self.at, self.at + a * b * c
        return self._buffer.view(start, a, b, c)

    def give_back(self) -> None:
        """Keep the buffer for the thread's next call; tensors taken are not to be used again."""
        if self._buffer is not None:
            _kept.buffers[self._dtype] = self._buffer
            self._buffer = None
