"""The format of a base layer's weight, and the weight as an operation takes it.

A format is a file of this package with a function ``read(module) -> Found | str``: what the layer
holds now, or the reason that it cannot be read. :data:`BY_LAYER` finds it by the layer's class,
:data:`BY_WEIGHT` by the class of its weight, both by name, so that no owner is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ...utils.private import make_wrapper
from ..tracing import is_compiling
from .weight import BaseWeight, Packed


class Found(NamedTuple):
    """What a layer holds: its packed weight, and its bias [N] or None."""

    packed: Packed
    bias: Tensor | None


class Unusable(str):
    """A reason for which the layer itself could not be called either: a call raises it."""

    __slots__ = ()


class OwnProduct(str):
    """A reason to leave the product to the layer itself, whose weight can be read all the same.

    Attributes:
        found: what the layer holds, to merge into or to make dense.
    """

    __slots__ = ("found",)

    found: Found

    def __new__(cls, reason: str, found: Found) -> OwnProduct:
        made = super().__new__(cls, reason)
        made.found = found
        return made


Read = Callable[[nn.Module], Found | str]

# (first part of the class's module, class) -> the file of the format; subclasses count
BY_LAYER: dict[tuple[str, str], str] = {
    ("auto_gptq", "QuantLinear"): "gptq",
    ("awq", "WQLinear_Exllama"): "awq",
    ("awq", "WQLinear_ExllamaV2"): "awq",
    ("awq", "WQLinear_GEMM"): "awq",
    ("awq", "WQLinear_GEMV"): "awq",
    ("awq", "WQLinear_GEMVFast"): "awq",
    ("awq", "WQLinear_IPEX"): "awq",
    ("awq", "WQLinear_Marlin"): "awq",
    ("bitsandbytes", "Linear4bit"): "bnb4",
    ("bitsandbytes", "Linear8bitLt"): "bnb8",
    ("gptqmodel", "AWQuantLinear"): "awq",
    ("gptqmodel", "BaseQuantLinear"): "gptq",
    ("hqq", "HQQLinear"): "hqq",
    ("optimum", "QLinear"): "quanto",
    ("peftkern", "Fp8Linear"): "fp8_linear",
    ("transformers", "FP8Linear"): "finegrained_fp8",
}
BY_WEIGHT: dict[tuple[str, str], str] = {
    ("torchao", "Float8Tensor"): "torchao_fp8",
    ("torchao", "TorchAOBaseTensor"): "torchao_int",
}
# the class of a linear layer's attribute `quantization_scheme` -> the file
BY_SCHEME: dict[tuple[str, str], str] = {
    ("compressed_tensors", "QuantizationScheme"): "compressed",
}
# the package of a function that an owner puts in the place of a module's forward -> the file
BY_FORWARD: dict[str, str] = {"compressed_tensors": "compressed"}

_readers: dict[tuple[type, type, type], Read | None] = {}
_DENSE = (Parameter, Tensor, type(None))


def reader_of(module: nn.Module) -> Read | None:
    """The function that reads the layer's weight; None for a layer of no known format."""
    kinds: Any = (
        module.__class__,
        type(module._parameters.get("weight")),  # compilers trace no __class__ of some tensors
        module.__dict__.get("quantization_scheme").__class__,
    )
    if is_compiling():  # it traces no imports, and would guard a write to the table
        return None if _file_of(*kinds) is None else _in_a_compiler
    try:
        return _readers[kinds]
    except KeyError:
        found = _readers[kinds] = _look_up(*kinds)
        return found


def _look_up(layer: type, weight: type, scheme: type) -> Read | None:
    name = _file_of(layer, weight, scheme)
    if name is None:
        return None
    read: Read = import_module(f"{__package__}.{name}").read
    return _shard if weight.__name__ == "DTensor" else read


def _file_of(layer: type, weight: type, scheme: type) -> str | None:
    tables = [(layer, BY_LAYER), (weight, BY_WEIGHT)]
    if issubclass(layer, nn.Linear):
        tables.append((scheme, BY_SCHEME))
    for kind, table in tables:
        if kind is nn.Linear or kind in _DENSE:
            continue
        for cls in kind.__mro__:
            name = table.get((cls.__module__.partition(".")[0], cls.__name__))
            if name is not None:
                return name
    return None


def _in_a_compiler(module: nn.Module) -> str:
    """The reason that no format reads a weight while torch.compile traces."""
    return "torch.compile traces the base layer's own forward, and the plain update"


def _shard(module: nn.Module) -> str:
    """The reason that no format reads a weight of which this process has a part."""
    shard = "its weight is a shard here (a DTensor), which FSDP gathers in the forward of"
    if module._forward_pre_hooks:
        return f"{shard} the layer itself"
    return Unusable(f"{shard} the module that fully_shard was given")


def read(module: nn.Module) -> Found | str:
    """What a layer of a known format holds now, or the reason that it cannot be read."""
    reader = reader_of(module)
    if reader is None:
        return f"the weight of a {type(module).__name__} is of no known format"
    return checked(reader, module)


def checked(reader: Read, module: nn.Module) -> Found | str:
    """:func:`read` with the layer's reader."""
    if make_wrapper is None:
        return "this torch has no tensors without data (Tensor._make_wrapper_subclass)"
    return reader(module)


def numbers(module: nn.Module) -> Found | str:
    """:func:`read` for the weight alone: also where the product is left to the layer."""
    found = read(module)
    return found.found if isinstance(found, OwnProduct) else found


def is_owners_forward(module: nn.Module) -> bool:
    """True when a module's ``forward`` of its own is an owner's, and reading stands in for it."""
    function: Any = getattr(module.__dict__.get("forward"), "__func__", None)
    home = str(getattr(function, "__globals__", {}).get("__name__", ""))
    name = BY_FORWARD.get(home.partition(".")[0])
    return name is not None and bool(
        import_module(f"{__package__}.{name}").is_owners_forward(module)
    )


def is_packed(module: nn.Module) -> bool:
    """True for a layer of a known format whose weight is no dense parameter."""
    reader = reader_of(module)
    if reader is None:
        return False
    found = checked(reader, module)
    return isinstance(found, str) or not found.packed.holds_dense


def as_weight(packed: Packed, x: Tensor) -> BaseWeight:
    """The weight as an operation on x [..., K] takes it."""
    return BaseWeight(packed, x.dtype)
