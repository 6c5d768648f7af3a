"""The report of a benchmark run: a page of HTML, and its verdict in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .. import figures, pages
from .measure import BARE, OURS, PEFT

NOISE = 1.02  # a ratio up to this is no loss
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "B": ((2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
}
_COLOURS = {"faster": "#0f766e", "slower": "#b91c1c"}
_NAMES = {PEFT: "HF PEFT", BARE: "no adapters"}


def ratio_of(row: dict[str, Any]) -> float | None:
    """peftkern's share of HF PEFT's time or bytes; None when one of them is missing or 0."""
    values = row["values"]
    if row.get("kind") == "added":
        found = row.get("ratio")
        return found if found is not None and found == found else None
    if not values.get(PEFT) or OURS not in values:
        return None
    ratio: float = values[OURS] / values[PEFT]
    return ratio


def losses(rows: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(row, rival, peftkern's share) of each rival that takes less than peftkern."""
    found = []
    for row in rows:
        for rival, value in row["values"].items():
            if rival in (OURS, BARE) or not value or OURS not in row["values"]:
                continue
            ratio = row["values"][OURS] / value if rival != PEFT else ratio_of(row)
            if ratio is not None and ratio > NOISE:
                found.append((row["row"], rival, ratio))
    return found


def verdict(
    rows: list[dict[str, Any]], wrong: Sequence[str] = (), failed: Iterable[str] = ()
) -> str:
    """One line: peftkern's shares of HF PEFT's time and bytes, where it loses, and what failed."""
    if wrong:
        return "the numbers of peftkern and HF PEFT differ: " + "; ".join(wrong)
    shares = [(row["row"], ratio) for row in rows if (ratio := ratio_of(row)) is not None]
    broken = f" Failed: {'; '.join(failed)}." if failed else ""
    if not shares:
        return f"nothing was measured.{broken}" if broken else "nothing was measured"
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in shares)
    lost = losses(rows)
    behind = "; ".join(f"{n} ({r:.2f} of {_NAMES.get(rival, rival)})" for n, rival, r in lost)
    worst = f"It loses: {behind}." if lost else "It loses none."
    return f"peftkern / HF PEFT: {told}. {worst}{broken}"


def render(content: dict[str, Any]) -> str:
    """The page about ``content``.

    Its keys: "title", "rows", and may be "what", "machine", "work", "missing", "wrong" and
    "failed", {what failed: why}. Without matplotlib the page has no plot.
    """
    rows = content["rows"]
    wrong, failed = content.get("wrong") or [], content.get("failed") or {}
    kind = "bad" if wrong or failed else "ok"
    body = [
        f'<p class="soft">{escape(content.get("what", ""))}</p>',
        f'<div class="verdict {kind}">{escape(verdict(rows, wrong, failed))}</div>',
    ]
    if figures.can_draw() and any(ratio_of(row) is not None for row in rows):
        image = pages.image(bars(rows), "peftkern's share of HF PEFT's time and bytes")
        body.append(
            f"<section><h2>peftkern / HF PEFT</h2>{image}<p><small>{_HOW}</small></p></section>"
        )
    body.append(f'<section><h2>In numbers</h2><div class="scroll">{_table(rows)}</div></section>')
    if failed:
        body.append(f"<section><h2>Failed</h2>{pages.definitions(failed)}</section>")
    if missing := content.get("missing"):
        body.append(f"<section><h2>Not measured</h2>{pages.definitions(missing)}</section>")
    facts = {**_texts(content.get("work", {})), **_texts(content.get("machine", {}))}
    body.append(f"<section><h2>The run</h2>{pages.definitions(facts)}</section>")
    return pages.page(content["title"], "\n".join(body))


_HOW = (
    "Bars: medians over the rounds, in which all take turns; lines: from the 20th to the 80th "
    "percentile of the rounds' ratios. A circle is the model without adapters: what adapters that "
    "cost nothing would reach. Left of the line at 1 peftkern takes less than HF PEFT."
)


def bars(rows: list[dict[str, Any]], kind: str = "svg") -> str:
    """A plot of peftkern's share in each row, with the spread of the rounds and the floor."""
    drawn = [(row, ratio) for row in rows if (ratio := ratio_of(row)) is not None][::-1]
    most = max(1.15, *(ratio * 1.15 for _, ratio in drawn))
    figure, (axis,) = figures.figure(7.2, 0.9 + 0.34 * len(drawn), 1, [1])
    for i, (row, ratio) in enumerate(drawn):
        colour = _COLOURS["slower" if ratio > NOISE else "faster"]
        axis.barh([i], [ratio], color=colour, height=0.6)
        spread = _spread(row)
        if spread:
            axis.plot(spread, [i, i], color=figures.INK, lw=1.4)
        floor = row["values"].get(BARE)
        if floor and row.get("kind") != "added":
            axis.plot([floor / row["values"][PEFT]], [i], "o", mfc="none", color=figures.INK, ms=5)
        end = min(most, max(ratio, *(spread or (0, 0))))
        axis.text(end, i, f"  {ratio:.2f}", va="center", fontsize=9, color=figures.INK)
    axis.set_yticks(range(len(drawn)), [row["row"] for row, _ in drawn])
    axis.axvline(1, color=figures.INK, lw=0.8)
    axis.set_xlim(0, most)
    return figures.encode(figure, kind)


def _spread(row: dict[str, Any]) -> tuple[float, float] | None:
    rounds = row.get("rounds") or {}
    if row.get("kind") == "added" or PEFT not in rounds or OURS not in rounds:
        return None
    pairs = zip(rounds[OURS]["wall"], rounds[PEFT]["wall"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    last = len(ratios) - 1
    return ratios[round(0.2 * last)], ratios[round(0.8 * last)]


def _table(rows: list[dict[str, Any]]) -> str:
    names: list[str] = []
    for row in rows:
        names += [n for n in row["values"] if n not in names]
    head = "".join(f'<th class="number">{escape(_NAMES.get(n, n))}</th>' for n in names)
    lines = []
    for row in rows:
        cells = "".join(f'<td class="number">{_shown(row, n)}</td>' for n in names)
        ratio = ratio_of(row)
        share = "" if ratio is None else f"{ratio:.2f}"
        note = f"<br><small>{escape(row.get('note') or '')}</small>" if row.get("note") else ""
        lines.append(
            f'<tr><td>{escape(row["row"])}{note}</td>{cells}<td class="number">{share}</td></tr>'
        )
    return f'<table><tr><th></th>{head}<th class="number">ratio</th></tr>{"".join(lines)}</table>'


def _shown(row: dict[str, Any], name: str) -> str:
    value = row["values"].get(name)
    if value is None:
        return "-"
    scales = _SCALES[row["unit"]]
    scale, unit = next((s for s in scales if value >= s[0]), scales[-1])
    return f"{value / scale:.4g} {unit}"


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items())
        if isinstance(value, dict)
        else str(value)
        for key, value in facts.items()
        if value is not None
    }
