"""``handing``: passes ``adapter_names`` to the layers of a call, through the thread that runs it.

Hooks on the layers would act in all threads that call the model meanwhile, and would have to be set
on hundreds of layers. Instead a context notes the names for each layer, and a layer reads them when
it is called. Without an open context a layer only reads an empty tuple.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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


class TokenNames:
    """The adapter of each token, for a batch whose samples lie one after the other in one row.

    So they lie in transformers' continuous batching: a layer gets [1, T, ...], and a head that
    computes only the logits of some tokens [1, n, ...].

    Attributes:
        each: the names of the T tokens.
        kept: the names of the n tokens that have logits.
    """

    def __init__(self, each: Sequence[str], kept: Sequence[str]) -> None:
        self.each, self.kept = each, kept

    def for_head(self) -> TokenNames:
        """The same names for a layer that computes logits.

        A count alone cannot tell the two lists apart where they are as long as each other: a step
        of one token for each request, some of them pieces of prompts that go on.
        """
        return TokenNames(self.kept, self.each)

    def of(self, count: int) -> Sequence[str]:
        """The names of a layer's ``count`` tokens.

        Raises:
            ValueError: it is neither the number of all tokens nor of those with logits.
        """
        for names in (self.each, self.kept):
            if len(names) == count:
                return names
        raise ValueError(
            f"adapters were named for {len(self.each)} tokens ({len(self.kept)} with logits), and "
            f"a layer got {count}; allowed: layers that compute each token by itself"
        )

    def over(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``call`` of x's tokens, with ``adapter_names``: x [1, T, ...], [1, T] of ids, [T, K]."""
        in_one_row = x.dim() == (3 if x.is_floating_point() else 2)
        tokens = x[0] if in_one_row else x
        y = call(tokens, *args, adapter_names=self.of(len(tokens)), **kwargs)
        return y[None] if in_one_row else y


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
