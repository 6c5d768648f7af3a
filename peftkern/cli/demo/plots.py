"""The plots of the demo report, as data URIs: loss curves, bars, and step times."""

from __future__ import annotations

from typing import Any

from ..figures import INK, encode, figure, whole_numbers
from .peers import NAMES

COLOURS = {"peftkern": "#0f766e", "peft": "#c2762b"}


def loss_curves(run: dict[str, Any], kind: str = "svg") -> str:
    """A plot of both libraries' training loss over the steps and, below, of their difference."""
    providers = run["providers"]
    both = "peft" in providers
    drawn, axes = figure(7.2, 4.4 if both else 3.2, 2 if both else 1, [5, 2] if both else [1])
    top = axes[0]
    steps = range(1, run["steps"] + 1)
    for name in reversed(list(providers)):  # peftkern last, as a thin line over the other
        width, alpha = (1.6, 1.0) if name == "peftkern" else (5.0, 0.45)
        top.plot(
            steps, providers[name]["losses"], color=COLOURS[name], lw=width, alpha=alpha,
            label=NAMES[name], solid_capstyle="round",
        )  # fmt: skip
    ours = providers["peftkern"]
    for key, x, text in (
        ("before", 0, "held out, before"),
        ("after", run["steps"] + 1, "held out, after"),
    ):
        top.plot([x], [ours[key]["loss"]], "o", color=INK, ms=6, zorder=5)
        top.annotate(
            f"{text}\n{ours[key]['loss']:.3f}", (x, ours[key]["loss"]), textcoords="offset points",
            xytext=(9, 7) if key == "before" else (-6, 12),
            ha="left" if key == "before" else "right", fontsize=8.5, color=INK, zorder=6,
            bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 1.5},
        )  # fmt: skip
    top.set_ylabel("loss")
    top.margins(y=0.18)
    top.legend(frameon=False, loc="upper right", ncols=2)
    if both:
        low = axes[1]
        apart = [
            abs(a - b) for a, b in zip(ours["losses"], providers["peft"]["losses"], strict=True)
        ]
        # a difference of 0 has no place on a logarithmic axis: it is drawn at the lower end
        floor = 1e-8
        low.semilogy(steps, [max(x, floor) for x in apart], ".", color=INK, ms=5)
        low.set_ylim(floor / 3, max(1e-4, max(apart) * 5))
        low.set_ylabel("difference")
        drawn.align_ylabels(axes)
        low.sharex(top)
        top.tick_params(labelbottom=False)
    axes[-1].set_xlabel("step")
    whole_numbers(axes[-1])
    return encode(drawn, kind)


def bars(run: dict[str, Any], kind: str = "svg") -> str:
    """A plot of tokens per second and peak memory, with a bar for each library."""
    drawn, axes = figure(7.2, 1.9 if len(run["providers"]) > 1 else 1.4, 2, [1, 1], columns=True)
    names = list(run["providers"])[::-1]
    for axis, key, title, unit in (
        (axes[0], "tokens_per_second", "tokens per second", ""),
        (axes[1], "peak_mib", "peak memory above the model", " MiB"),
    ):
        values = [max(0.0, run["providers"][n][key]) for n in names]
        axis.barh([NAMES[n] for n in names], values, color=[COLOURS[n] for n in names], height=0.6)
        for i, value in enumerate(values):
            axis.text(value, i, f" {value:,.0f}{unit}", va="center", fontsize=9, color=INK)
        axis.set_xlim(0, max([*values, 1e-9]) * 1.3)
        axis.set_title(title, fontsize=9.5, color=INK, loc="left")
        axis.grid(False)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    return encode(drawn, kind)


def step_times(run: dict[str, Any], kind: str = "svg") -> str:
    """A plot of the seconds of each step, which shows the noise behind the medians."""
    drawn, axes = figure(7.2, 2.5, 1, [1])
    for name, trace in reversed(list(run["providers"].items())):
        steps = range(1, len(trace["seconds"]) + 1)
        axes[0].plot(
            steps, trace["seconds"], "o-", color=COLOURS[name], lw=0.8, ms=3.5, label=NAMES[name]
        )
        axes[0].axhline(trace["step_seconds"], color=COLOURS[name], lw=1, ls=":")
    axes[0].set_ylim(bottom=0)
    whole_numbers(axes[0])
    axes[0].set_xlabel("step (dotted: median, without the first)")
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, ncols=2, loc="lower right")
    return encode(drawn, kind)
