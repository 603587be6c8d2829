"""How the routers of a mixture do: the load of every expert after training, and how even it was along the way.

Reads `load.per_layer` of a summary (slots that each expert got on some text, layer by layer) and what the training log
says of routers. Knows lists of numbers, no models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nestling.report.curve import Records, figure_curve
from nestling.report.run import finite, items
from nestling.report.svg import element, line

WIDTH, HEIGHT = 480, 40
CURVES = {
    "max_load": "busiest expert over the mean",
    "entropy": "entropy of the load, 1 is even",
    "dead": "part of the experts without a token",
    "dropped": "part of the slots dropped",
}


def routers(summary: Mapping[str, Any], records: Records, widths: Sequence[int]) -> dict[str, Any]:
    """What `routers.html` shows: a row for each layer, and for each width the curves as (title, drawing)."""
    layers = [_counts(layer) for layer in items(summary, "load", "per_layer")]
    numbers = items(summary, "load", "layers") or range(len(layers))
    return {
        "rows": [_row(number, counts) for number, counts in zip(numbers, layers, strict=False) if sum(counts) > 0],
        "curves": [
            [(title, Markup(drawn)) for key, title in CURVES.items() if (drawn := figure_curve(records, key, title, w))]
            for w in widths
        ],
    }


def evenness(counts: Sequence[float]) -> tuple[float, float, float]:
    """Busiest over the mean, entropy over that of an even load, and the part of experts that got nothing."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    even = math.log(len(counts)) if len(counts) > 1 else 1.0
    return (
        max(counts) * len(counts) / total,
        entropy / even if len(counts) > 1 else 1.0,
        counts.count(0) / len(counts),
    )


def _counts(layer: Any) -> list[float]:
    found = [finite({"slots": slots}, "slots") for slots in items({"layer": layer}, "layer")]
    return [slots for slots in found if slots is not None and slots >= 0]


def _row(number: Any, counts: list[float]) -> dict[str, Any]:
    busiest, entropy, dead = evenness(counts)
    return {
        "number": number,
        "experts": len(counts),
        "svg": Markup(_bars(counts)),
        "busiest": f"{busiest:.2f}",
        "entropy": f"{entropy:.3f}",
        "dead": round(dead * len(counts)),
    }


def _bars(counts: list[float]) -> str:
    """A bar for each expert, busiest first, and a line at the mean."""
    order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    top, mean, step = max(counts), sum(counts) / len(counts), WIDTH / len(counts)
    marks = ""
    for place, expert in enumerate(order):
        height = HEIGHT * counts[expert] / top
        title = element("title", f"expert {expert}: {counts[expert] / mean:.2f} times the mean")
        box = {"x": place * step, "y": HEIGHT - height, "width": step * 0.85, "height": height}
        marks += element("rect", title, class_="load", **box)
    level = HEIGHT - HEIGHT * mean / top
    marks += line([(0.0, level), (float(WIDTH), level)], class_="mean")
    label = f"load of {len(counts)} experts, busiest first; the line is the mean"
    view = f"0 0 {WIDTH} {HEIGHT}"
    return element("svg", marks, viewBox=view, preserveAspectRatio="none", class_="loads", role="img", aria_label=label)
