"""The LoRA linear as operators of ``torch.library``, for ``torch.compile`` and export.

The graph has one node for each projection and one for its backward:

    peftkern::lora_linear            Y, and for the backward S and the mask's words
    peftkern::lora_linear_infer      Y alone, without gradients or dropout
    peftkern::lora_linear_backward   dX, dA, dB

They are functions of their arguments alone: they write to none, results share no memory, and the
dropout mask is made from a seed, also an argument, drawn in the graph on x's device. So a compiler
may compute them again (activation checkpointing, min-cut partitioning) or replay them in a CUDA
graph. Eager calls use :mod:`.lora`, which costs less on the host.

Among the arguments, None stands for tensors that are not wanted or absent; in the results, an empty
tensor does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import autocast
from . import backend as _backend
from .bits import words_per_row
from .lora import second_derivatives, to_autocast
from .projection import Projection, ProjectionGrad

_library = torch.library.Library("peftkern", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale, float p, "
    "Tensor? seed, bool transposed) -> (Tensor y, Tensor s, Tensor words)",
    tags=_TAGS,
)
_library.define(
    "lora_linear_infer(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale, "
    "bool transposed) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor A, Tensor B, Tensor? s, "
    "Tensor? words, float scale, float p, bool transposed, bool needs_x) "
    "-> (Tensor dx, Tensor da, Tensor db)",
    tags=_TAGS,
)

_ops = torch.ops.peftkern


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    transposed: bool,
) -> tuple[Projection, Tensor | None]:
    """(projection, seed) from the checked arguments of ``lora_linear`` after x.

    Raises:
        ValueError: shapes do not fit, p is outside [0, 1), or the seed is missing or not an int64
            tensor [1].
        TypeError: x and the weight differ in dtype, or A and B do.
    """
    N, K = weight.shape[::-1] if transposed else weight.shape
    layout = "[K, N]" if transposed else "[N, K]"
    for name, t, want in (
        ("x", x, (*x.shape[:-1], K)),
        ("bias", bias, (N,)),
        ("A", A, (A.shape[0], K)),
        ("B", B, (N, A.shape[0])),
    ):
        if t is not None and tuple(t.shape) != want:
            raise ValueError(
                f"lora_linear: {name} has shape {list(t.shape)}; allowed: {list(want)}, for a "
                f"weight {layout} of {list(weight.shape)} and A [r, K] of {list(A.shape)}"
            )
    if x.dtype != weight.dtype or A.dtype != B.dtype:
        raise TypeError(
            f"lora_linear: dtypes are x {x.dtype}, weight {weight.dtype}, A {A.dtype}, "
            f"B {B.dtype}; allowed: x and weight alike, A and B alike"
        )
    if not 0.0 <= p < 1.0:
        raise ValueError(f"lora_linear: p is {p}; allowed: 0 <= p < 1")
    if p > 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        got = None if seed is None else f"{seed.dtype} {list(seed.shape)}"
        raise ValueError(f"lora_linear: seed is {got}; allowed with p > 0: torch.int64 [1]")
    return Projection(weight, bias, A, B, scale, p, transposed), seed


# ---------------------------------------------------------------- forward


def _lora_linear(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(Y [..., N], S [M, r], words [M, ceil(K / 32)] in int32, which are [0] when p is 0)."""
    member, seed = _checked(x, *args)
    backend = _backend.active
    x2 = x.reshape(-1, x.shape[-1])
    words = None if seed is None else backend.draw(x2.shape[0], x2.shape[1], member.p, seed)
    [(y, s, _)] = backend.forward(x2, [member], [words])
    y = y.view(*x.shape[:-1], y.shape[-1])
    # made dense, as the fake's result is: on a CPU torch's S is a transposed view
    return y, s.contiguous(), _none(x, torch.int32) if words is None else words


def _lora_linear_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (_, _, A, B, _, p, _), _ = _checked(x, *args)
    rows = math.prod(x.shape[:-1])
    s = x.new_empty((rows, A.shape[0]), dtype=_backend.active.low_rank_dtype(x, A))
    words = _none(x, torch.int32)
    if p > 0.0:
        words = x.new_empty((rows, words_per_row(x.shape[-1])), dtype=torch.int32)
    return x.new_empty((*x.shape[:-1], B.shape[0])), s, words


