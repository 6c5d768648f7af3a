"""How ``adapter_names`` reach the layers: by the thread that the call runs in.

Hooks on the layers would be seen by every thread that calls the model meanwhile, and a model has
hundreds of layers to put them on. Instead a block notes which layer gets which names, and a layer
looks there when it is called; while no block is open anywhere, that is one look at an empty dict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn

# thread -> its open blocks, the innermost last; each is {layer: names}
OPEN: dict[int, list[Mapping[nn.Module, Any]]] = {}


@contextmanager
def handing(names: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within the block each of these layers, called in this thread, gets its ``adapter_names``."""
    me = get_ident()
    blocks = OPEN.setdefault(me, [])
    blocks.append(names)
    try:
        yield
    finally:
        # by identity: blocks that generators hold open need not end in the order of their start
        blocks[:] = [b for b in blocks if b is not names]
        if not blocks and OPEN.get(me) is blocks:
            del OPEN[me]


def hand_over(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call of ``layer`` with the ``adapter_names`` that a block has for it; names
    given with the call itself hold."""
    if "adapter_names" not in kwargs:
        for block in reversed(OPEN.get(get_ident(), ())):
            if layer in block:
                return {**kwargs, "adapter_names": block[layer]}
    return kwargs
