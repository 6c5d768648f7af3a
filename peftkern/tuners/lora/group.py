"""Projections that read the same tensor (q, k, v; gate, up) computed together when they train.

Which belong together is known from their names and their parent's; at every call it is checked that
they do. The first one called computes all of them (:func:`peftkern.ops.lora_group.lora_group`) and
the others fetch their output, if they come with the very same tensor. A set of which one came with
another tensor is left ungrouped from the next forward of the model on: not at once, because a
checkpointed block must be recomputed as it was computed.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.lora_group import Projection, lora_group

# names of children that commonly read one input, in the order in which models call them
SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
# parents whose queries read another tensor than their keys and values
_CROSS = re.compile(r"cross|encdec|encoder_attn|encoder_decoder", re.IGNORECASE)

# sets that broke their promise since the last forward of a model
_broken: list[Any] = []


class _Stash:
    """Outputs waiting for their layers, and what they were computed from."""

    __slots__ = ("x", "version", "autocast", "outputs")

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self.x, self.version, self.outputs = x, x._version, outputs
        self.autocast = torch.is_autocast_enabled(x.device.type)

    def fits(self, x: Tensor) -> bool:
        return (
            self.x is x
            and self.version == x._version
            and self.autocast == torch.is_autocast_enabled(x.device.type)
        )


class Group:
    """A set of sibling layers; each holds it as ``_group`` and asks it for its output."""

    def __init__(self, names: list[str], layers: list[Any]) -> None:
        self.names, self.layers = names, layers
        self.off = False
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def describe(self, layer: Any) -> str:
        """What ``explain`` adds to the reason of a member."""
        others = [n for n, other in zip(self.names, self.layers, strict=True) if other is not layer]
        if self.off:
            return f"not grouped with {', '.join(others)}: their inputs differ"
        return f"trains as one operation with {', '.join(others)}"

    def output(self, layer: Any, x: Tensor, call: tuple[Any, ...]) -> Tensor | None:
        """The layer's output for x, or None when it is to be computed by itself.

        Args:
            layer: the member that was called.
            x: its input [..., K].
            call: its arguments of :func:`peftkern.ops.lora.lora_linear` after x.
        """
        local = self._local.__dict__
        stash = local.get("stash")
        index = self.layers.index(layer)
        if stash is not None:
            waiting = index in stash.outputs
            if waiting and stash.fits(x):
                y = stash.outputs.pop(index)
                if not stash.outputs:
                    local["stash"] = None
                return y
            local["stash"] = None
            if waiting:
                # computed as a group all the same: whether a call is grouped may depend on nothing
                # that differs between a checkpointed block and its recomputation
                _broken.append(self)
        calls = {index: call}
        for i, other in enumerate(self.layers):
            if i != index and (found := other.fused_call(x)) is not None:
                calls[i] = found
        if len(calls) < 2:
            return None
        first, *rest = lora_group(x, [Projection(*found) for found in calls.values()])
        local["stash"] = _Stash(x, dict(zip(list(calls)[1:], rest, strict=True)))
        return first


def settle() -> None:
    """Leave sets ungrouped that broke their promise. For the start of a model's forward."""
    while _broken:
        group = _broken.pop()
        if not group.off:
            group.off = True
            logging.getLogger("peftkern").info(
                "%s are not grouped: they were called with different inputs", ", ".join(group.names)
            )


def form_groups(model: nn.Module, layer_cls: type) -> None:
    """Give each set of adapted siblings in ``model`` a :class:`Group`, unless it has one."""
    for name, module in model.named_modules():
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
            known = layers[0].__dict__.get("_group")
            if known is not None and known.layers == layers:
                continue
            group = Group(present, layers)
            for layer in layers:
                layer.__dict__["_group"] = group
