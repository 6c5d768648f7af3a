"""Batches whose rows name their adapters: ``AdapterNames``, and the forward of such a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...ops import autocast
from ...ops.bases.formats import read, reader_of
from ...ops.lora_mixed import Factors, SampleIndex, lora_mixed
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
        call = mixed_call(layer, x, names)
        if call is not None:
            return lora_mixed(x, *call)
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


def mixed_call(layer: Linear, x: Tensor, names: AdapterNames) -> tuple[Any, ...] | None:
    """The arguments of :func:`lora_mixed` after x; None when the batch is not one operation.

    :func:`mixed_reason` gives the reason in words and tests the same conditions.
    """
    # This runs in hundreds of layers, and for each adapter of a batch: loops over adapters run in
    # C, and read no attribute of a tensor where the batch can tell that none has changed.
    base: Any = layer._modules["base_layer"]
    if is_recording() or in_transform() or any(GLOBAL_HOOKS) or is_hooked(base):
        return None
    weight: Any
    layout: bool | None
    if reader_of(base) is not None:
        found = base_weight(base, x)
        if found is None or found[0].packed.quantises_input:
            return None
        (weight, bias), layout, dtype = found, False, x.dtype
    else:
        params, layout = base._parameters, weight_layout(base.__class__)
        weight = params.get("weight")
        if (
            layout is None
            or "bias" not in params
            or weight.__class__ is not Parameter
            or weight.is_meta
        ):
            return None
        bias, dtype = params["bias"], weight.dtype
    if not dtype.is_floating_point or (
        x.dtype != dtype and not (autocast.is_on(x) and x.dtype != torch.float64)
    ):
        return None
    held = layer._held
    if held is None or not held.holds(layer, names.order):
        held = layer._held = Held(layer, names.order)
    if held.is_hooked() or not held.is_plain():
        return None
    variants, scales = layer.lora_variant, held.of(layer.scaling)
    if variants and not variants.keys().isdisjoint(held.names):
        return None
    try:
        As, Bs = [*map(_weight, held.a_params)], [*map(_weight, held.b_params)]
    except KeyError:  # a parametrization computes it
        return None
    factors = Factors(As, Bs, scales, held.place)
    call = weight, bias, factors, names.samples, layout
    # what is recognised had its classes compared, and its scales with numbers
    if x.dtype is dtype and names.samples.batches.recognise(x, layer.out_features, factors):
        return call
    lows = [*map(_dtype, As)]
    if (
        not {*map(type, As), *map(type, Bs)} <= _PARAMETER
        or any(issubclass(kind, Tensor) for kind in {*map(type, scales)})
        or any(map(_is_meta, As))
        or any(map(_is_meta, Bs))
        or lows != [*map(_dtype, Bs)]
        or not {*lows} <= {dtype, torch.float32}
    ):
        return None
    return call


_LINEAR, _NO_DROPOUT, _PARAMETER = {nn.Linear}, {nn.Identity}, {Parameter}
_STORES = "lora_A", "lora_B", "lora_dropout"
_is_meta, _dtype = attrgetter("is_meta"), attrgetter("dtype")
_weight, _bias = itemgetter("weight"), itemgetter("bias")


class Held:
    """Where a layer has the weights of some adapters, for its next call with the same ones.

    The dicts live as long as their modules. A new one is made when a module was replaced.

    Attributes:
        names: those of ``order`` that have weights in the layer.
        place: for each of ``order`` its place in ``names``, or None.
        of: from a dict the values of ``names``, as a tuple.
    """

    def __init__(self, layer: Linear, order: tuple[str, ...]) -> None:
        self.order = order
        a_modules = layer.lora_A._modules
        self.names = tuple(name for name in order if name in a_modules)
        places = {name: i for i, name in enumerate(self.names)}
        self.place = tuple(map(places.get, order))
        self.of = _values(self.names)
        stores: Any = [getattr(layer, name)._modules for name in _STORES]
        self.a, self.b, self.drops = map(self.of, stores)
        # Comparing all of a layer's modules takes a third of the time that taking some does.
        self._all: list[Any] | None = None
        if len(a_modules) <= 2 * len(self.names):
            self._all = [dict(store) for store in stores]
        self._missing = {*order} - {*self.names}
        self.a_params = [m._parameters for m in self.a]
        self.b_params = [m._parameters for m in self.b]
        modules = (*self.a, *self.b, *self.drops)
        self._own = [m.__dict__ for m in modules]  # a "forward" in one replaces its class's
        self._hooks_seen: int | None = None

    def holds(self, layer: Linear, order: tuple[str, ...]) -> bool:
        """True when these adapters have the same modules in the layer as before."""
        if self.order is not order and self.order != order:
            return False
        parts: Any = layer._modules  # an attribute that is looked up there costs more
        stores = [parts[name]._modules for name in _STORES]
        if self._all is not None:
            return stores == self._all  # modules are equal when they are the same
        try:
            found = [*map(self.of, stores)]
        except KeyError:
            return False
        return found == [self.a, self.b, self.drops] and self._missing.isdisjoint(stores[0])

    def is_hooked(self) -> bool:
        """:func:`.plan.is_hooked` of any of the modules.

        A hook's registration takes a new number of torch's counter. Without one since the last call
        no module's hooks are read: they lie apart in memory, and reading them costs more than all
        other conditions together.
        """
        number = HookCounter.next_id
        if self._hooks_seen == number:
            for state in self._own:  # faster than a map of two arguments
                if "forward" in state:
                    return True
            return False
        if any(map(is_hooked, (*self.a, *self.b, *self.drops))):
            return True
        self._hooks_seen = number
        return False

    def is_plain(self) -> bool:
        """True for linears without a bias of their own and no dropout at work."""
        drops = self.drops
        return (
            {*map(type, self.a), *map(type, self.b)} <= _LINEAR
            and ({*map(type, drops)} <= _NO_DROPOUT or all(map(_rests, drops)))
            and [*map(_bias, self.b_params)].count(None) == len(self.b_params)
        )


def _values(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that takes these keys' values from a dict, in C where there are several."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda found: tuple(found[name] for name in names)


def _rests(drop: nn.Module) -> bool:
    """True for a module that passes x on: no dropout, or one in evaluation mode."""
    return drop.__class__ is nn.Identity or (drop.__class__ is nn.Dropout and not drop.training)


def _packed_reason(base: Any, x: Tensor) -> str | None:
    """:func:`base_reason` of a quantised layer, for products of x."""
    found = read(base)
    if isinstance(found, str):
        return found
    if found.packed.quantises_input:
        return "its base layer quantises X, all rows of the batch together"
    return found.packed.why_not_takes(x)


def mixed_reason(layer: Linear, x: Tensor, names: AdapterNames) -> str | None:
    """The reason that a mixed batch is not one operation in this layer; None when it is."""
    base: Any = layer.base_layer
    if is_recording():
        return "a tracer records the plain formula"
    if in_transform():
        return IN_TRANSFORM
    quantised = reader_of(base) is not None
    of_base = _packed_reason(base, x) if quantised else base_reason(base)
    if of_base is not None:
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
