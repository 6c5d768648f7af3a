"""Parts of the reports, which are pages that need no other file and no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1e293b; --soft: #64748b; --line: #e2e8f0; --teal: #0f766e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f8fafc; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 1.1rem; margin: 0 0 12px; }
p { margin: 0 0 12px; } .soft { color: var(--soft); } small { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin-top: 20px; }
img { display: block; width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px;
  margin-top: 24px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.card b { display: block; font-size: 1.55rem; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .86rem; }
.verdict { border-radius: 12px; padding: 12px 18px; margin-top: 20px; font-weight: 600; }
.ok { background: #ecfdf5; color: #065f46; border: 1px solid #a7f3d0; }
.bad { background: #fef2f2; color: #991b1b; border: 1px solid #fecaca; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; } tr:last-child td { border-bottom: 0; }
pre { background: #f1f5f9; border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font-size: .84rem; line-height: 1.45; margin: 0 0 10px; }
dl { display: grid; grid-template-columns: 9em 1fr; gap: 4px 12px; margin: 0 0 22px; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(title: str, body: str) -> str:
    """A page of HTML with the heading ``title``, in the style of all reports."""
    title = escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""


def shown_as_cards(cards: Iterable[tuple[str, str]]) -> str:
    """A row of cards, each a (value, label) of HTML."""
    inner = "".join(
        f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards
    )
    return f'<div class="cards">{inner}</div>'


def definitions(items: dict[str, str]) -> str:
    """A list of names with their texts."""
    inner = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v) or '(nothing)'}</dd>" for k, v in items.items()
    )
    return f"<dl>{inner}</dl>"


def image(uri: str, alt: str) -> str:
    """An image, which its data URI holds."""
    return f'<img alt="{alt}" src="{uri}">'
