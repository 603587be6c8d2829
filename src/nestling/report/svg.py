"""The few marks that charts are made of: elements, paths, ticks, and a frame with axes.

Everything returns a string of SVG; text and attributes are escaped here and nowhere else. Colours and fonts belong
to the page's style sheet, which knows the classes used here. Knows nothing of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """`<name ...>content</name>`; `class_` stands for `class`, `_` for `-`. Content is SVG, not text."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(short(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def text(x: float, y: float, words: str, **attributes: object) -> str:
    """Words at a place."""
    return element("text", escape(words), x=x, y=y, **attributes)


def line(points: Iterable[Point], **attributes: object) -> str:
    """A line through points in the drawing's own coordinates."""
    steps = "L".join(f"{short(x)} {short(y)}" for x, y in points)
    return element("path", d=f"M{steps}", **attributes)


def short(value: object) -> str:
    """A number without digits that no screen shows; anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside low..high, roughly `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / raw)))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def plain(values: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as tell neighbours apart."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=1.0) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]


def scaled(values: Sequence[float]) -> list[str]:
    """Tick labels for large counts, all in one unit: 0, 5M, 10M."""
    top = max((abs(value) for value in values), default=0.0)
    divisor, unit = next(((d, u) for d, u in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if top >= d), (1.0, ""))
    labels = plain([value / divisor for value in values])
    return ["0" if value == 0 else label + unit for value, label in zip(values, labels, strict=True)]


@dataclass(frozen=True)
class Frame:
    """A plot's box: `width` x `height` pixels, margins inside it, and the ranges that x and y cover."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 48
    right: int = 20
    top: int = 12
    bottom: int = 42

    def at(self, x: float, y: float) -> Point:
        """Where a value lies in the drawing."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        inner = self.width - self.left - self.right
        return self.left + across * inner, self.height - self.bottom - up * (self.height - self.top - self.bottom)

    def axes(self, x_title: str, x_labels: Callable[[Sequence[float]], list[str]]) -> str:
        """Grid lines with their labels; the y axis is titled by the page, above the drawing."""
        base = self.height - self.bottom
        marks = []
        levels = ticks(*self.y, about=5)
        for value, label in zip(levels, plain(levels), strict=True):
            y = self.at(self.x[0], value)[1]
            marks.append(line([(self.left, y), (self.width - self.right, y)], class_="grid"))
            marks.append(text(self.left - 8, y + 4, label, class_="tick", text_anchor="end"))
        places = ticks(*self.x, about=max(2, self.width // 110))
        for value, label in zip(places, x_labels(places), strict=True):
            x = self.at(value, self.y[0])[0]
            marks.append(line([(x, base), (x, base + 4)], class_="axis"))
            marks.append(text(x, base + 18, label, class_="tick", text_anchor="middle"))
        marks.append(line([(self.left, base), (self.width - self.right, base)], class_="axis"))
        middle = (self.left + self.width - self.right) / 2
        marks.append(text(middle, self.height - 4, x_title, class_="title", text_anchor="middle"))
        return "".join(marks)

    def inside(self, y: float) -> float:
        """y, or the nearest value that the frame covers."""
        return min(self.y[1], max(self.y[0], y))

    def draw(self, marks: str, label: str, **attributes: object) -> str:
        """The finished drawing; `label` says in words what it shows."""
        box = f"0 0 {self.width} {self.height}"
        return element("svg", marks, viewBox=box, role="img", aria_label=label, **attributes)


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """The range of some values with a little air on both sides."""
    found = list(values)
    low, high = min(found), max(found)
    air = (high - low) * share or abs(high) * share or 1.0
    return low - air, high + air
