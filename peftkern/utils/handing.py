"""``handing``: passes ``adapter_names`` to the layers of a call, through the thread that runs it.

Hooks on the layers would act in all threads that call the model meanwhile, and would have to be set
on hundreds of layers. Instead a context notes the names for each layer, and a layer reads them when
it is called. Without an open context a layer only reads an empty tuple.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Here(threading.local):
    # Runs once in each thread. With a class attribute instead, torch.compile before torch 2.13
    # would assume the same value in all threads, without a guard.
    def __init__(self) -> None:
        # open contexts of this thread, the innermost last; each is {layer: names} or
        # {layer: {keyword: value}}
        self.blocks: tuple[Mapping[nn.Module, Any], ...] = ()


# a threading.local and not a ContextVar, because torch.compile can trace it
HERE = _Here()


@contextmanager
def handing(names: Mapping[nn.Module, Any]) -> Iterator[None]:
    """A context in which calls of these layers in this thread get the given names or keywords.

    ``names`` is {layer: its ``adapter_names``, or a dict of keywords}.
    """
    HERE.blocks = (*HERE.blocks, names)
    try:
        yield
    finally:
        # removed by identity: contexts in generators need not end in reverse order
        HERE.blocks = tuple(b for b in HERE.blocks if b is not names)


def hand_over(layer: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The ``kwargs`` of a call of ``layer`` with those of the open contexts added.

    Keywords of the call itself have precedence, then those of inner contexts.
    """
    for block in reversed(HERE.blocks):
        if layer in block:
            found = block[layer]
            given = found if isinstance(found, dict) else {"adapter_names": found}
            kwargs = {**given, **kwargs}
    return kwargs