def _none(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor, in place of an absent result."""
    return like.new_empty((0,), dtype=dtype)


def _infer(x: Tensor, *args: Any) -> Tensor:
    """Y [..., N]."""
    weight, bias, A, B, scale, transposed = args
    _checked(x, weight, bias, A, B, scale, 0.0, None, transposed)
    return _backend.active.infer(x, weight, bias, A, B, scale, transposed)


def _infer_fake(x: Tensor, *args: Any) -> Tensor:
    weight, bias, A, B, scale, transposed = args
    _checked(x, weight, bias, A, B, scale, 0.0, None, transposed)
    return x.new_empty((*x.shape[:-1], B.shape[0]))


# ---------------------------------------------------------------- backward


def _lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    s: Tensor | None,
    words: Tensor | None,
    scale: float,
    p: float,
    transposed: bool,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX [..., K], dA [r, K], dB [N, r]) for dY [..., N]; dA needs ``x``, dB needs ``s``."""
    dy2 = dy.reshape(-1, dy.shape[-1])
    K = A.shape[1]
    # without a gradient for A, only the shape and dtype of x are used
    x2 = x.reshape(-1, K) if x is not None else dy2.new_empty((0, K))
    w = weight if transposed else weight.t()  # [K, N]
    needs_a, needs_b = x is not None, s is not None
    member = ProjectionGrad(dy2, w, A, B, s, words, scale, p, needs_a, needs_b)
    dx, [(da, db)] = _backend.active.backward(x2, [member], needs_x)
    return (
        dx.contiguous().view(*dy.shape[:-1], K) if dx is not None else _none(dy),
        da.contiguous() if da is not None else _none(A),
        db.contiguous() if db is not None else _none(B),
    )


def _lora_linear_backward_fake(
    dy: Tensor, x: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, s: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x = args
    return (
        dy.new_empty((*dy.shape[:-1], A.shape[1])) if needs_x else _none(dy),
        A.new_empty(A.shape) if x is not None else _none(A),
        B.new_empty(B.shape) if s is not None else _none(B),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, A, B, ctx.scale, ctx.p, _, ctx.transposed = inputs
    _, s, words = output
    ctx.mark_non_differentiable(s, words)
    ctx.set_materialize_grads(False)
    _, needs_w, _, needs_a, needs_b = ctx.needs_input_grad[:5]
    ctx.x_like = (x.shape, x.dtype)
    # the order that second_derivatives reads
    ctx.save_for_backward(
        x if needs_a or needs_w else None,
        weight,
        A,
        B,
        s if needs_b else None,
        words if ctx.p > 0.0 else None,
        bias,
    )


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # create_graph=True
        return (*second_derivatives(ctx, dy), None)
    x, weight, A, B, s, words, _ = ctx.saved_tensors
    needs_x, needs_w, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
    dx = da = db = dw = dbias = None
    if needs_x or needs_a or needs_b:
        dx, da, db = _ops.lora_linear_backward(
            dy, x if needs_a else None, weight, A, B, s, words, ctx.scale, ctx.p, ctx.transposed,
            needs_x,
        )  # fmt: skip
    dy2 = dy.reshape(-1, dy.shape[-1])
    if needs_w:
        x2 = x.reshape(-1, x.shape[-1])
        dw = x2.t() @ dy2 if ctx.transposed else dy2.t() @ x2
    if needs_bias:
        dbias = dy2.sum(0)
    return (
        dx if needs_x else None,
        dw,
        dbias,
        da if needs_a else None,
        db if needs_b else None,
        *(None,) * 4,
    )


def _no_gradient(ctx: Any, *_: Any) -> None:
    raise RuntimeError("peftkern::lora_linear_infer has no gradient; call peftkern::lora_linear")


for _name, _real, _fake in (
    ("lora_linear", _lora_linear, _lora_linear_fake),
    ("lora_linear_infer", _infer, _infer_fake),
    ("lora_linear_backward", _lora_linear_backward, _lora_linear_backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftkern::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "peftkern::lora_linear", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("peftkern::lora_linear_infer", _no_gradient, lib=_library)


# ---------------------------------------------------------------- what a layer calls while traced


def why_formula(x: Tensor, A: Tensor) -> str | None:
    """The reason that ``torch.compile`` gets the plain formula; None when it gets an operator.

    The call has x [..., K] and A [r, K].
    """
    return _backend.active.why_not(x, A)


def traced_lora_linear(x: Tensor, member: Projection) -> Tensor:
    """:func:`.lora.lora_linear` as one operator, with the same result and errors.

    The mask is made from one int64 number, drawn by the generator of x's device.
    """
    weight, bias, A, B, scale, p, transposed = member
    if autocast.is_on(x):
        x, weight, bias, A, B = to_autocast(x.device.type, x, weight, bias, A, B)
    trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, A, B)
    )
    y: Tensor
    if p == 0.0 and not trained:
        y = _ops.lora_linear_infer(x, weight, bias, A, B, scale, transposed)
        return y
    seed = torch.randint(2**62, (1,), device=x.device) if p > 0.0 else None
    y, _, _ = _ops.lora_linear(x, weight, bias, A, B, scale, p, seed, transposed)
    return y
