"""An MLP's linears and activation as one operation, to train (:mod:`peftkern.ops.lora_mlp`).

An MLP is known by what its class's forward computes (:mod:`.mlp_formula`). With an adapter on one
of its linears the module gets another class, a subclass of its own, in which only ``forward``
differs: a call with gradients runs as one operation when all of its parts allow that, and else the
original forward runs. That is decided in every call, from the modules as they are then.
"""

from __future__ import annotations

import copyreg
import functools
import logging
from abc import ABCMeta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import Parameter

from ...ops import autocast
from ...ops.bases.formats import reader_of
from ...ops.lora_mlp import Part, lora_mlp
from ...ops.notes import logger, note_once
from ...ops.projection import Plain, Projection
from ...utils.gathering import shares_weights
from ...utils.handing import HERE
from ...utils.zero3 import gather_for, is_gathered_alone
from ..base_layer import walk
from .linear import Linear
from .mlp_formula import Formula, formula_of
from .parallel import ParallelLinear
from .plan import base_reason, base_weight, calls_more, is_hooked, weight_layout
from .ran import BLOCK, UNTOLD, in_parts

_TRANSFORMERS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_TORCH: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu"}
_activations: dict[tuple[type, Any], str | None] = {}  # {(class, its forward): the name}


def activation_name(module: Any) -> str | None:
    """The name of an activation in :data:`peftkern.ops.mlp_torch.ACTIVATIONS`; None without one.

    An activation whose class got another forward has none.
    """
    cls = module.__class__
    try:
        name = _activations[cls, cls.forward]
    except KeyError:
        name = _activations[cls, cls.forward] = _name_of(cls)
    return "gelu_tanh" if name and cls is nn.GELU and module.approximate != "none" else name


def _name_of(cls: Any) -> str | None:
    if cls not in _TORCH and cls.__module__ != "transformers.activations":
        return None
    forward = cls.forward
    own = forward.__module__ == cls.__module__ and forward.__qualname__ == f"{cls.__name__}.forward"
    if not own or hasattr(forward, "__wrapped__"):
        return None
    return _TORCH.get(cls) or _TRANSFORMERS.get(cls.__name__)


# ------------------------------------------------------------------------------ the class

_classes: dict[type, Any] = {}  # {class of MLPs: its subclass}


def _class_of(base: Any) -> Any:
    """The subclass of ``base``, whose forward has a formula."""
    if base in _classes:
        return _classes[base]
    formula, own = formula_of(base), base.forward
    assert formula is not None

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is kept, and separate operations have fast ways for few rows.
        # With dropout it is one operation nevertheless: both passes of a reentrant checkpoint, of
        # which the first has no gradients, must give the same numbers.
        if (
            is_compiling()
            or kwargs
            or len(args) != 1
            or not (torch.is_grad_enabled() or self.training)
            or base.forward is not own
        ):
            return base.forward(self, *args, **kwargs)
        parts = _parts(self, args[0], formula)
        if parts is None:
            _note(self)
            return base.forward(self, *args)
        y = lora_mlp(args[0], *parts)
        self.__dict__[BLOCK] = ""
        return y if formula.then is None else getattr(self, formula.then)(y)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        """Copies and pickles name the original class, which a process can find."""
        make, args, *rest = base.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__ and args[0] is made:  # type: ignore[attr-defined]
            make, args = _new, (base, *args[1:])
        # a __reduce__ of the class's own makes modules of the original class
        make, args = base if make is made else make, tuple(base if a is made else a for a in args)
        return (make, args, *rest)

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "peftkern_mlp_own": own,
        "peftkern_mlp_of": base,
    }
    made: Any = type(base)(base.__name__, (base,), {**names, **members})
    _classes[base] = made
    return made


def _extends(base: Any) -> bool:
    """True when a subclass can be made and nothing but torch and Python takes note of it."""
    # DeepSpeed leaves one in nn.Module, which does nothing once the model has been built
    own = (cls for cls in base.__mro__ if cls not in (nn.Module, object))
    return type(base) in (type, ABCMeta) and not any("__init_subclass__" in c.__dict__ for c in own)


def _new(base: Any, *args: Any) -> Any:
    """An empty module of the subclass of ``base``, or of ``base`` if it has none here."""
    cls = _class_of(base) if formula_of(base) is not None and _extends(base) else base
    return cls.__new__(cls, *args)


