"""Batches whose rows name their adapters: ``AdapterNames``, and the forward of such a batch."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops import autocast
from ...ops.bases.formats import reader_of
from ...ops.lora_mixed import Adapter, SampleIndex, lora_mixed
from ...ops.notes import note_new
from ...ops.tracing import is_recording
from ...utils.private import GLOBAL_HOOKS, HookCounter, in_transform
from .plan import base_reason, base_weight, is_hooked, weight_layout
from .variant import rows_of

if TYPE_CHECKING:
    from .linear import Linear

IN_TRANSFORM = "a transform of torch.func, or forward-mode AD, follows the plain formula"
_BY_ADAPTER = "a %s layer runs a mixed batch adapter by adapter: %s"


class AdapterNames(tuple[str, ...]):
    """The adapter of each row of a batch ("__base__" for none), in place of a list of names.

    It holds the index that the kernels read, which is made once for each device and not in each of
    hundreds of layers. A caller can pass one as ``adapter_names``. The index then lives as long as
    this object, so that a captured CUDA graph can use it; between replays it can be overwritten
    with other indices into ``order``.

    Attributes:
        order: the distinct names without "__base__", in the order of their first rows.
        samples: for each row, its place in ``order``; ``samples.on(device)`` is the index.
    """

    order: tuple[str, ...]
    samples: SampleIndex

    def __new__(cls, names: Iterable[str]) -> AdapterNames:
        self = super().__new__(cls, names)
        numbers: dict[str, int] = {"__base__": -1}
        for name in self:
            numbers.setdefault(name, len(numbers) - 1)
        self.order = tuple(numbers)[1:]
        self.samples = SampleIndex([numbers[name] for name in self], len(self.order))
        return self

    @classmethod
    def of(cls, names: Iterable[str]) -> AdapterNames:
        """``names`` as an ``AdapterNames``; the same object when it is one already."""
        return names if isinstance(names, AdapterNames) else cls(names)


def forward_mixed(
    layer: Linear,
    x: Tensor,
    names: AdapterNames,
    args: Any,
    kwargs: Any,
    variant_kwargs: dict[str, Any],
) -> Tensor:
    """The output [B, ..., N] of a LoRA linear layer for x [B, ..., K]; row b uses ``names[b]``."""
    disabled = layer._disable_adapters
    if not (disabled or args or kwargs):
        adapters = mixed_call(layer, x, names)
        if adapters is not None:
            return as_one(layer, x, names, adapters)
    if not disabled and not is_recording():
        more = "the call has more arguments"
        reason = more if args or kwargs else mixed_reason(layer, x, names)
        note_new(layer, "_noted_mixed", reason, _BY_ADAPTER)
    y = layer._base_output(x, *args, **kwargs)
    if disabled:
        return y
    dtype = y.dtype
    for name, rows in zip(names.order, names.samples.rows(y.device), strict=True):
        if rows is None or name not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(name)
        if variant is None:
            y = y.index_add(0, rows, layer._update(name, x[rows]).to(y.dtype))
        else:
            given = rows_of(variant_kwargs, rows)
            part = variant.update(layer, name, x[rows], y[rows], **given)
            y = y.index_copy(0, rows, part.to(y.dtype))
    return y.to(dtype)


def as_one(layer: Linear, x: Tensor, names: AdapterNames, adapters: list[Adapter | None]) -> Tensor:
    """:func:`forward_mixed` as one operation, with the adapters of :func:`mixed_call`."""
    base: Any = layer.base_layer
    if reader_of(base) is not None:
        weight, bias = cast(Any, base_weight(base, x))  # mixed_call has found it readable
        return lora_mixed(x, weight, bias, adapters, names.samples)
    params = base._parameters
    transposed = bool(weight_layout(base.__class__))
    return lora_mixed(x, params["weight"], params["bias"], adapters, names.samples, transposed)


def mixed_call(layer: Linear, x: Tensor, names: AdapterNames) -> list[Adapter | None] | None:
    """The weights that each of ``names.order`` has in this layer; None when they are not one call.

    :func:`mixed_reason` gives the reason in words and tests the same conditions.
    """
    # This runs in hundreds of layers, and for each adapter of a batch.
    base: Any = layer.base_layer
    if is_recording() or in_transform() or any(GLOBAL_HOOKS) or is_hooked(base):
        return None
    if reader_of(base) is not None:
        if base_reason(base) is not None:
            return None
        dtype = x.dtype
    else:
        weight = base._parameters.get("weight")
        if (
            weight_layout(base.__class__) is None
            or "bias" not in base._parameters
            or weight.__class__ is not Parameter
            or weight.is_meta
        ):
            return None
        dtype = weight.dtype
    if not dtype.is_floating_point or (
        x.dtype != dtype and not (autocast.is_on(x) and x.dtype != torch.float64)
    ):
        return None
    # One condition for all adapters after the other: such loops run in C.
    a_modules, b_modules = layer.lora_A._modules, layer.lora_B._modules
    drop_modules, scaling, variants = layer.lora_dropout._modules, layer.scaling, layer.lora_variant
    held = [name for name in names.order if name in a_modules]
    a: list[Any] = [a_modules[name] for name in held]
    b: list[Any] = [b_modules[name] for name in held]
    drops: list[Any] = [drop_modules[name] for name in held]
    scales = [scaling[name] for name in held]
    if (
        (variants and not variants.keys().isdisjoint(held))
        or not {*map(type, a), *map(type, b)} <= _LINEAR
        or not ({*map(type, drops)} <= _NO_DROPOUT or all(map(_rests, drops)))
        or any(issubclass(kind, Tensor) for kind in {*map(type, scales)})
        or _any_hooked(layer, [*a, *b, *drops])
    ):
        return None
    As: list[Any] = [m._parameters.get("weight") for m in a]
    Bs: list[Any] = [m._parameters.get("weight") for m in b]
    if (
        not {*map(type, As), *map(type, Bs)} <= _PARAMETER
        or any([m._parameters["bias"] is not None for m in b])
        or any(map(_is_meta, As))
        or any(map(_is_meta, Bs))
    ):
        return None
    lows = [*map(_dtype, As)]
    if lows != [*map(_dtype, Bs)] or not {*lows} <= {dtype, torch.float32}:
        return None
    adapters = [tuple.__new__(Adapter, parts) for parts in zip(As, Bs, scales, strict=True)]
    if len(held) == len(names.order):
        return list(adapters)
    of = dict(zip(held, adapters, strict=True))
    return [of.get(name) for name in names.order]


_LINEAR, _NO_DROPOUT, _PARAMETER = {nn.Linear}, {nn.Identity}, {Parameter}
_is_meta, _dtype = attrgetter("is_meta"), attrgetter("dtype")


class Unhooked(NamedTuple):
    """Modules of a layer that had no hook when torch's counter of hooks had this number."""

    modules: list[nn.Module]
    own: list[dict[str, Any]]  # their __dict__; a "forward" in one replaces its class's
    number: int


