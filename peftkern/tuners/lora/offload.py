"""What accelerate's hooks do in a module's call, done where its weights are read or written here.

They load offloaded weights, and in a model over several devices they move the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...utils.private import forward_of, hook_of
from ..base_layer import all_modules


def offloading(module: Any) -> list[Any]:
    """The hooks by which accelerate keeps the module's weights in host memory or on disk."""
    if hook_of(module) is None:
        return []
    return [one for one in _hooks(module) if getattr(one, "offload", False)]


def _hooks(module: Any) -> Any:
    hook = hook_of(module)  # one, or several in one
    return getattr(hook, "hooks", (hook,))


@contextmanager
def onloaded(layer: Any) -> Iterator[None]:
    """A context in which the weights of ``layer`` and its base are on their execution device.

    Values written to the base layer are kept in host memory afterwards, even when they came from
    disk: the files of a checkpoint are not rewritten.
    """
    held: list[Any] = [m for m in all_modules(layer) if m is not layer and offloading(m)]
    for module in held:
        hook_of(module).pre_forward(module)
    try:
        yield
    finally:
        base: Any = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        for module in held:
            for hook in offloading(module) if module is base else ():
                tensors = dict(module.named_parameters(recurse=False))
                if hook.offload_buffers:
                    tensors.update(module.named_buffers(recurse=False))
                hook.weights_map = {name: tensor.data.cpu() for name, tensor in tensors.items()}
            hook_of(module).post_forward(module, torch.empty(0))


def is_away(layer: Any) -> bool:
    """True when accelerate places weights or inputs in the calls of modules within ``layer``."""
    return any(module is not layer and _places(module) for module in layer.modules())


def _places(module: Any) -> bool:
    return "forward" in module.__dict__ and all(
        hasattr(one, "execution_device") for one in _hooks(module)
    )


def is_only_placed(module: Any) -> bool:
    """True when a call of the module is its class's forward and accelerate's placing."""
    return (
        _places(module)
        and _own_forward(module) is None
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def _own_forward(module: Any) -> Any:
    """The forward that somebody gave the module before accelerate's, or None."""
    own = forward_of(module)
    return None if getattr(own, "__func__", None) is type(module).forward else own


@contextmanager
def in_place(layer: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """A context for one call that reads the weights within ``layer`` without its modules' calls.

    The weights are on their execution device, and the modules have their own forwards, which place
    nothing. Yields the arguments on the device of the innermost base layer.
    """
    base = layer.get_base_layer()
    held = [(m, m.__dict__["forward"]) for m in layer.modules() if m is not layer and _places(m)]
    loaded = []
    try:
        for module, _ in held:
            given = (args, kwargs) if module is base else ((), {})
            moved = hook_of(module).pre_forward(module, *given[0], **given[1])
            loaded.append(module)
            if module is base:
                args, kwargs = moved
            own = _own_forward(module)
            del module.forward
            if own is not None:
                module.forward = own
        yield args, kwargs
    finally:
        for module, forward in held:
            module.forward = forward
        for module in loaded:
            hook_of(module).post_forward(module, torch.empty(0))
