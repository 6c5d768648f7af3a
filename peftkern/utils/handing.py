"""How ``adapter_names`` reach the layers: by the thread that the call runs in.

Hooks on the layers would be seen by every thread that calls the model meanwhile, and a model has
hundreds of layers to put them on. Instead a block notes which layer gets which names, and a layer
looks there when it is called; without an open block that is one look at an empty tuple.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Here(threading.local):
    # In each thread, when it first looks. As a default of the class, torch.compile before torch
    # 2.13 would take it for what every thread has, without a guard.
    def __init__(self) -> None:
        # open blocks of this thread, the innermost last: {layer: names, or {keyword: value}} each
        self.blocks: tuple[Mapping[nn.Module, Any], ...] = ()


# a threading.local, and no ContextVar, because torch.compile traces it
HERE = _Here()


@contextmanager
def handing(names: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the block each of these layers, called in this thread, gets its ``adapter_names``, or
    the keywords that are here for it."""
    HERE.blocks = (*HERE.blocks, names)
    try:
        yield
    finally:
        # by identity: blocks that generators hold open need not end in the order of their start
        HERE.blocks = tuple(b for b in HERE.blocks if b is not names)


def hand_over(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call of ``layer`` with the ``adapter_names`` that the innermost block has for
    it, and other keywords likewise; what is given with the call itself holds."""
    for block in reversed(HERE.blocks):
        if layer in block:
            found = block[layer]
            given = found if isinstance(found, dict) else {"adapter_names": found}
            kwargs = {**given, **kwargs}
    return kwargs
