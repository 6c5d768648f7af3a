"""A gated MLP with low-rank updates as one operation, forward and backward.

    G = gate(X), U = up(X)        each linear with its update, or without
    Y = down(act(G) ∘ U)          without up: down(act(G))

For the backward it keeps X, G, U, every S [M, r] and the masks as bits. torch's own operations also
keep act(G) and act(G) ∘ U, which are made again here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..utils.private import is_grad_batch, unsafe_view
from . import autocast, fp8_copies, mlp_apart
from . import backend as _backend
from .apart import apart
from .bases.weight import dense
from .bits import unpack_bits
from .lora import lora_linear, plain, to_autocast
from .mlp_parts import Member
from .mlp_torch import ACTIVATIONS, hidden
from .projection import Plain, PlainGrad, Projection, ProjectionGrad
from .torch_products import base_linear, base_product

Part = Projection | Plain
PER_PART = 4  # tensors of a part: weight, bias, A, B


def _part(tensors: Any, settings: tuple[float, float, bool]) -> Part:
    weight, bias, A, B = tensors
    if A is None:
        return Plain(weight, bias, settings[2])
    return Projection(weight, bias, A, B, *settings)


def _outputs(x: Tensor, parts: list[Part]) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(Y, S, mask) of each part of x [M, K]; masks are drawn in this order."""
    adapted = [p for p in parts if isinstance(p, Projection)]
    done = iter(_backend.active.forward(x, adapted) if adapted else ())
    return [
        (base_linear(x, p.w, p.bias), None, None) if isinstance(p, Plain) else next(done)
        for p in parts
    ]


def _run(x: Tensor, parts: list[Part], act: str, packed: bool) -> tuple[list[Any], Tensor, bool]:
    """([(output, S, mask) of each part of x [M, K]; None for down's output], Y, apart).

    ``apart``: the outputs of gate and up are without their low-rank parts.
    """
    *inner, down = parts
    apart = None if packed else mlp_apart.outputs(x, inner, act, down)
    done: list[Any] = list(_outputs(x, inner) if apart is None else apart)
    gate, up = _gate_and_up([y for y, _, _ in done], packed)
    more: Any = {}
    if apart is not None:
        pairs = [(s, part.tensors[3]) for (_, s, _), part in zip(done, inner, strict=True)]
        more = {"inner": (*pairs, None)[:2]}
    y, s, bits = _backend.middle().forward(gate, up, act, down, **more)
    return [*done, (None, s, bits)], y, apart is not None


