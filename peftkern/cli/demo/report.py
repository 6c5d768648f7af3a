"""``demo-report.html``: a page that needs no other file and no network."""

from __future__ import annotations

import os
from html import escape
from typing import Any

from ...files.atomic import write_text_atomically
from ..pages import definitions, image, page, shown_as_cards
from . import plots
from .peers import NAMES


def write_report(path: str | os.PathLike[str], run: dict[str, Any]) -> None:
    """Write the page about ``run`` (the result of ``demo``), atomically."""
    write_text_atomically(path, render(run))


def render(run: dict[str, Any]) -> str:
    """The page as HTML, with its plots inside."""
    env = run["environment"]
    modules = escape(", ".join(run["lora"]["target_modules"]))
    return page(
        run["title"],
        f"""<p class="soft">LoRA, rank {run["lora"]["r"]}, on {modules}.
{run["steps"]} steps of {run["batch_size"]} examples, float32,
{escape(env["device"])}, {escape(env["threads"])} threads.</p>
{_verdict(run)}
{_cards(run)}
<section><h2>Loss</h2>{image(plots.loss_curves(run), "training loss over the steps")}</section>
<section><h2>Speed and memory</h2>{image(plots.bars(run), "tokens per second and peak memory")}
{image(plots.step_times(run), "seconds of each step")}
<p><small>{_method(run)}</small></p></section>
<section><h2>In numbers</h2><div class="scroll">{_table(run)}</div></section>
{_samples(run)}
<section><h2>The data</h2>{_data(run)}</section>
<section><h2>The machine</h2>{definitions(env)}</section>""",
    )


def _verdict(run: dict[str, Any]) -> str:
    if run["failures"]:
        items = "<br>".join(escape(f) for f in run["failures"])
        return f'<div class="verdict bad">{items}</div>'
    if "peft" not in run["providers"]:
        text = "HF PEFT is not installed here: peftkern ran alone."
    elif run["lora_dropout"]:
        text = (
            "The losses of both libraries agree within the noise of dropout; the saved adapter "
            "gives the same logits in both."
        )
    else:
        text = (
            "The losses of both libraries agree at every step; the saved adapter gives the same "
            "logits in both."
        )
    return f'<div class="verdict ok">{text}</div>'


def _cards(run: dict[str, Any]) -> str:
    ours = run["providers"]["peftkern"]
    cards = [
        (
            f"{ours['before']['loss']:.2f} → {ours['after']['loss']:.2f}",
            "held-out loss, before → after",
        ),
    ]
    if "accuracy" in ours["after"]:
        pair = f"{ours['before']['accuracy']:.0%} → {ours['after']['accuracy']:.0%}"
        cards.append((pair, "held-out accuracy, before → after"))
    if run["step_time_ratio"] is not None:
        theirs = run["providers"]["peft"]
        cards.append((f"{run['step_time_ratio']:.2f}×", "HF PEFT's time for a step"))
        if theirs["peak_mib"] > 0:
            ratio = ours["peak_mib"] / theirs["peak_mib"]
            cards.append((f"{ratio:.2f}×", "HF PEFT's peak memory above the model"))
    else:
        cards.append((f"{ours['tokens_per_second']:,.0f}", "tokens per second"))
    cards.append((f"{ours['trainable']:,}", "trained parameters"))
    return shown_as_cards(cards)


def _table(run: dict[str, Any]) -> str:
    providers = run["providers"]
    rows: list[tuple[str, list[str]]] = []

    def row(label: str, show: Any) -> None:
        rows.append((label, [show(name, p) for name, p in providers.items()]))

    row("held-out loss before", lambda n, p: f"{p['before']['loss']:.5f}")
    row("held-out loss after", lambda n, p: f"{p['after']['loss']:.5f}")
    if "accuracy" in providers["peftkern"]["after"]:
        row("held-out accuracy before", lambda n, p: f"{p['before']['accuracy']:.1%}")
        row("held-out accuracy after", lambda n, p: f"{p['after']['accuracy']:.1%}")
    row("training loss, last step", lambda n, p: f"{p['losses'][-1]:.5f}")
    row("median step", lambda n, p: f"{p['step_seconds']:.3f} s")
    row("tokens per second", lambda n, p: f"{p['tokens_per_second']:,.0f}")
    row("peak memory above the model", lambda n, p: f"{p['peak_mib']:,.0f} MiB")
    row("trained parameters", lambda n, p: f"{p['trainable']:,}")
    row("logits after reloading, largest difference", lambda n, p: f"{run['logits'][n]:.1e}")
    head = "".join(f'<th class="number">{NAMES[n]}</th>' for n in providers)
    body = "".join(
        f"<tr><td>{label}</td>" + "".join(f'<td class="number">{v}</td>' for v in values) + "</tr>"
        for label, values in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _samples(run: dict[str, Any]) -> str:
    parts = []
    for sample in run["samples"]:
        items = {"wanted": sample["wanted"], "before": sample["before"], "after": sample["after"]}
        parts.append(
            f"<p><code>{escape(sample['module'])}</code></p><pre>{escape(sample['prompt'].strip())}</pre>"
            + definitions(items)
        )
    note = (
        '<p class="soft">From files that no training example is from; always the most likely '
        "answer.</p>"
    )
    return f"<section><h2>Held-out examples</h2>{note}{''.join(parts)}</section>" if parts else ""


def _data(run: dict[str, Any]) -> str:
    data = run["data"]
    modules = data["held_out_modules"]
    python = escape(run["environment"]["Python"])
    return (
        f"<p>{data['training_examples']} training examples from {data['training_modules']} files "
        f"of the standard library of Python {python}; {data['held_out_examples']} held-out "
        f"examples from {len(modules)} other files:</p>"
        f"<p><small>{escape(', '.join(modules))}</small></p>"
    )


def _method(run: dict[str, Any]) -> str:
    ours = run["providers"]["peftkern"]
    text = (
        "A step is forward, backward and AdamW; the times are medians without the first step, "
        f"the tokens include padding. Memory: {escape(ours['memory_how'])}."
    )
    if "peft" in run["providers"]:
        text += (
            " Each library ran in a process of its own, on the same batches from the same initial "
            "adapter, the two taking turns of two steps; the time ratio is the median over the "
            "steps of ours to theirs on the same batch."
        )
    return text
