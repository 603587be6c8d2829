"""Pictures of a compressed cache: tokens per slot by layer, head and position, and texts cut where slots begin.

One HTML page without scripts or anything from elsewhere. Takes plain numbers and strings; knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

OPEN = 16  # texts that stand open; more are to be opened one by one

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1f23 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { padding: .15rem .5rem; text-align: right }
td.cell { min-width: 2.6rem }
.measures th { text-align: left; font-weight: normal }
.text { white-space: pre-wrap; font: 13px/1.9 ui-monospace, monospace; margin: .2rem 0 }
.slot { padding: .1rem 0; border-left: 2px solid #1c1f23 } .a { background: #dbe9f8 } .b { background: #f7e8cf }
.bar { display: inline-block; width: 1.6rem; background: #5b8fc7; vertical-align: bottom; margin-right: 2px }
summary { cursor: pointer } .note { color: #5c636b }
"""


def slots_page(
    title: str,
    by_head: Mapping[int, Sequence[float]],
    by_position: Sequence[float] = (),
    texts: Mapping[tuple[int, int], Sequence[str]] | None = None,
    measures: Sequence[tuple[str, str]] = (),
) -> str:
    """The page. by_head: per layer the ratio of each head. by_position: the ratio in equal stretches of the context.
    texts: for (layer, head) the text of each slot. measures: names and values that stand first."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in measures)
    parts = [f"<h1>{escape(title)}</h1>", *([f'<table class="measures">{rows}</table>'] if rows else [])]
    parts += ["<h2>Tokens per slot, by layer and head</h2>", _table(by_head)]
    if by_position:
        parts += ["<h2>Tokens per slot, by position</h2>", _bars(by_position)]
    if texts:
        parts.append("<h2>Which tokens share a slot</h2>")
        note = "A bar begins a slot; what follows without a bar merged into it. Dots stand for dropped tokens."
        parts.append(f'<p class="note">{note}</p>')
        parts += [_text(place, slots, len(texts) <= OPEN) for place, slots in texts.items()]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(by_head: Mapping[int, Sequence[float]]) -> str:
    most = max((ratio for heads in by_head.values() for ratio in heads), default=1.0)
    heads = range(max((len(heads) for heads in by_head.values()), default=0))
    rows = ["<tr><th>layer</th>" + "".join(f"<th>head {head}</th>" for head in heads) + "</tr>"]
    for layer, ratios in by_head.items():
        cells = "".join(f'<td class="cell" style="{_shade(ratio, most)}">{ratio:.2f}</td>' for ratio in ratios)
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _shade(ratio: float, most: float) -> str:
    """Blue, the stronger the more a head merges; white at 1."""
    strength = 0.0 if most <= 1 else (ratio - 1) / (most - 1)
    return f"background: rgba(91, 143, 199, {0.85 * strength:.2f})"


def _bars(by_position: Sequence[float]) -> str:
    most = max(by_position)
    bars = (f'<span class="bar" style="height: {4 * r / most:.2f}rem" title="{r:.2f}"></span>' for r in by_position)
    return f'<p>{"".join(bars)}</p><p class="note">from the beginning of the context to its end; highest {most:.2f}</p>'


def _text(place: tuple[int, int], slots: Sequence[str], opened: bool) -> str:
    spans = "".join(f'<span class="slot {"ab"[i % 2]}">{escape(slot)}</span>' for i, slot in enumerate(slots))
    summary = f"layer {place[0]}, head {place[1]}: {len(slots)} slots"
    return f'<details{" open" if opened else ""}><summary>{summary}</summary><p class="text">{spans}</p></details>'
