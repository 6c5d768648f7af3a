"""The options of a command, defined in one place: the dataclass of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, get_type_hints

import typer

from .errors import UserError


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


def unlisted(default: Any) -> Any:
    """A field of a dataclass of settings that is no option."""
    return field(default=default, metadata={"unlisted": True}, repr=False, compare=False)


def options_of(settings: Any) -> list[Field[Any]]:
    """The fields of a dataclass of settings that are options."""
    return [f for f in fields(settings) if not f.metadata.get("unlisted")]


def option(name: str) -> str:
    """The option of a setting: ``--lora-r`` for ``lora_r``."""
    return "--" + name.replace("_", "-")


def takes(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for ``command(settings, ...)`` that gives it one parameter for each setting.

    The decorated function has these parameters in place of the first one, in the form that typer
    reads. Of settings with a field ``config``, what is not given on the command line is taken from
    the file that it names, and their field ``given`` holds the names that were given in either.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        listed = options_of(settings)
        from_file = any(f.name == "config" for f in listed)

        def run(context: typer.Context, **given: Any) -> None:
            values = {f.name: given.pop(f.name) for f in listed}
            if from_file:
                values = _with_config(settings, context, values)
            command(settings(**values), **given)

        hints = get_type_hints(settings)
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [
            inspect.Parameter("context", _KEYWORD, annotation=typer.Context),
            *(_parameter(f, hints[f.name], from_file) for f in listed),
            *(p.replace(kind=_KEYWORD) for p in own),
        ]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _with_config(settings: type, context: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of the command line and, for what is not given there, of its ``--config``."""
    from .config_file import read_config

    written = [n for n in values if context.get_parameter_source(n).name != "DEFAULT"]
    of_file = {} if values["config"] is None else read_config(values["config"], settings)
    for name, other in getattr(settings, "INSTEAD", {}).items():
        if name in written and other not in written:
            of_file.pop(other, None)
    values |= {name: value for name, value in of_file.items() if name not in written}
    for f in fields(settings):
        if f.default is MISSING and values.get(f.name) is None:
            raise UserError(f"missing option {option(f.name)}: give it, or in --config FILE")
    values["given"] = frozenset((*written, *of_file))
    return values


def _parameter(of: Field[Any], kind: Any, from_file: bool) -> inspect.Parameter:
    said = of.metadata
    flags = () if said["flag"] is None else (said["flag"],)
    how = typer.Option(*flags, help=said["help"], rich_help_panel=said["panel"])
    default = inspect.Parameter.empty if of.default is MISSING else of.default
    if from_file and of.default is MISSING:
        default, kind = None, kind | None  # it may stand in the file
    return inspect.Parameter(of.name, _KEYWORD, default=default, annotation=Annotated[kind, how])
