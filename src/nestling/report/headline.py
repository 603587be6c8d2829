"""The four figures at the top of the page: parameters, memory, perplexity, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestling.report import human
from nestling.report.rows import Row, data_name, evaluation, stages
from nestling.report.run import items, mapping, number, words


@dataclass(frozen=True)
class Tile:
    """A figure, what it was in the parent, and bars that compare the stages.

    bars: (stage, written value, width in percent of the largest).
    """

    label: str
    note: str
    value: str
    ratio: str
    verdict: str
    bars: tuple[tuple[str, str, float], ...]


def headline(summary: Mapping[str, Any]) -> list[Tile]:
    """The tiles for which a child's figure is known; a family has none, its table says more."""
    if items(summary, "members"):
        return []
    found = stages(summary)
    rows = [_params(summary), _memory(summary), _perplexity(summary, found), _speed(summary)]
    names = [("parent", "child"), ("parent", "child"), found, ("parent", "child")]
    return [
        _tile(row, note, stage) for (row, note), stage in zip(rows, names, strict=True) if row.values[-1] is not None
    ]


def _tile(row: Row, note: str, names: tuple[str, ...]) -> Tile:
    known = [(name, value) for name, value in zip(names, row.values, strict=True) if value is not None]
    top = max((value for _, value in known if value < float("inf")), default=0.0)
    bars = tuple((name, row.show(value), min(100.0, 100 * value / top) if top > 0 else 0.0) for name, value in known)
    ratio = human.ratio(row.ratio) if row.ratio is not None else ""
    return Tile(row.label, note, row.show(row.values[-1]), ratio, row.verdict, bars if len(bars) > 1 else ())


def _params(summary: Mapping[str, Any]) -> tuple[Row, str]:
    values = tuple(number(summary, who, "cost", "params") for who in ("parent", "child"))
    saved = (values[0] or 0) - (values[1] or 0) if None not in values else 0
    return Row("parameters", values, human.count), f"{human.count(saved)} fewer" if saved > 0 else ""


def _memory(summary: Mapping[str, Any]) -> tuple[Row, str]:
    """Weights, KV cache and state together; unknown where the weights are."""
    context = number(summary, "child", "cost", "context")
    note = f"weights and cache at {human.count(context)}" if context else "weights and cache"
    return Row("memory", tuple(_bytes(mapping(summary, who, "cost")) for who in ("parent", "child")), human.size), note


def _bytes(cost: Mapping[str, Any]) -> float | None:
    weights = number(cost, "weight_bytes")
    return None if weights is None else weights + sum(number(cost, f"{kind}_bytes") or 0 for kind in ("kv", "state"))


def _perplexity(summary: Mapping[str, Any], found: tuple[str, ...]) -> tuple[Row, str]:
    """On the validation data if it was measured there, else on the first data that was."""
    measured = evaluation(summary, found[-1])
    validation = words(summary, "data", "validation")
    data = next((name for name in measured if name in (validation, data_name(validation))), next(iter(measured), ""))
    values = tuple(number(evaluation(summary, stage), data, "perplexity") for stage in found)
    return Row("perplexity", values, human.figure), f"on {data_name(data)}"


def _speed(summary: Mapping[str, Any]) -> tuple[Row, str]:
    values = tuple(number(summary, who, "speed", "decode_tokens_per_s") for who in ("parent", "child"))
    return Row("decoding", values, human.figure, more_is_better=True), "tokens per second"
