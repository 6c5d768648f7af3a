"""``FusedLinear``, ``FusedParamWrapper``: peftkern's forward inside HF PEFT's own LoRA layers.

This is the only module that imports HF PEFT. It is imported only for a model that has HF PEFT's
layers.

A fused layer is HF PEFT's object with another class, a subclass of HF PEFT's. Its state and its API
stay HF PEFT's. Only ``forward`` differs: a call that
:class:`peftkern.tuners.lora.linear.Linear` or :class:`peftkern.tuners.lora.parameter.ParamWrapper`
runs as one operation runs so here too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as HFLinear
from peft.tuners.lora.layer import ParamWrapper as HFParamWrapper
from torch import Tensor
from torch.compiler import is_compiling

from ...ops.lora_mixed import lora_mixed
from .base import LoraLayer
from .linear import Linear
from .parameter import ParamWrapper, operation_of
from .plan import is_hooked
from .ran import FUSED as RAN_FUSED
from .row_adapters import AdapterNames, mixed_call

# attributes that the fused forward keeps in a layer; `give_back` removes them
_OWN = ("_plan", "_ran", "_group", "_held", "_noted_reason", "_noted_mixed")
# attributes of HF PEFT's layer that a call reads directly, not through its properties
_READ = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "lora_variant")


class Fused:
    """What a linear LoRA layer of HF PEFT becomes, beside HF PEFT's class; see :func:`take_over`.

    Calls that cannot be one operation (several active adapters, variants such as DoRA, a merged
    layer, ...) run HF PEFT's forward, and :meth:`decline_reason` says why.
    """

    _theirs: Any  # HF PEFT's class
    # HF PEFT's attributes
    active_adapters: Any
    disable_adapters: Any
    merged: Any
    lora_variant: Any

    # these functions read only attributes that both kinds of layers have
    forward = Linear.forward
    _quantised_call = Linear._quantised_call
    traced_call = Linear.traced_call
    product_call = Linear.product_call
    product_reason = Linear.product_reason
    decline_reason = Linear.decline_reason
    _note_decline = LoraLayer._note_decline
    __getstate__ = Linear.__getstate__

    def fused_call(self, x: Tensor) -> tuple[Any, ...] | None:
        state = self.__dict__
        active = state["_active_adapter"]
        if active.__class__ is list:
            # it is the list given to set_adapter, which a caller may have changed since
            plan = state["_plan"]
            if plan is not None and active != [plan.name]:
                state["_plan"] = None
        layer: Any = self  # Linear's function reads only attributes that both kinds have
        return Linear.fused_call(layer, x)

    def _variant_reason(self) -> str | None:
        for name in self.active_adapters:
            if name in self.lora_variant:
                return f"{type(self.lora_variant[name]).__name__} runs HF PEFT's forward"
        return None

    def delete_adapter(self, adapter_name: str) -> None:
        self._held = None  # it holds the adapter's modules
        self._theirs.delete_adapter(self, adapter_name)

    def _forward_general(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if not is_compiling():
            given = kwargs.get("adapter_names")
            if given is None:
                layer._note_decline()
            elif len(kwargs) == 1 and not args and self._mixes(x, given):
                names = _names.of(given)
                call = mixed_call(layer, x, names)
                if call is not None:
                    return lora_mixed(x, *call)
        y: Tensor = self._theirs.forward(self, x, *args, **kwargs)
        return y

    def _mixes(self, x: Tensor, names: Sequence[str]) -> bool:
        """True when HF PEFT would run this mixed batch on plain LoRA, without an error."""
        return (
            len(x) == len(names)
            and not self.disable_adapters
            and not self.merged
            and not any(n in self.lora_variant for n in names)
        )


class FusedLinear(Fused, HFLinear):
    """HF PEFT's ``lora.Linear`` with peftkern's fused forward."""

    _theirs = HFLinear


class FusedParamWrapper(HFParamWrapper):
    """HF PEFT's ``lora.ParamWrapper``, whose calls are one operation where ours are."""

    layer_kind = ParamWrapper.layer_kind
    decline_reason = ParamWrapper.decline_reason
    _note_decline = LoraLayer._note_decline
    _update = Linear._update
    __getstate__ = ParamWrapper.__getstate__

    def is_called_apart(self) -> bool:
        """True when a call runs more than this class's forward and HF PEFT's hook for names."""
        hooks = self._forward_pre_hooks
        if not hooks:
            return is_hooked(self)
        names = [h for h in hooks.values() if isinstance(h, partial) and [*h.keywords] == _NAMES]
        rest = (self._forward_hooks, self._backward_hooks, self._backward_pre_hooks)
        return len(names) < len(hooks) or any(rest) or "forward" in self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.disable_adapters:
            given = {**kwargs}
            names = given.pop("adapter_names", None)
            if names is not None and not is_compiling():
                names = _names.of(names)
            found = operation_of(self).run(self, args, given, names)
            if isinstance(found, Tensor):
                self.__dict__["_ran"] = RAN_FUSED
                return found
            if names is None and not self.merged and not is_compiling():
                self._note_decline()
        return HFParamWrapper.forward(self, *args, **kwargs)


