"""Linear layers that are no ``nn.Linear``: those of libraries that quantise, known by their names.

The libraries are not imported. LoRA's ``Linear`` takes such a layer as it takes an ``nn.Linear``:
as one operation where the format is read (:mod:`peftkern.ops.bases.formats`), else as a call of the
layer and an update beside it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# (first part of the class's module, the class's name or its start); subclasses count
_KINDS = (
    ("aqlm", "QuantizedLinear"),
    ("auto_gptq", "QuantLinear"),
    ("awq", "WQLinear_"),
    ("eetq", "EetqLinear"),
    ("eetq", "EETQLinear"),
    ("gptqmodel", "BaseQuantLinear"),
    ("hqq", "HQQLinear"),
    ("neural_compressor", "PatchedLinear"),
    ("transformers", "EetqLinear"),
)


def is_linear_kind(module: nn.Module) -> bool:
    """True for a quantised linear layer that is no ``nn.Linear``."""
    found = [(c.__module__.partition(".")[0], c.__name__) for c in type(module).__mro__]
    if any("Embedding" in name for _, name in found):  # gptqmodel's derive from its linear layers
        return False
    return any(top == of and name.startswith(start) for top, name in found for of, start in _KINDS)


def features(module: Any) -> tuple[int, int]:
    """(K, N) of a layer for which :func:`is_linear_kind` is true.

    Raises:
        ValueError: the layer does not know yet, because its weight is not loaded.
    """
    for k, n in (("infeatures", "outfeatures"), ("in_features", "out_features")):
        if hasattr(module, k) and hasattr(module, n):
            return getattr(module, k), getattr(module, n)
    weight = getattr(module, "weight", None)
    if weight is None:
        raise ValueError(
            f"a {type(module).__name__} has no `in_features` and no weight: load or quantise the "
            "base model before it gets adapters"
        )
    k, n = weight.shape  # EETQ's layer in transformers: [K, N]
    return k, n
