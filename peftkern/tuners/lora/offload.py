"""Loading of weights that accelerate offloaded, while they are read and written here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...utils.private import hook_of


def _offloads(module: Any) -> bool:
    """True when accelerate keeps the weights of this module in host memory or on disk."""
    return bool(getattr(hook_of(module), "offload", False))


@contextmanager
def onloaded(layer: Any) -> Iterator[None]:
    """A context in which the weights of ``layer`` and its base are on their execution device.

    Values written to the base layer are kept in host memory afterwards, even when they came from
    disk: the files of a checkpoint are not rewritten.
    """
    held: list[Any] = [m for m in layer.modules() if m is not layer and _offloads(m)]
    for module in held:
        hook_of(module).pre_forward(module)
    try:
        yield
    finally:
        base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        for module in held:
            hook = hook_of(module)
            if module is base:
                tensors = dict(module.named_parameters(recurse=False))
                if hook.offload_buffers:
                    tensors.update(module.named_buffers(recurse=False))
                hook.weights_map = {name: tensor.data.cpu() for name, tensor in tensors.items()}
            hook.post_forward(module, torch.empty(0))
