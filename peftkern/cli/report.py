"""``report.html`` of a training run: the loss, the learning rate and the speed of its steps."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console

from .figures import can_draw, encode, figure, whole_numbers
from .pages import definitions, image, page, shown_as_cards
from .settings import TrainSettings

_COLOUR = "#0f766e"
# what is drawn of the log: its key, and the name of the axis
_CURVES = (
    ("loss", "loss"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens/s"),
)


def said_speed(record: dict[str, Any]) -> str:
    """The speed and peak memory of a run in a line."""
    speed = record["speed"]
    return (
        f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['examples_per_second']:,.1f} "
        f"examples/s, peak memory {record['peak_mib']:,.0f} MiB above the model"
    )


def report_of(
    settings: TrainSettings, record: dict[str, Any], log: list[dict[str, Any]], console: Console
) -> str | None:
    """The page about a finished run, from its record and Trainer's log.

    None when the settings ask for none. Without matplotlib it has no plots, which is said.
    """
    if not settings.report:
        return None
    if not can_draw():
        console.print("report.html has no plots without 'matplotlib': pip install matplotlib")
    return render(settings, record, log)


def render(settings: TrainSettings, record: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The page as HTML, with its plots inside where they can be drawn."""
    cards = []
    if record["after"] is not None and record["before"] is not None:
        for name, after in record["after"].items():
            cards.append((f"{record['before'][name]:.3f} → {after:.3f}", f"held-out {name}"))
    for name, value in record["speed"].items():
        cards.append((f"{value:,.0f}", name.replace("_per_", " a ")))
    cards.append((f"{record['peak_mib']:,.0f} MiB", "peak memory above the model"))
    options = {name: str(value) for name, value in settings.options().items()}
    told = {"peak memory": record["peak_is"], "steps": str(record["steps"])}
    plots = ""
    if can_draw():
        drawn = image(curves(log), "loss, learning rate and speed by steps")
        plots = f"<section><h2>The training</h2>{drawn}\n</section>\n"
    return page(
        f"{settings.method} on {settings.model}",
        f"""<p class="soft">{escape(record["runs_as"])}</p>
{shown_as_cards(cards)}
{plots}<section><h2>The run</h2>{definitions(told)}</section>
<section><h2>The options</h2>{definitions(options)}</section>""",
    )


def curves(log: list[dict[str, Any]]) -> str:
    """A plot of what the log has of each step, one curve below the other."""
    steps = [entry for entry in log if "loss" in entry]
    shown = [curve for curve in _CURVES if any(curve[0] in entry for entry in steps)] or [
        _CURVES[0]
    ]
    drawn, axes = figure(7.2, 1.9 * len(shown), len(shown), [1] * len(shown))
    for axis, (key, name) in zip(axes, shown, strict=True):
        points = [(entry["step"], float(entry[key])) for entry in steps if key in entry]
        few = "o-" if len(points) < 40 else "-"
        axis.plot(*zip(*points, strict=True), few, color=_COLOUR, lw=1.2, ms=3)
        axis.set_ylabel(name)
        whole_numbers(axis)
    axes[-1].set_xlabel("step")
    drawn.align_ylabels(axes)
    return encode(drawn)
