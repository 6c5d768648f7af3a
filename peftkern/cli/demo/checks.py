"""The demo's comparison of the two libraries, and the table that is printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from .peers import NAMES

# Both compute in float32 with another order of sums. Losses differ a little more with each step,
# because Adam divides by the size of the gradient; logits of the same adapter do not.
LOSS_TOLERANCE = 1e-3  # relative
DROPOUT_TOLERANCE = 0.15  # relative, for the mean: the libraries may drop different elements
LOGIT_TOLERANCE = 1e-4  # relative to the largest logit


def disagreements(run: dict[str, Any]) -> list[str]:
    """A sentence for each disagreement: losses of the two libraries, logits after reloading."""
    found = []
    for name, trace in run["providers"].items():
        numbers = [*trace["losses"], trace["before"]["loss"], trace["after"]["loss"]]
        if not all(abs(x) < float("inf") for x in numbers):
            found.append(f"{NAMES[name]}: a loss is not a finite number")
    if "peft" in run["providers"]:
        ours, theirs = run["providers"]["peftkern"], run["providers"]["peft"]
        pairs = {
            "held-out loss before": (ours["before"]["loss"], theirs["before"]["loss"]),
            "held-out loss after": (ours["after"]["loss"], theirs["after"]["loss"]),
        }
        tolerance = LOSS_TOLERANCE
        if run["lora_dropout"] == 0:
            for i, pair in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
                pairs[f"loss of step {i + 1}"] = pair
        else:
            tolerance = DROPOUT_TOLERANCE
            count = len(ours["losses"])
            pairs["mean training loss"] = (
                sum(ours["losses"]) / count,
                sum(theirs["losses"]) / count,
            )
        for what, (a, b) in pairs.items():
            if not abs(a - b) <= tolerance * abs(b):
                found.append(
                    f"{what}: peftkern {a:.6f}, HF PEFT {b:.6f} (allowed: {tolerance:.1%} apart)"
                )
                break
    allowed = LOGIT_TOLERANCE * run["logits"]["largest"]
    for name in run["providers"]:
        if not run["logits"][name] <= allowed:
            found.append(
                f"logits after reloading the adapter in {NAMES[name]} are "
                f"{run['logits'][name]:.2e} off (allowed: {allowed:.2e})"
            )
    return found


def print_table(console: Console, run: dict[str, Any]) -> None:
    """Print the comparison and the sample answers."""
    table = Table(title="the same steps, from the same initial adapter")
    table.add_column("")
    for name in run["providers"]:
        table.add_column(NAMES[name], justify="right")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("held-out loss before", lambda p: f"{p['before']['loss']:.4f}"),
        ("held-out loss after", lambda p: f"{p['after']['loss']:.4f}"),
        ("median step", lambda p: f"{p['step_seconds']:.3f} s"),
        ("tokens/s", lambda p: f"{p['tokens_per_second']:.0f}"),
        ("peak memory above the model", lambda p: f"{p['peak_mib']:.0f} MiB"),
    ]
    if "accuracy" in next(iter(run["providers"].values()))["after"]:
        rows.insert(2, ("accuracy before", lambda p: f"{p['before']['accuracy']:.1%}"))
        rows.insert(3, ("accuracy after", lambda p: f"{p['after']['accuracy']:.1%}"))
    for label, show in rows:
        table.add_row(label, *(show(p) for p in run["providers"].values()))
    reloaded = (f"{run['logits'][n]:.1e}" for n in run["providers"])
    table.add_row("logits after reloading: max. difference", *reloaded)
    console.print(table)
    if run["step_time_ratio"] is not None:
        ratio = run["step_time_ratio"]
        console.print(f"step time, peftkern / HF PEFT on the same batch (median): {ratio:.3f}")
    for sample in run["samples"]:
        console.print(
            f"\n[bold]{sample['module']}[/bold], wanted: {sample['wanted']!r}", highlight=False
        )
        console.print(
            f"  before: {sample['before']!r}\n  after:  {sample['after']!r}", highlight=False
        )
