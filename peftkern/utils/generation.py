"""Settings of a call of ``generate``, from its arguments or configurations."""

from __future__ import annotations

from typing import Any


def generation_setting(base: Any, kwargs: dict[str, Any], name: str, config: Any = None) -> Any:
    """A setting of generation, from the call, else its configuration, else the model's.

    ``config`` is the call's configuration if it was given by position.
    """
    given = kwargs.get("generation_config") if config is None else config
    for source in (given, getattr(base, "generation_config", None)):
        if kwargs.get(name) is None and getattr(source, name, None) is not None:
            return getattr(source, name)
    return kwargs.get(name)


def row_repeats(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of copies that ``base.generate`` makes of each row; ``args`` follow the input."""
    config = args[0] if args else None
    names = ("num_beams", "num_return_sequences")
    return max(generation_setting(base, kwargs, name, config) or 1 for name in names)
