"""A frozen weight that is not dense: :class:`Packed`, and as a tensor :class:`BaseWeight`.

The operations of this package take a ``BaseWeight`` wherever they take a frozen weight [N, K]. They
multiply through :func:`.torch_products.base_product`, which accumulates onto the low-rank part.
What is dense lives for one product: the backward dequantises again, and nothing dense is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...utils.private import (
    DisabledTorchFunction,
    make_wrapper,
    outside_transforms,
    transforms_active,
)

if TYPE_CHECKING:
    from ...kernels.quantised import Quantised


class Packed(ABC):
    """A weight [N, K] in one format: the tensors that its owner keeps, and how they are read.

    An object is made for a call, from what the layer holds then, and is cheap to make.

    Attributes:
        format: the format's name, for ``explain``.
        shape: (N, K).
        device: where the packed tensors are.
        tensors: the packed tensors, as the layer holds them: the same objects in every call.
    """

    __slots__ = ()

    format: str
    shape: tuple[int, int]
    device: torch.device
    tensors: tuple[Tensor, ...]
    # True: products are of an X of few bits, so that `dense` alone does not give the layer's output
    quantises_input: bool = False
    # True: all that products add to `dense` is rounding, so that torch.func may follow those
    is_linear: bool = True
    # the dtype of base products where it does not follow x's; None: x's
    fixed: torch.dtype | None = None
    # True: the layer's `weight` is a dense parameter, which merging writes to
    holds_dense: bool = False

    def why_not_takes(self, x: Tensor) -> str | None:
        """The reason that products of x [..., K] are not the owner's, or None."""
        return None

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] in ``dtype``, contiguous, as its owner dequantises it."""

    def for_kernels(self, dtype: torch.dtype) -> Quantised | str:
        """The weight as Triton kernels read it, to multiply in ``dtype``; or why they do not.

        What it gives equals :meth:`dense` bit for bit, and products are of these numbers alone.
        Called with triton installed.
        """
        return "no kernel reads its format"

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the base product of an x of ``dtype`` runs, by its owner's rule."""
        return dtype if self.fixed is None else self.fixed

    def product(self, x: Tensor, y: Tensor | None) -> Tensor:
        """x Wᵀ [M, N] for x [M, K], added to ``y`` in its memory if that is given."""
        return multiplied(x, self.dense(self.compute_dtype(x.dtype)).t(), y)

    def infer(self, x: Tensor) -> Tensor:
        """:meth:`product` in a call without gradients, where a format may have a faster way."""
        return self.product(x, None)

    def infer_row(self, v: Tensor) -> Tensor:
        """:meth:`infer` of one row: W v [N], a new tensor, for v [K]."""
        return self.infer(v.unsqueeze(0)).view(-1)

    def grad_input(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        """dY W [M, K] for dY [M, N], added to ``dx`` in its memory if that is given."""
        return multiplied(dy, self.dense(self.compute_dtype(dy.dtype)), dx)


def multiplied(x: Tensor, w: Tensor, y: Tensor | None) -> Tensor:
    """x w, or y + x w in y's memory; computed in w's dtype, the result in x's."""
    if w.dtype == x.dtype:
        return torch.mm(x, w) if y is None else y.addmm_(x, w)
    part = torch.mm(x.to(w.dtype), w)
    return part.to(x.dtype) if y is None else y.add_(part)


class BaseWeight(Tensor):
    """A :class:`Packed` weight as a tensor without data: [N, K], or [K, N] when turned.

    It has a shape, a device and the dtype of the activations, so that operations keep it for their
    backward as they keep a dense one. A torch operation that knows nothing of it gets the dense
    weight, made for that operation: right, but slow. One that would write to it is refused.
    """

    packed: Packed
    turned: bool

    __torch_function__ = DisabledTorchFunction

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype, turned: bool = False) -> BaseWeight:
        N, K = packed.shape
        assert make_wrapper is not None, "no layer is read without it (formats.read)"
        shape = (K, N) if turned else (N, K)
        made = make_wrapper(cls, shape, dtype=dtype, device=packed.device)
        made.packed, made.turned = packed, turned
        found: BaseWeight = made
        return found

    def t(self) -> BaseWeight:
        """The same weight, turned."""
        return BaseWeight(self.packed, self.dtype, not self.turned)

    def to(self, dtype: Any) -> Any:  # type: ignore[override]  # a dtype is all that callers pass
        """The same weight for activations of another dtype; nothing is computed."""
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"a quantised weight takes a torch.dtype alone, given {dtype!r}")
        return self if dtype == self.dtype else BaseWeight(self.packed, dtype, self.turned)

    def dense(self) -> Tensor:
        """The numbers: a tensor [N, K] in this dtype, or its view [K, N] when turned."""
        if transforms_active():  # which take no autograd functions, as owners' code has
            with outside_transforms():
                w = self.packed.dense(self.dtype)
        else:
            w = self.packed.dense(self.dtype)
        return w.t() if self.turned else w

    def product(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x [M, ·] times this matrix, added to ``y`` in its memory if that is given."""
        multiply = self.packed.product if self.turned else self.packed.grad_input
        return multiply(x, y)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.t.default:
            return args[0].t()
        return dispatched(func, args, kwargs)

    def again(self) -> BaseWeight:
        return BaseWeight(self.packed, self.dtype, self.turned)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BaseWeight({self.packed.format}, {list(self.shape)}, {self.dtype})"


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a torch operation that knows nothing of weights without data.

    Raises:
        TypeError: it would write to one.
    """
    if func is torch.ops.aten.detach.default:
        return args[0].again()
    name = func.name().partition("::")[2].partition(".")[0]
    written = [args[0]] if name.endswith("_") and args else []
    written += [v for k, v in (kwargs or {}).items() if k == "out"]
    for given in written:
        if hasattr(given, "packed"):
            raise TypeError(f"{func} would write to a frozen {given.packed.format} weight")
    values = [dense_of(a) for a in args]
    return func(*values, **{k: dense_of(v) for k, v in (kwargs or {}).items()})


def dense(w: Tensor) -> Tensor:
    """``w`` itself, or the numbers of a :class:`BaseWeight`, made now."""
    return w.dense() if isinstance(w, BaseWeight) else w


def dense_of(given: Any) -> Any:
    """:func:`dense` of an argument of any kind; of tensors in a list as well."""
    if isinstance(given, list | tuple):
        return type(given)(map(dense_of, given))
    return given.dense() if hasattr(given, "packed") else given
