"""Groups of projections that read the same tensor (q, k, v; gate, up), computed together.

Names of the layers and their parent suggest the groups; every call checks them. The first member
that is called computes all of them (:func:`peftkern.ops.lora_group.lora_group`). The others take
their output from it, if they are called with the same tensor. When one is called with another
tensor, the group is switched off at a later forward of the model. It is not switched off at once,
because a checkpointed block must be recomputed in the way in which it was computed.

Few rows without gradients (decoding) are computed together too, where the backend gains by it: in
eval mode, as in training mode it may be the first pass of a checkpoint. There a group ends at once
when two calls of its first member, one after the other, leave outputs that no member takes.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ...ops import autocast
from ...ops import backend as _backend
from ...ops.bases.weight import BaseWeight
from ...ops.lora_group import lora_group, lora_group_infer
from ...ops.projection import Projection
from ...utils.zero3 import is_gathered_alone
from ..base_layer import walk
from .ran import reason_of

# names of children that usually read the same input, in the order in which models call them
SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
# names of parents (cross attention) whose queries read another tensor than keys and values
_CROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)

# number of groups whose members were called with different tensors; when it has changed,
# `ungroup_broken` looks for them
_breaks = 0
_count_breaks = itertools.count(1)  # two threads with += could lose a count


class _Stash:
    """Outputs that wait for their layers, with the input and state they were computed from."""

    __slots__ = ("x", "version", "mode", "outputs")

    def __init__(self, x: Tensor, outputs: dict[int, tuple[Tensor, Any]]) -> None:
        self.x, self.version, self.mode, self.outputs = x, x._version, _mode(x), outputs

    @classmethod
    def of(cls, x: Tensor, calls: dict[int, Projection], rest: list[Tensor]) -> _Stash:
        """The outputs ``rest`` of all members in ``calls`` but the first, which has its own."""
        waiting = list(calls.items())[1:]
        return cls(x, {i: (y, _fingerprint(c)) for (i, c), y in zip(waiting, rest, strict=True)})

    def take(self, index: int, x: Tensor, call: Projection) -> Tensor | None:
        """The output of member ``index``; None when a call now would use other values for it."""
        y, was = self.outputs[index]
        if self.x is not x or self.version != x._version or self.mode != _mode(x):
            return None
        return y if was == _fingerprint(call) else None


def _mode(x: Tensor) -> tuple[bool, bool]:
    return torch.is_grad_enabled(), autocast.is_on(x)


def _fingerprint(call: Projection) -> tuple[Any, ...]:
    """The identity and version of a call's tensors, and its numbers."""
    # of a layer that ranks share out, the parts in `tensors` are made anew for each call
    held: list[Tensor] = [t for t in getattr(call, "held", call.tensors) if t is not None]
    if isinstance(call.weight, BaseWeight):  # made anew for each call, of the owner's tensors
        held[0:1] = call.weight.packed.tensors
    tensors = tuple((id(t), None if t.is_inference() else t._version) for t in held)
    return tensors + call.settings


class _Open:
    """An object that lives from a grouped forward until its backward or the end of its graph."""


