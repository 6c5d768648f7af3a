"""``peftkern inspect``: a table of a saved adapter."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..checkpoint.inspecting import as_json, facts
from .after_settings import InspectSettings
from .errors import UserError

_FEW = 8  # layers in the table without --all
_WIDE = 200  # characters of a line that no terminal shows


def inspect(path: str, settings: InspectSettings, console: Console | None = None) -> dict[str, Any]:
    """Print what is known of the adapter in a folder or file; return it as JSON values."""
    try:
        found = facts(path, settings.max_rank)
    except ValueError as error:
        raise UserError(str(error)) from None
    if settings.json:
        print(as_json(found))
        return found
    console = console or Console()
    if not console.is_terminal:  # a file or another program has lines of any length
        console.width = max(console.width, _WIDE)
    console.print(_head(found))
    if found["layers"]:
        console.print(_layers(found["layers"], settings.all))
    if found["others"]:
        console.print(_others(found["others"], settings.all))
    if found["not_finite"]:
        console.print(f"[red]not finite: {', '.join(found['not_finite'])}[/red]")
    if found["loads"]:
        console.print(_loads(found["loads"]))
    else:
        console.print("[yellow]no adapter_config.json beside it: no scale, nothing loads it[/]")
    return found


def _table(title: str, *columns: str) -> Table:
    style = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), **style)  # type: ignore[arg-type]
    for column in columns:
        words = column in ("", "layer", "tensor", "dtype", "program", "why")
        table.add_column(
            column,
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
        )
    return table


def _head(found: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    base = found["base"]
    name = base["name"] or "not named"
    if base["gguf_file"]:
        name += f" ({base['gguf_file']})"
    ranks = ", ".join(f"{r} ({count} layers)" for r, count in found["ranks"].items())
    rows = [
        ("file", found["file"]),
        ("method", " ".join(str(found[key]) for key in ("method", "task") if found[key])),
        ("base model", name),
        ("ranks", ranks),
        ("parameters", f"{found['parameters']:,} in {found['tensors']} tensors"),
        ("bytes", f"{found['bytes']:,} ({', '.join(found['dtypes'])})"),
    ]
    for label, value in rows:
        if value:
            table.add_row(f"[bold]{label}[/bold]", value)
    for setting, value in found["settings"].items():
        table.add_row(setting, _shown(value))
    return table


def _shown(value: Any) -> str:
    """A setting's value; of a list of layers by their whole names, only the last parts."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return str(value)
    names = sorted({name.rpartition(".")[2] for name in value})
    return ", ".join(names) + (f" ({len(value)} layers)" if len(names) < len(value) else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _layers(layers: list[dict[str, Any]], every: bool) -> Table:
    shown = layers if every else layers[:_FEW]
    table = _table(
        "Layers (Frobenius norms)",
        *("layer", "r", "alpha", "scale", "N x K", "‖A‖", "‖B‖", "‖BA‖", "‖sBA‖"),
    )
    for layer in shown:
        norms = (layer[f"norm_{name}"] for name in ("A", "B", "BA", "update"))
        table.add_row(
            layer["name"].removeprefix("model."),
            str(layer["r"]),
            _number(layer["alpha"]),
            _number(layer["scale"]),
            f"{layer['B'][0]} x {layer['A'][1]}",
            *map(_number, norms),
        )
    if len(shown) < len(layers):
        table.caption = f"{len(layers) - len(shown)} more layers: --all shows them"
    _add_total(table, layers)
    return table


def _add_total(table: Table, layers: list[dict[str, Any]]) -> None:
    """A last row with the norms over all layers."""
    table.add_section()
    norms = []
    for name in ("norm_A", "norm_B", "norm_BA", "norm_update"):
        values = [layer[name] for layer in layers]
        whole = None if None in values else sum(value**2 for value in values) ** 0.5
        norms.append(_number(whole))
    table.add_row(f"all {len(layers)}", "", "", "", "", *norms)


def _others(others: list[dict[str, Any]], every: bool) -> Table:
    shown = others if every else others[:_FEW]
    table = _table("Other tensors", "tensor", "shape", "dtype", "norm")
    for other in shown:
        shape = "x".join(map(str, other["shape"]))
        table.add_row(other["name"], shape, other["dtype"], _number(other["norm"]))
    if len(shown) < len(others):
        table.caption = f"{len(others) - len(shown)} more: --all shows them"
    return table


def _loads(loads: dict[str, dict[str, Any]]) -> Table:
    table = _table("What loads it", "program", "", "why")
    for target, entry in loads.items():
        why = "; ".join(entry["reasons"])
        if entry.get("export_mends"):
            why += f" (peftkern export --to {target} mends it)"
        table.add_row(entry["name"], "[green]yes[/]" if entry["reads"] else "[red]no[/]", why)
    return table
