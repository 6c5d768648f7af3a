"""The ways to compute a mixture, and the better of torch's own: grouped products, or a loop."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..bases.experts import BaseExperts
from . import grouped, loop
from .dropout import words_of
from .order import Order
from .parts import Call, Grads, Kept, Wants

Words = tuple[Tensor | None, Tensor | None]


class Way(Protocol):
    """What :mod:`.loop`, :mod:`.grouped` and :mod:`.triton_way` have."""

    def ordered(self, call: Call) -> Order: ...

    def forward(
        self, call: Call, order: Order, words: Words, keep: bool
    ) -> tuple[Tensor, Kept]: ...

    def backward(
        self, call: Call, kept: Kept, words: Words, dout: Tensor, wants: Wants
    ) -> Grads: ...


class Choice(NamedTuple):
    way: Way
    name: str
    reason: str
    declined: str | None = None  # the reason that the kernels do not take the call

    def infer(self, call: Call) -> Tensor:
        """The output, with nothing kept."""
        few: Any = getattr(self.way, "few", None)  # what the kernels have for few pairs
        y: Tensor | None = None if few is None else few(call)
        if y is not None:
            return y
        order = self.way.ordered(call)
        y, _ = self.way.forward(call, order, words_of(call, order), keep=False)
        return y


def _format(call: Call) -> str:
    weight = call.up.weight
    assert isinstance(weight, BaseExperts)
    return weight.packed.format


def of_torch(call: Call) -> Choice:
    """The better of torch's own ways for a call, and the reason."""
    if isinstance(call.up.weight, BaseExperts):
        return Choice(loop, "loop", f"only chosen experts are dequantised, {_format(call)}")
    if call.x.is_cpu:
        return Choice(loop, "loop", "on a CPU the host knows how many tokens each expert got")
    reason = grouped.why_not(call)
    if reason is not None:
        return Choice(loop, "loop", reason)
    return Choice(grouped, "grouped", "the host does not wait for the device")
