"""``BufferDict``: tensors by adapter name that move and save with their module but do not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class BufferDict(nn.Module):
    """A dictionary of buffers, as ``nn.ParameterDict`` is one of parameters.

    Args:
        buffers: a mapping of names to tensors, or pairs of both. Order is kept; a plain ``dict`` is
            sorted by name, as in HF PEFT.
        persistent: True makes the buffers part of the state dict.
    """

    def __init__(
        self,
        buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | BufferDict | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Any:
        return self._buffers[key]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        delattr(self, key)  # forgets the name among the non-persistent ones as well

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Remove every buffer."""
        for key in list(self._buffers):
            del self[key]

    def pop(self, key: str) -> Any:
        """Remove the buffer ``key`` and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> Iterable[str]:
        return self._buffers.keys()

    def items(self) -> Iterable[tuple[str, Any]]:
        return self._buffers.items()

    def values(self) -> Iterable[Any]:
        return self._buffers.values()

    def update(self, buffers: Any) -> None:
        """Take over what ``buffers`` holds; keys that are there already are overwritten.

        Raises:
            TypeError: not a mapping and not iterable, or an element of it is no pair.
            ValueError: an element has another length than 2.
        """
        if isinstance(buffers, BufferDict):
            pairs: Any = buffers.items()
        elif isinstance(buffers, Mapping):
            pairs = sorted(buffers.items()) if type(buffers) is dict else buffers.items()
        elif isinstance(buffers, Iterable):
            pairs = buffers
        else:
            raise TypeError(
                "BufferDict.update should be called with an iterable of key/value pairs, but got "
                f"{type(buffers).__name__}"
            )
        checked = []
        for i, pair in enumerate(pairs):
            if not isinstance(pair, Iterable):
                raise TypeError(
                    f"BufferDict update sequence element #{i} should be Iterable; is "
                    f"{type(pair).__name__}"
                )
            pair = tuple(pair)
            if len(pair) != 2:
                raise ValueError(
                    f"BufferDict update sequence element #{i} has length {len(pair)}; 2 is required"
                )
            checked.append(pair)
        for key, buffer in checked:
            self[key] = buffer

    def extra_repr(self) -> str:
        return "\n".join(
            f"({key}): Buffer of size {tuple(b.shape)}, {b.dtype}, {b.device}"
            for key, b in self.items()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("BufferDict should not be called.")