def _any_hooked(layer: Linear, modules: list[Any]) -> bool:
    """:func:`.plan.is_hooked` of any of a layer's modules.

    A hook's registration takes a new number. Without one since the last call no module's hooks are
    read: they lie apart in memory, and reading them costs more than all other conditions together.
    """
    number = HookCounter.next_id
    seen = layer._unhooked
    if seen is not None and seen.number == number and seen.modules == modules:
        return any(["forward" in own for own in seen.own])
    if any(map(is_hooked, modules)):
        return True
    layer._unhooked = Unhooked(modules, [module.__dict__ for module in modules], number)
    return False


def _rests(drop: nn.Module) -> bool:
    """True for a module that passes x on: no dropout, or one in evaluation mode."""
    return drop.__class__ is nn.Identity or (drop.__class__ is nn.Dropout and not drop.training)


def mixed_reason(layer: Linear, x: Tensor, names: AdapterNames) -> str | None:
    """The reason that a mixed batch is not one operation in this layer; None when it is."""
    base: Any = layer.base_layer
    if is_recording():
        return "a tracer records the plain formula"
    if in_transform():
        return IN_TRANSFORM
    quantised = reader_of(base) is not None
    if (of_base := base_reason(base)) is not None:
        return of_base
    if not quantised and "bias" not in base._parameters:
        return f"base layer {type(base).__name__} computes its product itself"
    if any(GLOBAL_HOOKS):
        return "torch has global module hooks"
    if quantised and is_hooked(base):
        return "base layer has hooks or an overridden forward"
    weight = base._parameters.get("weight")
    dtype = x.dtype if quantised else weight.dtype
    parts: list[tuple[str, Any, Any]] = [] if quantised else [("base layer", base, weight)]
    for name in names.order:
        A: Any = layer.lora_A._modules.get(name)
        if A is None:
            continue
        if name in layer.lora_variant:
            return f"{name}: {layer.lora_variant[name].decline(layer, name)}"
        B: Any = layer.lora_B._modules[name]
        if torch.is_tensor(layer.scaling[name]):
            return f"the scaling of {name} is a tensor (prepared for hot-swapping)"
        drop: Any = layer.lora_dropout._modules[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return f"lora_A or lora_B of {name} is not an nn.Linear"
        if B._parameters["bias"] is not None:
            return f"lora_bias of {name}"
        if not _rests(drop):
            return f"dropout of {name} is active, or a {type(drop).__name__}"
        if is_hooked(drop):
            return f"lora_dropout of {name} has hooks"
        a, b = A._parameters.get("weight"), B._parameters.get("weight")
        parts += (f"lora_A of {name}", A, a), (f"lora_B of {name}", B, b)
        if a is not None and b is not None and a.dtype != b.dtype:
            return f"dtypes: lora_A of {name} {a.dtype}, lora_B {b.dtype}"
    for what, module, w in parts:
        if w.__class__ is not Parameter:
            return f"the weight of {what} is a {type(w).__name__}, not a plain Parameter"
        if is_hooked(module):
            return f"{what} has hooks or an overridden forward"
        if w.is_meta:
            return f"the weight of {what} is on the meta device (offloaded or not loaded yet)"
        if w.dtype != dtype and w.dtype != torch.float32:
            return f"dtypes: base {dtype}, {what} {w.dtype}"
    if not dtype.is_floating_point:
        return f"dtypes: base {dtype}"
    if x.dtype != dtype and not (autocast.is_on(x) and x.dtype != torch.float64):
        return f"dtypes: input {x.dtype}, base {dtype}"
    return None
