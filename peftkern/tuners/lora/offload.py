"""Weights that accelerate keeps elsewhere, brought in while they are written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...utils.private import hook_of


def _offloads(module: Any) -> bool:
    """Whether accelerate keeps the weights of this module in host memory or on disk."""
    return bool(getattr(hook_of(module), "offload", False))


@contextmanager
def onloaded(layer: Any) -> Iterator[None]:
    """Within the block the weights of ``layer`` and of what it wraps are on their execution device.

    What was written to the base layer is kept afterwards in host memory, also when it came from
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