def _formula(module: nn.Module) -> Formula | None:
    """The formula of a module that has the class; None for others."""
    base = getattr(module.__class__, "peftkern_mlp_of", None)
    return None if base is None else formula_of(base)


def form_blocks(model: nn.Module, layer_cls: type) -> None:
    """Let each MLP in ``model`` with an adapted linear train as one operation where it can."""
    for _, module in walk(model, into_layers=False):
        cls, children = module.__class__, module._modules
        if hasattr(cls, "peftkern_mlp_of") or "forward" in module.__dict__:
            continue
        adapted = {name for name, child in children.items() if isinstance(child, layer_cls)}
        formula = formula_of(cls) if adapted else None
        if (
            formula is not None
            and adapted & {*formula.linears}
            and {*formula.linears} <= {*children}
        ):
            if _extends(cls):
                module.__class__ = _class_of(cls)
            else:
                reason = f"{cls.__name__} has a metaclass or __init_subclass__"
                note_once("an MLP trains as separate operations: %s", reason)


def release_blocks(model: nn.Module, everywhere: bool = False) -> None:
    """Give MLPs without an adapted linear, or all of them, their own class again."""
    for module in model.modules():
        cls = module.__class__
        if "peftkern_mlp_of" not in cls.__dict__:
            continue
        formula = _formula(module)
        if everywhere or formula is None or not _adapted(module, formula):
            module.__class__ = cls.__dict__["peftkern_mlp_of"]
            module.__dict__.pop(BLOCK, None)


def _adapted(module: nn.Module, formula: Formula) -> bool:
    children = module._modules
    layers = (children.get(name) for name in formula.linears)
    return any(_is_lora(layer) or isinstance(layer, ParallelLinear) for layer in layers)


def _is_lora(layer: Any) -> bool:
    return getattr(layer.__class__, "forward", None) is Linear.forward


# ------------------------------------------------------------------------------ a call


def _parts(module: Any, x: Tensor, formula: Formula) -> tuple[Any, ...] | None:
    """The arguments of :func:`lora_mlp` after x; None when the call runs as separate operations.

    :func:`why_separate` gives the reason in words and must test the same conditions.
    """
    children = module.__dict__["_modules"]
    act = children.get(formula.act)
    if act is None or HERE.blocks or calls_more(act):
        return None
    name = activation_name(act)
    if name is None:
        return None
    if is_gathered_alone(module) and not _gather(module):
        return None
    parts: list[Part] = []
    adapted, drops, inside = 0, False, x.requires_grad
    for of in formula.linears:
        layer = children.get(of)
        if layer is None or calls_more(layer):
            return None
        if layer.__class__.forward is Linear.forward:
            call = layer.fused_call(x)
            if call is None or call[0].requires_grad:
                return None
            adapted += 1
            drops = drops or call[5] > 0.0
            if not inside and of is not formula.down:
                inside = call[2].requires_grad or call[3].requires_grad
            parts.append(Projection(*call))
            continue
        plain = _plain(layer, x)
        if plain is None:
            return None
        parts.append(plain)
    # with nothing to train before down, the separate operations keep down's input alone
    if not adapted or not (inside if torch.is_grad_enabled() else drops):
        return None
    up = parts[1] if formula.up is not None else None
    return parts[0], up, parts[-1], name, formula.packed


def _gather(module: Any) -> bool:
    """True when the weights that ZeRO-3 divides are whole in this call of an MLP."""
    return why_separate(module) is None and gather_for(module, module.parameters())


def _plain(layer: Any, x: Tensor) -> Plain | None:
    if reader_of(layer) is not None:
        found = None if is_hooked(layer) else base_weight(layer, x)
        return None if found is None else Plain(*found, False)
    transposed = weight_layout(layer.__class__)
    weight = layer._parameters.get("weight")
    if transposed is None or weight.__class__ is not Parameter or weight.requires_grad:
        return None
    dtype = weight.dtype
    if weight.is_meta or not dtype.is_floating_point:
        return None
    if x.dtype is not dtype and (not autocast.is_on(x) or x.dtype == torch.float64):
        return None
    return Plain(weight, layer._parameters["bias"], transposed)