class _LoraMLP(torch.autograd.Function):
    """The last part is down; two halves of one part's output are G and U if there is no up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Any, *tensors: Any) -> Tensor:
        act, packed, settings = how
        groups = [tensors[i : i + PER_PART] for i in range(0, len(tensors), PER_PART)]
        parts = [_part(t, own) for t, own in zip(groups, settings, strict=True)]
        x2 = x.reshape(-1, x.shape[-1])
        done, y, ctx.apart = _run(x2, parts, act, packed)
        saved: list[Tensor | None] = [x]
        for i, (made, part) in enumerate(zip(done, parts, strict=True)):
            needs_s = ctx.needs_input_grad[2 + PER_PART * i + 3]
            needs_s = needs_s or (ctx.apart and part is not parts[-1])
            saved += [*part.tensors, made[0], made[1] if needs_s else None, made[2]]
        ctx.save_for_backward(*saved)
        ctx.how = how
        return y if x.dim() == 2 else unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        act, packed, settings = ctx.how
        x, *saved = ctx.saved_tensors
        rows = [saved[i : i + 7] for i in range(0, len(saved), 7)]
        parts = [_part(row[:4], own) for row, own in zip(rows, settings, strict=True)]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            words = [row[6] for row in rows]
            return _differentiable(x, parts, words, act, packed, dy, needs)
        *inner, down = parts
        gate, up = _gate_and_up([row[4] for row in rows[:-1]], packed)
        dy2 = dy.reshape(-1, dy.shape[-1])
        _, _, needs_a, needs_b = needs[-PER_PART:]
        *_, s, bits = rows[-1]
        behind: ProjectionGrad | PlainGrad = PlainGrad(dy2, down.w)
        if isinstance(down, Projection):
            behind = ProjectionGrad(
                dy2, down.w, down.A, down.B, s, bits, down.scale, down.p, needs_a, needs_b
            )
        shrunk = [row[5] for row in rows[:-1]]
        members = _members(inner, shrunk, packed, gate.shape[1], ctx.apart)
        copied = needs[0] and _quantised_behind(inner, packed, needs)
        made, db_down = _backend.middle(dy).backward(gate, up, act, behind, members, copied)
        grads: list[Tensor | None] = [None] * len(needs)
        grads[-2:] = made.da, db_down
        if needs[-3]:
            grads[-3] = dy2.sum(0)
        x2 = x.reshape(-1, x.shape[-1])
        masks = [row[6] for row in rows[:-1]]
        dx = (_of_packed if packed else _of_parts)(x2, inner, masks, made, needs, grads)
        grads[0] = dx.view(x.shape) if dx is not None else None
        return tuple(grads)


def _gate_and_up(outputs: list[Tensor], packed: bool) -> tuple[Tensor, Tensor | None]:
    if packed:
        gate, up = outputs[0].chunk(2, 1)
        return gate, up
    return outputs[0], outputs[1] if len(outputs) > 1 else None


def _members(
    inner: list[Part], shrunk: list[Tensor | None], packed: bool, width: int, apart: bool
) -> tuple[Member | None, Member | None]:
    """The adapters of G and of U; of a packed part the halves of its B."""
    found: list[Member | None] = []
    for part, s in zip(inner, shrunk, strict=True):
        if isinstance(part, Plain):
            found += [None, None] if packed else [None]
            continue
        halves = (part.B[:width], part.B[width:]) if packed else (part.B,)
        found += [Member(B, s, part.scale / (1.0 - part.p), apart) for B in halves]
    return found[0], found[1] if len(found) > 1 else None


def _quantised_behind(inner: list[Part], packed: bool, needs: Any) -> bool:
    """True when dX takes dG and dU in fp8, and nothing but dS and dB takes them as numbers."""
    biases = any(needs[2 + PER_PART * i + 1] for i in range(len(inner)))
    adapted = all(isinstance(part, Projection) for part in inner)
    if packed or biases or not adapted:
        return False
    return fp8_copies.order([part.w for part in inner]) == fp8_copies.ORDER


def _grad(part: Projection, dy: Tensor, w: Tensor, bits: Tensor | None, wants: Any) -> Any:
    return ProjectionGrad(dy, w, part.A, part.B, None, bits, part.scale, part.p, wants[2], wants[3])


def _of_parts(
    x: Tensor, inner: list[Part], masks: list[Any], made: Any, needs: Any, grads: list[Any]
) -> Tensor | None:
    """dX from dG and dU; the gradients of gate and up are put into ``grads``."""
    behind, given, places, rest = [], [], [], []
    for i, (part, bits) in enumerate(zip(inner, masks, strict=True)):
        at = 2 + PER_PART * i
        dy = made.dup if i else made.dgate
        if needs[at + 1]:
            grads[at + 1] = dy.sum(0)
        if isinstance(part, Plain):
            rest.append((dy, part.w))
            continue
        own = _grad(part, dy, part.w, bits, needs[at : at + PER_PART])
        behind.append(own._replace(copy=made.copies[i]) if made.copies[i] is not None else own)
        given.append(made.ds[i])
        places.append(at)
        grads[at + 3] = made.dbs[i]
    return _grad_x(x, behind, given, places, rest, needs[0], grads)


def _of_packed(
    x: Tensor, inner: list[Part], masks: list[Any], made: Any, needs: Any, grads: list[Any]
) -> Tensor | None:
    """:func:`_of_parts` for one part of which dG and dU are the halves.

    One low-rank product stands for both: dS is the sum of the halves'.
    """
    [part], [bits], width = inner, masks, made.dgate.shape[1]
    whole = _whole(made.dgate, made.dup)
    if whole is None:  # the halves of a weight are views, which only a dense one has
        part = part._replace(weight=dense(part.weight))
    if needs[3]:
        grads[3] = torch.cat([made.dgate.sum(0), made.dup.sum(0)])
    if isinstance(part, Plain):
        if whole is not None:
            rest = [(whole, part.w)]
        else:
            rest = [(made.dup, part.w[:, width:]), (made.dgate, part.w[:, :width])]
        return _grad_x(x, [], [], [], rest, needs[0], grads)
    if made.dbs[0] is not None:
        grads[5] = torch.cat(made.dbs)
    if whole is not None:
        dy, w, rest = whole, part.w, []
    else:
        dy, w, rest = made.dgate, part.w[:, :width], [(made.dup, part.w[:, width:])]
    behind = _grad(part, dy, w, bits, needs[2:6])
    return _grad_x(x, [behind], [made.ds[0] + made.ds[1]], [2], rest, needs[0], grads)


def _whole(first: Tensor, second: Tensor) -> Tensor | None:
    """The matrix [M, 2 width] of which these are the halves; None when they are not."""
    if is_grad_batch(first):  # it has no storage
        return None
    M, width = first.shape
    apart = second.storage_offset() - first.storage_offset()
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    if not same or apart != width or not first.stride() == second.stride() == (2 * width, 1):
        return None
    return first.as_strided((M, 2 * width), (2 * width, 1))


def _grad_x(
    x: Tensor, behind: list[Any], given: list[Any], places: list[int], rest: list[Any],
    needs_x: bool, grads: list[Any],
) -> Tensor | None:  # fmt: skip
    dx = None
    if behind and (needs_x or any(m.needs_a for m in behind)):
        dx, pairs = _backend.behind(given[0]).backward(x, behind, needs_x, given)
        for at, (da, _) in zip(places, pairs, strict=True):
            grads[at + 2] = da
    if needs_x:
        for dy, w in rest:
            dx = base_product(dy, w.t(), dx)
    return dx


def _differentiable(
    x: Tensor, parts: list[Part], words: list[Any], act: str, packed: bool, dy: Tensor, needs: Any
) -> tuple[Tensor | None, ...]:
    """The gradients by autograd of the plain formula, as a graph."""
    wanted = [i for i, need in enumerate(needs) if need]
    with torch.enable_grad():
        own: list[Any] = apart([x, *(t for p in parts for t in p.tensors)])
        x, *tensors = own
        groups = [tensors[i : i + PER_PART] for i in range(0, len(tensors), PER_PART)]
        parts = [_part(g, p.settings) for g, p in zip(groups, parts, strict=True)]
        inputs = [x, None, *tensors]
        masks = []
        for part, bits in zip(parts, words, strict=True):
            K = part.w.shape[0]
            shape = (*x.shape[:-1], K)
            masks.append(None if bits is None else unpack_bits(bits, K, x.dtype).view(shape))
        y = plain_mlp(x, parts, masks, act, packed)
        sources: Any = [inputs[i] for i in wanted]
        found = torch.autograd.grad(y, sources, dy, create_graph=True, allow_unused=True)
    grads = dict(zip(wanted, found, strict=True))
    return tuple(grads.get(i) for i in range(len(inputs)))


def plain_mlp(
    x: Tensor, parts: list[Part], masks: list[Tensor | None], act: str, packed: bool
) -> Tensor:
    """Y by the formula, operation by operation; ``masks`` hold 0 and 1."""

    def apply(x: Tensor, part: Part, mask: Tensor | None) -> Tensor:
        if isinstance(part, Projection):
            return plain(x, part, mask)
        return linear(x, part.weight.t() if part.transposed else part.weight, part.bias)

    *inner, down = parts
    outputs = [apply(x, p, mask) for p, mask in zip(inner, masks, strict=False)]
    if packed:
        outputs = list(outputs[0].chunk(2, -1))
    h = ACTIVATIONS[act](outputs[0])
    if len(outputs) > 1:
        h = h * outputs[1]
    return apply(h, down, masks[-1])


def lora_mlp(
    x: Tensor, gate: Part, up: Part | None, down: Part, act: str, packed: bool = False
) -> Tensor:
    """down(act(gate(x)) * up(x)) as one operation, with low-rank updates on any of the three.

    Args:
        x: [..., K], floating point.
        gate, down: a :class:`.Projection`, or a :class:`.Plain` for a linear without an adapter,
            with tensors as for :func:`.lora.lora_linear`. Weights are frozen; biases may train.
        up: the same; None: down(act(gate(x))). Masks are drawn in the order gate, up, down.
        act: a name in :data:`.mlp_torch.ACTIVATIONS`.
        packed: gate's output has two halves, of which the second is up's; ``up`` must be None.

    Returns:
        [..., N] in x's dtype (autocast's when that is on), equal to the separate operations.
        Differentiable twice.

    Raises:
        ValueError: an unknown ``act``, ``up`` beside ``packed``, or a weight that requires a
            gradient.
        RuntimeError: torch's matrix product refuses the shapes, devices or dtypes.
    """
    parts = [gate, down] if up is None else [gate, up, down]
    _check(parts, up, act, packed)
    if autocast.is_on(x):
        x, parts = _in_autocast(x, parts)
    *inner, last = parts
    inside = x.requires_grad or any(_trains(p) for p in inner)
    if torch.is_grad_enabled() and (inside or _trains(last)):
        if inside:
            how = (act, packed, tuple(p.settings for p in parts))
            tensors = (t for p in parts for t in p.tensors)
            y: Tensor = _LoraMLP.apply(x, how, *tensors)  # type: ignore[no-untyped-call]
            return y
        with torch.no_grad():  # down alone trains, which keeps only its own input
            h = _hidden(x, inner, act, packed)
        if isinstance(last, Projection):
            return lora_linear(h, *last)
        y = base_linear(h.reshape(-1, h.shape[-1]), last.w, last.bias)
        return y.view(*h.shape[:-1], y.shape[-1])
    _, y, _ = _run(x.reshape(-1, x.shape[-1]), parts, act, packed)
    return y.view(*x.shape[:-1], y.shape[-1])


def _hidden(x: Tensor, inner: list[Part], act: str, packed: bool) -> Tensor:
    ys = [y for y, _, _ in _outputs(x.reshape(-1, x.shape[-1]), inner)]
    h = hidden(*_gate_and_up(ys, packed), act)
    return h.view(*x.shape[:-1], h.shape[-1])


def _trains(part: Part) -> bool:
    return any(t is not None and t.requires_grad for t in part.tensors)


def _check(parts: list[Part], up: Part | None, act: str, packed: bool) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"lora_mlp: act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
    if packed and up is not None:
        raise ValueError("lora_mlp: with packed=True gate has up's output too; up must be None")
    if any(p.weight.requires_grad for p in parts):
        raise ValueError("lora_mlp: a weight requires a gradient; allowed: frozen weights")


def _in_autocast(x: Tensor, given: list[Part]) -> tuple[Tensor, list[Part]]:
    if x.dtype == torch.float64:
        return x, given
    device, parts = x.device.type, list[Part]()
    dtype = torch.get_autocast_dtype(device)
    for part in given:
        if isinstance(part, Projection):
            x, weight, bias, A, B = to_autocast(device, x, *part.tensors)
            parts.append(Projection(weight, bias, A, B, *part.settings))
        else:
            bias = None if part.bias is None else part.bias.to(dtype)
            parts.append(Plain(part.weight.to(dtype), bias, part.transposed))
    return x.to(dtype), parts
