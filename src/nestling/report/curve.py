"""The loss curve: training loss, raw and smoothed, and that on held-out text along the way, over the tokens seen.

Two panels where training loss and held-out loss have so little in common (a divergence of 0.2 nats beside a
cross-entropy of 3) that one scale would flatten both. Nothing is drawn from fewer than two points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from nestling.report import human
from nestling.report.run import finite
from nestling.report.svg import Frame, Point, element, line, padded, plain, scaled, text

POINTS = 300
HALF_LIFE = 8  # steps over which a short, noisy run is smoothed at least

Records = Sequence[Mapping[str, Any]]


def curves(records: Records, width: int) -> list[tuple[str, str]]:
    """(title, SVG) of each panel, `width` pixels wide; an empty list if there is nothing to draw."""
    train, held_out = series(records)
    by_tokens = any(finite(record, "tokens") is not None for record in records)
    if train and held_out and _comparable(train, held_out):
        panels = [("loss in nats", train, held_out)]
    else:
        panels = [("loss on held-out text, nats per token", [], held_out), ("training loss", train, [])]
    return [
        (title, _panel(raw, dots, width, "tokens" if by_tokens else "steps", goal=goal(records) if dots else None))
        for title, raw, dots in panels
        if len(raw) > 1 or len(dots) > 1
    ]


def goal(records: Records) -> float | None:
    """The teacher's loss on the held-out text, if it was measured."""
    found = [loss for _, loss in _pairs(records, "step", "eval_teacher_loss")]
    return found[-1] if found else None


def figure_curve(records: Records, key: str, title: str, width: int) -> str:
    """The SVG of another figure of the log over the training; empty if it never changes."""
    tokens = dict(_pairs(records, "step", "tokens"))
    points = _over_tokens(records, key, tokens)
    if len({y for _, y in points}) < 2:
        return ""
    return _panel(points, [], width, "tokens" if tokens else "steps", title)


def series(records: Records) -> tuple[list[Point], list[Point]]:
    """Training and evaluation loss as (tokens, loss); a record without tokens gets those of its step.

    A run that was resumed writes the steps after its checkpoint again: the later record counts.
    """
    tokens = dict(_pairs(records, "step", "tokens"))
    return _over_tokens(records, "loss", tokens), _over_tokens(records, "eval_loss", tokens)


def smooth(points: Sequence[Point], half_life: float) -> list[Point]:
    """Mean weighted by distance, half after `half_life` points on both sides, so that it does not lag behind a fall."""
    values = [y for _, y in points]
    forward, backward = _decayed(values, half_life), _decayed(values[::-1], half_life)[::-1]
    return [
        (x, (total + rest - y) / (weight + other - 1))
        for (x, y), (total, weight), (rest, other) in zip(points, forward, backward, strict=True)
    ]


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points, each the mean of its neighbours; the last one stays at its place."""
    if len(points) <= most:
        return list(points)
    edges = [index * len(points) // most for index in range(most + 1)]
    groups = [points[start:stop] for start, stop in pairwise(edges)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _over_tokens(records: Records, key: str, tokens: dict[float, float]) -> list[Point]:
    losses = dict(_pairs(records, "step", key))
    return [(_seen(step, tokens), loss) for step, loss in sorted(losses.items())]


def _decayed(values: Sequence[float], half_life: float) -> list[Point]:
    """(weighted sum, sum of weights) of the values up to each, the value itself with weight 1."""
    keep = 0.5 ** (1 / max(half_life, 1e-9))
    total, weight, found = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append((total, weight))
    return found


def _pairs(records: Records, x: str, y: str) -> list[Point]:
    found = [(finite(record, x), finite(record, y)) for record in records]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _seen(step: float, tokens: dict[float, float]) -> float:
    """Tokens at a step: as logged, else in proportion to the last step of the log; the step itself if none was."""
    if step in tokens or not tokens:
        return tokens.get(step, step)
    last = next(reversed(tokens))
    return tokens[last] * step / last if last else tokens[last]


def _comparable(train: Sequence[Point], held_out: Sequence[Point]) -> bool:
    (low, high), (below, above) = (_spread(points) for points in (train, held_out))
    gap = max(low - above, below - high, 0.0)
    return gap <= max(high - low, above - below)


def _spread(points: Sequence[Point]) -> Point:
    return min(y for _, y in points), max(y for _, y in points)


def _panel(
    raw: Sequence[Point],
    dots: Sequence[Point],
    width: int,
    unit: str,
    what: str = "loss",
    goal: float | None = None,
) -> str:
    smoothed = smooth(raw, half_life=max(len(raw) / 80, min(HALF_LIFE, len(raw) / 8)))
    rough = thin(raw)
    usual = sorted(y for _, y in rough)[len(rough) // 100 : len(rough) - len(rough) // 100]
    span = (0.0, max(x for x, _ in [*raw, *dots]))
    levels = [*usual, *(y for _, y in [*smoothed, *dots]), *([goal] if goal is not None else [])]
    frame = Frame(width, 300 if width > 500 else 240, span, padded(levels))
    marks = [frame.axes(unit, scaled if unit == "tokens" else plain)]
    if goal is not None:
        x, y = frame.at(span[0], goal)
        marks.append(line([(x, y), frame.at(span[1], goal)], class_="goal"))
        marks.append(text(x + 4, y - 5, f"teacher {goal:.{_digits(frame)}f}", class_="value"))
    if len(raw) > 1:
        marks.append(line([frame.at(x, frame.inside(y)) for x, y in rough], class_="raw"))
        marks.append(line([frame.at(x, y) for x, y in thin(smoothed)], class_="smooth"))
    if dots:
        marks.append(line([frame.at(x, y) for x, y in dots], class_="held-out"))
        marks.extend(_dot(frame, point, unit) for point in dots)
    marks.append(_last(frame, (dots or smoothed)[-1]))
    return frame.draw("".join(marks), f"{what} over {unit}", class_="chart")


def _dot(frame: Frame, point: Point, unit: str) -> str:
    x, y = frame.at(*point)
    title = element("title", f"loss on held-out text {point[1]:.3f} after {human.count(point[0])} {unit}")
    return element("circle", title, class_="dot", cx=x, cy=y, r=4.0)


def _last(frame: Frame, point: Point) -> str:
    """Where the run ended, in figures."""
    x, y = frame.at(*point)
    return text(x, max(y - 12, 12.0), f"{point[1]:.{_digits(frame)}f}", class_="value", text_anchor="end")


def _digits(frame: Frame) -> int:
    """Decimals that tell apart what the frame shows."""
    return max(2, math.ceil(1.3 - math.log10(frame.y[1] - frame.y[0])))
