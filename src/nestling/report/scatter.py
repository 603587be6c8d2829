"""The shapes that were tried: parameters against loss, the chosen one marked, the best trade-offs joined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nestling.report import human
from nestling.report.picture import describe
from nestling.report.run import finite, items, mapping, number
from nestling.report.svg import Frame, element, line, padded, scaled


@dataclass(frozen=True)
class Candidate:
    """A shape that was tried; trained: its loss after a short training of so many tokens."""

    shape: dict[str, Any]
    params: float | None
    loss: float | None
    chosen: bool
    trained: float | None = None
    tokens: float | None = None


def candidates(summary: Mapping[str, Any]) -> list[Candidate]:
    """The shapes that were tried, best first: trained the longest, then the lowest loss; those not scored last.

    A candidate that says `"chosen": true` is the chosen one; otherwise it is the one with the child's shape.
    """
    entries = [entry for entry in items(summary, "candidates") if mapping(entry)]
    said = [entry.get("chosen") is True for entry in entries]
    shape = mapping(summary, "shape")
    chosen = said if any(said) else [bool(shape) and mapping(entry, "shape") == shape for entry in entries]
    found = [
        Candidate(*_known(entry), mark, finite(entry, "trained_loss"), number(entry, "trained_tokens"))
        for entry, mark in zip(entries, chosen, strict=True)
    ]
    return sorted(found, key=_place)


def others(summary: Mapping[str, Any]) -> list[Candidate]:
    """Shapes that were measured on the way to the candidates, such as each axis cut alone."""
    entries = [entry for entry in items(summary, "measured") if mapping(entry)]
    return [Candidate(*_known(one), False) for one in entries]


def _known(entry: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, float | None]:
    return mapping(entry, "shape"), finite(entry, "params"), finite(entry, "loss")


def _place(one: Candidate) -> tuple[float, float]:
    loss = one.loss if one.trained is None else one.trained
    return -(one.tokens or 0), math.inf if loss is None else loss


def scatter(found: Sequence[Candidate], width: int) -> str:
    """The shapes as points, and a line through those that no other beats; empty if fewer than two can be placed."""
    placed = [(one, one.params, one.loss) for one in found if one.params is not None and one.loss is not None]
    if len(placed) < 2:
        return ""
    ranges = padded(params for _, params, _ in placed), padded(loss for _, _, loss in placed)
    frame = Frame(width, 300 if width > 400 else 240, *ranges)
    chosen_last = sorted(placed, key=lambda entry: entry[0].chosen)
    marks = [_point(frame, *entry) for entry in chosen_last]
    front = line([frame.at(*point) for point in pareto([(params, loss) for _, params, loss in placed])], class_="front")
    drawn = frame.axes("parameters", scaled) + front + "".join(marks)
    return frame.draw(drawn, "loss of the candidate shapes over their parameters", class_="chart")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (parameters, loss) those with no other that is smaller in one and not larger in the other, smallest first."""
    front: list[tuple[float, float]] = []
    for params, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((params, loss))
    return front


def fields(found: Sequence[Candidate]) -> list[str]:
    """The config fields in which the candidates were shaped, the depth first."""
    every = dict.fromkeys(field for one in found for field in one.shape)
    return sorted(every, key=lambda field: field != "num_hidden_layers")


def _point(frame: Frame, one: Candidate, params: float, loss: float) -> str:
    x, y = frame.at(params, loss)
    title = element("title", escape(f"{describe(one.shape)}: {human.count(params)}, loss {loss:.3f}"))
    kind = "candidate chosen" if one.chosen else "candidate"
    return element("circle", title, class_=kind, cx=x, cy=y, r=6.5 if one.chosen else 4.5)
