"""Loading of weights that accelerate offloaded, while they are read and written here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...utils.private import forward_of, hook_of


def _offloading(module: Any) -> list[Any]:
    """The hooks by which accelerate keeps the module's weights in host memory or on disk."""
    hook = hook_of(module)  # one, or several in one
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)]


@contextmanager
def onloaded(layer: Any) -> Iterator[None]:
    """A context in which the weights of ``layer`` and its base are on their execution device.

    Values written to the base layer are kept in host memory afterwards, even when they came from
    disk: the files of a checkpoint are not rewritten.
    """
    held: list[Any] = [m for m in layer.modules() if m is not layer and _offloading(m)]
    for module in held:
        hook_of(module).pre_forward(module)
    try:
        yield
    finally:
        base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        for module in held:
            for hook in _offloading(module) if module is base else ():
                tensors = dict(module.named_parameters(recurse=False))
                if hook.offload_buffers:
                    tensors.update(module.named_buffers(recurse=False))
                hook.weights_map = {name: tensor.data.cpu() for name, tensor in tensors.items()}
            hook_of(module).post_forward(module, torch.empty(0))


def is_away(layer: Any) -> bool:
    """True when accelerate would load weights within ``layer`` in its modules' own calls."""
    return any(loads(module) for module in layer.modules())


def loads(module: Any) -> bool:
    """True when accelerate loads the module's own weights in its calls."""
    return "forward" in module.__dict__ and bool(_offloading(module))


@contextmanager
def in_place(layer: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """A context for one call that reads the weights within ``layer`` without its modules' calls.

    The weights are on their execution device, and the modules have their own forwards, which load
    nothing. Yields the arguments on the device of the innermost base layer.
    """
    base = layer.get_base_layer()
    held = [(m, m.__dict__["forward"]) for m in layer.modules() if loads(m)]
    loaded = []
    try:
        for module, _ in held:
            given = (args, kwargs) if module is base else ((), {})
            moved = hook_of(module).pre_forward(module, *given[0], **given[1])
            loaded.append(module)
            if module is base:
                args, kwargs = moved
            own = forward_of(module)
            del module.forward
            if getattr(own, "__func__", None) is not type(module).forward:
                module.forward = own  # somebody else's, which accelerate's stood before
        yield args, kwargs
    finally:
        for module, forward in held:
            module.forward = forward
        for module in loaded:
            hook_of(module).post_forward(module, torch.empty(0))
