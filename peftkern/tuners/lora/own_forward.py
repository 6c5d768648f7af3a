"""Whether a layer computes as its class is known to: what merging and some starts rely on."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...ops.bases.formats import is_packed
from ...utils.private import CONV_FORWARD

# {kind of layer: the methods with which it computes with its weight}
_FORWARDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("forward",),
    Conv1D: ("forward",),
    nn.Embedding: ("forward",),
    nn.Conv1d: ("forward", CONV_FORWARD),
    nn.Conv2d: ("forward", CONV_FORWARD),
    nn.Conv3d: ("forward", CONV_FORWARD),
}


def own_forward(base: Any) -> str | None:
    """Words for a subclass of a known layer that overrides its forward; None for known layers.

    For such a subclass it is not known that adding to its weight adds to its output.
    """
    if isinstance(base, nn.Module) and is_packed(base):
        return None  # a known format's weight is what the layer multiplies with
    for kind, methods in _FORWARDS.items():
        if not isinstance(base, kind):
            continue
        cls: Any = type(base)
        if all(getattr(cls, name, None) is getattr(kind, name, None) for name in methods):
            return None
        if kind is nn.Embedding and hasattr(base, "embed_scale"):  # the update is scaled too
            return None
        return f"a {cls.__name__}, which has another forward than {kind.__name__}"
    return None
