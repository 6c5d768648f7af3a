"""The kinds of quantised base layers, by name.

The status of a model reports them. peftkern does not read packed weights: such a layer's own
forward is called.
"""

from __future__ import annotations

from torch import nn


class QuantizationBackend:
    """A way to pack weights; ``backend_name`` is HF PEFT's name for it."""

    backend_name: str = ""
    # (first part of the module, name) of the base layers' classes
    layers: tuple[tuple[str, str], ...] = ()


class Bnb8bitBackend(QuantizationBackend):
    backend_name = "bnb 8bit"
    layers = (("bitsandbytes", "Linear8bitLt"),)


class Bnb4bitBackend(QuantizationBackend):
    backend_name = "bnb 4bit"
    layers = (("bitsandbytes", "Linear4bit"), ("bitsandbytes", "LinearNF4"))


class HqqBackend(QuantizationBackend):
    backend_name = "hqq"
    layers = (("hqq", "HQQLinear"),)


class TorchaoBackend(QuantizationBackend):
    """Weights of torchao, known by the weight's class (a tensor subclass), not the layer's."""

    backend_name = "torchao"


def resolve_quantization_backend(base_layer: nn.Module) -> QuantizationBackend | None:
    """The kind of quantisation of a layer; None without one, and for unknown kinds."""
    classes = {(c.__module__.split(".")[0], c.__name__) for c in type(base_layer).__mro__}
    for backend in (Bnb8bitBackend, Bnb4bitBackend, HqqBackend):
        if classes.intersection(backend.layers):
            return backend()
    weight = getattr(base_layer, "weight", None)
    packed = type(weight).__module__.split(".")[0] == "torchao"
    data = type(getattr(weight, "data", None)).__module__.split(".")[0] == "torchao"
    return TorchaoBackend() if packed or data else None