class Group:
    """A set of sibling layers; each holds it as ``_group`` and takes its output from it."""

    def __init__(self, names: list[str], layers: list[Any]) -> None:
        self.names, self.layers = names, layers
        self.off = self.broken = False
        self.apart = False  # True: few rows without gradients are not computed together
        self._left = 0  # how often, one time after the other, outputs of few rows were left over
        self._fresh()

    def _fresh(self) -> None:
        self._local = threading.local()
        self._open: weakref.WeakSet[_Open] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_local", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def describe(self, layer: Any) -> str:
        """The words that ``explain`` adds to the line of a member."""
        others = [
            n
            for n, other in zip(self.names, self.layers, strict=True)
            if other is not layer and reason_of(other) is None
        ]
        if not others:
            return ""
        if is_gathered_alone(layer):
            return f"; not grouped with {', '.join(others)}: DeepSpeed gathers each by itself"
        if self.off:
            return f"; not grouped with {', '.join(others)}: their inputs differ"
        rows = 0 if self.apart else _backend.active.group_rows
        decodes = f", and decodes so with up to {rows} rows" if rows else ""
        return f"; trains as one operation with {', '.join(others)}{decodes}"

    def output(self, layer: Any, x: Tensor, call: Projection) -> Tensor | None:
        """The layer's output for ``x``; None when the layer must compute it alone.

        Args:
            layer: the member that was called.
            x: the layer's input [..., K].
            call: the result of :meth:`.linear.Linear.fused_call` for x.
        """
        if x.is_inference():  # it has no version to compare, and there is no backward
            return None
        local = self._local.__dict__
        stash = local.get("stash")
        index = self.layers.index(layer)
        if stash is not None:
            if index in stash.outputs:
                y = stash.take(index, x, call)
                if y is not None:
                    del stash.outputs[index]
                    if not stash.outputs:
                        local["stash"] = None
                    return y
            # A member was called with another tensor, or not at all. This call is grouped
            # nevertheless: a checkpointed block and its recomputation must decide in the same way.
            local["stash"] = None
            self._break()
        calls = self._calls(index, x, call)
        if len(calls) < 2:
            return None
        token = _Open()
        if torch.is_grad_enabled():
            self._open.add(token)
        first, *rest = self._run(x, list(calls.values()), token)
        local["stash"] = _Stash.of(x, calls, rest)
        return first

    def _run(self, x: Tensor, calls: list[Projection], token: Any) -> Any:
        """The outputs of these calls for x, in a forward that may have a backward."""
        return lora_group(x, calls, token)

    def few_output(self, layer: Any, x: Tensor, call: Projection) -> Tensor | None:
        """:meth:`output` in eval mode without gradients and dropout, for few rows.

        None when the layer must compute it alone, as for more rows.
        """
        rows = _backend.active.group_rows
        if self.apart or x.numel() > rows * x.shape[-1] or x.is_inference():
            return None
        local = self._local.__dict__
        stash = local.get("few")
        index = self.layers.index(layer)
        if stash is not None:
            y = stash.take(index, x, call) if index in stash.outputs else None
            if y is not None:
                del stash.outputs[index]
                if not stash.outputs:
                    local["few"], self._left = None, 0
                return y
            # Another tensor, or a member that was not called. Once is no reason to end the group:
            # an exception between two members does it too.
            local["few"] = None
            self._left += 1
            if self._left > 1:
                self.apart = True
                self._tell("decode as one operation")
                return None
        calls = self._calls(index, x, call)
        if len(calls) < 2 or any(c.p > 0.0 for c in calls.values()):
            return None
        first, *rest = lora_group_infer(x, list(calls.values()))
        local["few"] = _Stash.of(x, calls, rest)
        return first

    def _calls(self, index: int, x: Tensor, call: Projection) -> dict[int, Projection]:
        """The calls for x of the members that can be fused, ``call`` of member ``index`` first."""
        calls = {index: call}
        for i, other in enumerate(self.layers):
            if i == index or is_gathered_alone(other):
                continue
            if (found := other.fused_call(x)) is not None:
                calls[i] = Projection(*found)
        return calls

    def _tell(self, what: str) -> None:
        logging.getLogger("peftkern").info(
            "%s do not %s: they were called with different inputs", ", ".join(self.names), what
        )

    def _break(self) -> None:
        global _breaks
        if torch.is_grad_enabled() and not self.broken:
            self.broken = True
            _breaks = next(_count_breaks)

    def ungroup_if_broken(self) -> bool:
        """Switch a broken group off, unless a graph that it is part of waits for its backward.

        Returns False when it has to wait.
        """
        if not self.broken or self.off:
            return True
        if len(self._open):
            return False
        self.off = True
        self._fresh()  # frees outputs that wait for a layer that is never called
        logging.getLogger("peftkern").info(
            "%s are not grouped: they were called with different inputs", ", ".join(self.names)
        )
        return True


def ungroup_broken(model: nn.Module) -> None:
    """Switch off the broken groups of ``model``; called at the start of its forward."""
    if is_compiling():  # projections are not grouped in a compiled graph
        return
    state = model.__dict__
    if state.get("_breaks_seen", 0) == _breaks:
        return
    seen, groups = _breaks, {id(g): g for m in model.modules() if (g := _group_of(m)) is not None}
    if all([group.ungroup_if_broken() for group in groups.values()]):
        state["_breaks_seen"] = seen


def _group_of(module: nn.Module) -> Group | None:
    return module.__dict__.get("_group")


def form_groups(model: nn.Module, layer_cls: type) -> None:
    """Give each set of adapted siblings in ``model`` a :class:`Group`, unless they have one."""
    for name, module in walk(model, into_layers=False):
        if _CROSS.search(name):
            continue
        children = module._modules
        for names in SETS:
            if names[0] not in children and names[-1] not in children:
                continue
            present = [n for n in names if isinstance(children.get(n), layer_cls)]
            layers: list[Any] = [children[n] for n in present]
            if len(layers) < 2 or len({layer.in_features for layer in layers}) > 1:
                continue
            kinds = {getattr(layer, "group_class", Group) for layer in layers}
            if len(kinds) > 1 or None in kinds:
                continue
            known = layers[0].__dict__.get("_group")
            if known is not None and known.layers == layers:
                continue
            group = kinds.pop()(present, layers)
            for layer in layers:
                layer.__dict__["_group"] = group