def _note(module: Any) -> None:
    """Log why an MLP trains as separate operations, once for each reason.

    If other code has taken its adapters out, it gets its own class again.
    """
    cls, formula = module.__class__, _formula(module)
    if formula is not None and not _adapted(module, formula):
        if "peftkern_mlp_of" in cls.__dict__:
            module.__class__ = cls.__dict__["peftkern_mlp_of"]
        return
    module.__dict__.pop(BLOCK, None)
    shared, told = shares_weights(), logger.isEnabledFor(logging.INFO)
    reason = why_separate(module) if shared or told else None
    if shared:
        module.__dict__[BLOCK] = reason or UNTOLD
    if told and reason is not None:
        note_once("an MLP trains as separate operations: %s", reason)


def why_separate(module: Any) -> str | None:
    """The reason that an MLP with adapters does not train as one operation; None when it does."""
    formula = _formula(module)
    if formula is None:
        return f"the forward of {type(module).__name__} is not known"
    if "forward" in module.__dict__ or module.__class__.peftkern_mlp_of.forward is not _own(module):
        return "the forward of the MLP was replaced"
    children = module._modules
    act = children.get(formula.act)
    if act is None or activation_name(act) is None:
        return f"the activation {type(act).__name__} is not known"
    if calls_more(act):
        return f"{formula.act} has hooks or an overridden forward"
    for name in formula.linears:
        layer: Any = children.get(name)
        if layer is None or calls_more(layer):
            return f"{name} has hooks or an overridden forward"
        reason = _lora_reason(layer) if _is_lora(layer) else _plain_reason(layer)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _own(module: Any) -> Any:
    return module.__class__.peftkern_mlp_own


def _lora_reason(layer: Any) -> str | None:
    reason: str | None = layer.decline_reason()
    if reader_of(layer.base_layer) is not None:
        return reason
    if reason is None and layer.base_layer.weight.requires_grad:
        return "its weight requires a gradient"
    return reason


def _plain_reason(layer: Any) -> str | None:
    if isinstance(layer, ParallelLinear):
        return "ranks share it out (tensor parallelism)"
    if reader_of(layer) is not None:
        return base_reason(layer)
    if weight_layout(layer.__class__) is None:
        return f"a {type(layer).__name__} computes its product itself"
    weight = layer._parameters.get("weight")
    if type(weight) is not Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain Parameter"
    if weight.is_meta:
        return "its weight is on the meta device (offloaded or not loaded yet)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.requires_grad:
        return "its weight requires a gradient"
    return None


def _in_parts(module: Any, formula: Formula) -> bool:
    """True when this process has only parts of the weights of an MLP's adapted linears."""
    layers = (module._modules.get(name) for name in formula.linears)
    return any(_is_lora(layer) and in_parts(layer) for layer in layers)


class MlpShape(NamedTuple):
    """The numbers of an MLP, by which ``peftkern tune`` makes one."""

    K: int
    ns: tuple[int, ...]  # rows of each linear's weight, down's last
    adapted: tuple[bool, ...]  # of each linear
    act: str
    packed: bool


def shapes_of_blocks(model: nn.Module) -> dict[MlpShape, None]:
    """The different MLPs with adapters in a model, whose weights may be on the meta device."""
    found: dict[MlpShape, None] = {}
    for module in model.modules():
        formula = _formula(module)
        if formula is None:
            continue
        act = activation_name(module._modules[formula.act])
        layers: list[Any] = [module._modules[name] for name in formula.linears]
        if act is not None and all(hasattr(layer, "out_features") for layer in layers):
            shape = tuple(layer.out_features for layer in layers)
            adapted = tuple(map(_is_lora, layers))
            found[MlpShape(layers[0].in_features, shape, adapted, act, formula.packed)] = None
    return found


def describe_blocks(model: nn.Module) -> dict[int, tuple[bool, str]]:
    """{id of an adapted linear: (True when its MLP is one operation, words for ``explain``)}."""
    found = {}
    for module in model.modules():
        formula = _formula(module)
        if formula is None:
            continue
        names = [*formula.linears]
        names.insert(-1, formula.act)
        reason = module.__dict__.get(BLOCK) if _in_parts(module, formula) else None
        reason = why_separate(module) if reason is None else reason or None
        words = f"; not one operation with its MLP: {reason}"
        if reason is None:
            words = f"; trains as one operation with its MLP ({', '.join(names)})"
        for name in formula.linears:
            layer = module._modules.get(name)
            if _is_lora(layer) or isinstance(layer, ParallelLinear):
                found[id(layer)] = reason is None, words
    return found
