"""The members of a family: a table, what each keeps of every axis in every layer, and how its shape does untrained.

Reads `members`, `drawn` and `compared` of a summary; any of them may be missing. `drawn` holds for each axis the
numbers of its layers, the parent's size in each, and every member's (None where a layer is gone).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from nestling.report import human, picture
from nestling.report.run import finite, items, mapping, number
from nestling.report.svg import element

BAR, GAP, HEIGHT = 12, 3, 36
EIGHTHS = " ▁▂▃▄▅▆▇█"


def members(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `members.html` shows; empty lists for what the summary lacks."""
    drawn = mapping(summary, "drawn")
    return {
        "rows": [_row(name, mapping(value)) for name, value in mapping(summary, "members").items()],
        "axes": [
            {"name": picture.name_of(axis), "members": _bars(mapping(drawn, axis))}
            for axis in drawn
            if items(drawn, axis, "full")
        ],
        "compared": [row for name in mapping(summary, "compared") for row in _compared(summary, name)],
    }


def in_text(drawn: Mapping[str, Any]) -> str:
    """The same shapes for a terminal: a bar of eighths for each layer, `x` where it is gone."""
    lines = []
    for axis in drawn:
        full = items(drawn, axis, "full")
        lines.append(picture.name_of(axis))
        for member, kept in mapping(drawn, axis, "kept").items():
            bars = "".join("x" if k is None else EIGHTHS[round(8 * k / f)] for k, f in zip(kept, full, strict=True))
            known = sorted({k for k in kept if k is not None})
            size = "" if not known else f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}"
            lines.append(f"  {member:>8}  {bars}  {size}")
    return "\n".join(lines)


def _row(name: str, member: Mapping[str, Any]) -> dict[str, Any]:
    share, error, loss = (finite(member, key) for key in ("of_parent", "budget_error", "loss"))
    params = number(member, "params")
    return {
        "name": name,
        "params": human.count(params) if params else "",
        "share": "" if share is None else f"{share:.3f}",
        "error": "" if error is None else f"{error:+.2%}",
        "loss": "" if loss is None else f"{loss:.4f}",
    }


def _bars(axis: Mapping[str, Any]) -> list[dict[str, Any]]:
    full, layers = items(axis, "full"), items(axis, "layers")
    return [
        {"name": member, "svg": Markup(_svg(items({"kept": kept}, "kept"), full, layers))}
        for member, kept in mapping(axis, "kept").items()
    ]


def _svg(kept: list[Any], full: list[Any], layers: list[Any]) -> str:
    """A bar per layer, as high as the part that is kept; a line at the bottom where the layer is gone."""
    marks = ""
    for i, (value, whole) in enumerate(zip(kept, full, strict=False)):
        part = 0.0 if value is None else HEIGHT * value / whole
        where = f"layer {layers[i]}: " if i < len(layers) else ""
        title = element("title", f"{where}{'gone' if value is None else f'{value:,} of {whole:,}'}")
        place = {"x": i * (BAR + GAP), "width": BAR}
        marks += element("rect", "", y=0, height=HEIGHT, fill="currentColor", opacity=0.12, **place)
        marks += element("rect", title, y=HEIGHT - part, height=max(part, 1), fill="currentColor", opacity=0.7, **place)
    width = len(full) * (BAR + GAP)
    return element("svg", marks, viewBox=f"0 0 {width} {HEIGHT}", width=width, height=HEIGHT, role="img")


def _compared(summary: Mapping[str, Any], budget: str) -> list[dict[str, str]]:
    rows = []
    for arm, shapes in mapping(summary, "compared", budget).items():
        losses = [loss for shape in shapes if (loss := finite(mapping(shape), "loss")) is not None]
        if losses:
            spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
            rows.append({"budget": budget, "arm": arm, "loss": f"{sum(losses) / len(losses):.3f}{spread}"})
    return rows
