"""The quantised weights of a mixture's experts: :class:`PackedExperts`, and as a tensor.

An operation takes a :class:`BaseExperts` where it takes the experts' weights [E, N, K]. It asks for
one expert after another, and what is dense lives for that expert's products: experts without a
token are not dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...utils.private import DisabledTorchFunction, make_wrapper
from ..tracing import is_compiling
from .weight import Packed, dispatched

# (first part of the class's module, class) -> the file with its ``read`` and ``shapes``
BY_MODULE: dict[tuple[str, str], str] = {
    ("transformers", "Mxfp4GptOssExperts"): "mx_experts",
    ("transformers", "FP8Experts"): "fp8_experts",
}


class PackedExperts(NamedTuple):
    """The weights [E, N, K] of one linear of all experts, in one format."""

    format: str
    shape: tuple[int, int, int]
    device: torch.device
    tensors: tuple[Tensor, ...]  # as the module holds them
    of: Callable[[int], Packed]  # one expert's


class FoundExperts(NamedTuple):
    """What a module of experts holds; biases are [E, N] or None."""

    up: PackedExperts
    down: PackedExperts
    up_bias: Tensor | None
    down_bias: Tensor | None
    # (function, its name for kernels or None, layout, constants), as ``ops.experts.parts.Gate``
    gate: tuple[Any, str | None, str, tuple[float, float, float] | None]


class BaseExperts(Tensor):
    """:class:`PackedExperts` as a tensor without data, [E, N, K] in the activations' dtype.

    An operation of torch that knows nothing of it gets all experts dense: right, but large.
    """

    packed: PackedExperts

    __torch_function__ = DisabledTorchFunction

    @staticmethod
    def __new__(cls, packed: PackedExperts, dtype: torch.dtype) -> BaseExperts:
        assert make_wrapper is not None, "no module is read without it (reader_of)"
        made = make_wrapper(cls, packed.shape, dtype=dtype, device=packed.device)
        made.packed = packed
        found: BaseExperts = made
        return found

    def to(self, dtype: Any) -> Any:  # type: ignore[override]  # a dtype is all that callers pass
        return self if dtype == self.dtype else BaseExperts(self.packed, dtype)

    def __getitem__(self, at: Any) -> Any:
        return self.one(at) if isinstance(at, int) else self.dense()[at]

    def one(self, expert: int) -> Tensor:
        """W_e [N, K], made now."""
        return self.packed.of(expert).dense(self.dtype)

    def dense(self) -> Tensor:
        """The weights of all experts."""
        return torch.stack([self.one(e) for e in range(self.packed.shape[0])])

    def again(self) -> BaseExperts:
        return BaseExperts(self.packed, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatched(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BaseExperts({self.packed.format}, {list(self.shape)}, {self.dtype})"


class EachExpert(Sequence[Tensor]):
    """W_e [N, K], or its transpose, of some experts, each made when it is asked for."""

    def __init__(self, weights: BaseExperts, experts: Sequence[int], turned: bool) -> None:
        self.weights, self.experts, self.turned = weights, experts, turned

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return EachExpert(self.weights, self.experts[at], self.turned)
        w = self.weights.one(self.experts[at])
        return w.t() if self.turned else w

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


_readers: dict[type, Any] = {}


def reader_of(module: nn.Module) -> Any:
    """The file that reads a module of quantised experts; None for any other module."""
    cls = module.__class__
    try:
        return _readers[cls]
    except KeyError:
        found = _look_up(cls)
        if not is_compiling():  # a compiler may not write to what is outside of its graph
            _readers[cls] = found
        return found


def _look_up(cls: type) -> Any:
    for base in cls.__mro__:
        name = BY_MODULE.get((base.__module__.partition(".")[0], base.__name__))
        if name is not None and make_wrapper is not None:
            return import_module(f"{__package__}.{name}")
    return None