_NAMES = ["adapter_names"]


class _Names(threading.local):
    """The names of this thread's last mixed batch.

    HF PEFT passes the same list to each of hundreds of layers, and one index serves all of them.
    """

    def __init__(self) -> None:  # runs once in each thread, see `utils.handing`
        self.known = AdapterNames(())
        self.inference = False

    def of(self, names: Sequence[str]) -> AdapterNames:
        if isinstance(names, AdapterNames):
            return names
        inference = torch.is_inference_mode_enabled()  # its tensors cannot be used outside of it
        if self.known != tuple(names) or self.inference != inference:
            self.known, self.inference = AdapterNames(names), inference
        return self.known


_names = _Names()


# {HF PEFT's class of layers: the class that a fused layer gets}
FUSED: dict[type, type] = {HFLinear: FusedLinear, HFParamWrapper: FusedParamWrapper}


def _fused_class(cls: type) -> type | None:
    """The class that a layer of HF PEFT's class gets when it is fused; None for other classes.

    HF PEFT's layers on bitsandbytes exist only where that is installed, and importing it takes
    seconds, so they get their class when the first is met.
    """
    if cls not in FUSED and cls.__module__ == "peft.tuners.lora.bnb":
        if cls.__name__ in ("Linear4bit", "Linear8bitLt"):
            doc = f"HF PEFT's ``{cls.__name__}`` with peftkern's fused forward."
            own = {"_theirs": cls, "__doc__": doc, "__module__": __name__}
            FUSED[cls] = type(f"Fused{cls.__name__}", (Fused, cls), own)
    return FUSED.get(cls)


def __getattr__(name: str) -> Any:
    """The classes for bitsandbytes by name, for ``pickle``."""
    if name in ("FusedLinear4bit", "FusedLinear8bitLt"):
        from peft.tuners.lora import bnb

        return _fused_class(getattr(bnb, name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_fused(layer: Any) -> bool:
    """True for a layer of a fused class, or of a subclass that other code has made of one."""
    return isinstance(layer, (*FUSED.values(),))


def why_not(layer: Any) -> str | None:
    """The reason that an HF PEFT LoRA layer cannot be fused with any adapter; None when it can."""
    cls = type(layer)
    if _fused_class(cls) is None and cls not in FUSED.values():
        return f"a {cls.__module__}.{cls.__qualname__} keeps its own forward"
    state = layer.__dict__
    if (
        any(name not in state for name in _READ)
        or state["_active_adapter"] is not layer.active_adapter
        or state["_disable_adapters"] is not layer.disable_adapters
        or "forward" in state
    ):
        return "its state or its forward is not where HF PEFT has it"
    return None


def take_over(layer: Any) -> None:
    """Give a layer the fused forward; :func:`why_not` must be None for it."""
    if not is_fused(layer):
        layer.__dict__.update(_plan=None, _ran=None, _group=None, _held=None)
        layer.__class__ = FUSED[type(layer)]


def give_back(layer: Any) -> None:
    """Make a fused layer one of HF PEFT's class again."""
    for name in _OWN:
        layer.__dict__.pop(name, None)
    layer.__class__ = next(theirs for theirs, ours in FUSED.items() if isinstance(layer, ours))
