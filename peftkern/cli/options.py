"""The options of a command, defined in one place: the dataclass of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, get_type_hints

import typer


def setting(
    default: Any = MISSING,
    help: str | None = None,
    panel: str | None = None,
    flag: str | None = None,
) -> Any:
    """A field of a dataclass of settings, with the data of its option.

    Args:
        default: the default value; without one the option is required.
        help: one line for ``--help``.
        panel: the box of ``--help`` in which the line is.
        flag: the spelling of a bool option: "--cpu", or "--bf16/--no-bf16".
    """
    return field(default=default, metadata={"help": help, "panel": panel, "flag": flag})


def option(name: str) -> str:
    """The option of a setting: ``--lora-r`` for ``lora_r``."""
    return "--" + name.replace("_", "-")


def takes(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for ``command(settings, ...)`` that gives it one parameter for each setting.

    The decorated function has these parameters in place of the first one, in the form that typer
    reads.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [f.name for f in fields(settings)]

        def run(**given: Any) -> None:
            command(settings(**{name: given.pop(name) for name in names}), **given)

        hints = get_type_hints(settings)
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [_parameter(f, hints[f.name]) for f in fields(settings)]
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(of: Field[Any], kind: Any) -> inspect.Parameter:
    said = of.metadata
    flags = () if said["flag"] is None else (said["flag"],)
    how = typer.Option(*flags, help=said["help"], rich_help_panel=said["panel"])
    return inspect.Parameter(
        of.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if of.default is MISSING else of.default,
        annotation=Annotated[kind, how],
    )
