"""The before/after comparison as data: which stages a run went through and one row per figure.

The page, the card and the terminal show the same rows. Costs are counted, so they hold for the child before and
after distillation; perplexity is measured at every stage; speed is measured once, on the child as it was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.report import human
from nestling.report.run import mapping, number


@dataclass(frozen=True)
class Row:
    """One figure through the stages of a run.

    values: one per stage of the comparison, the parent first, None where it was not measured.
    show: how the figure is written. more_is_better: as for speed; everything else should be small.
    """

    label: str
    values: tuple[float | None, ...]
    show: Callable[[float | None], str]
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """The last stage over the parent."""
        return human.quotient(self.values[-1], self.values[0]) if len(self.values) > 1 else None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `same` to within half a percent; empty if there is no ratio."""
        if self.ratio is None:
            return ""
        if abs(self.ratio - 1) < 0.005:
            return "same"
        return "better" if (self.ratio > 1) == self.more_is_better else "worse"


@dataclass(frozen=True)
class Comparison:
    """Stages (`parent`, then some of `pruned`, `distilled`, `child`) and the rows that run through them."""

    stages: tuple[str, ...]
    rows: tuple[Row, ...]


def compare(summary: Mapping[str, Any]) -> Comparison:
    """The comparison that a summary holds; rows without any figure are left out."""
    found = stages(summary)
    every = [*_costs(summary, found), *_perplexities(summary, found), *_speeds(summary, found)]
    return Comparison(found, tuple(row for row in every if any(value is not None for value in row.values)))


def stages(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What the run went through, as far as the summary tells."""
    child = mapping(summary, "child")
    after = [name for name, key in (("pruned", "pruned"), ("distilled", "evaluation")) if mapping(child, key)]
    if not after and child:
        after = ["child"]
    return ("parent", *after)


def evaluation(summary: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """{data: figures} as measured at a stage."""
    path = {
        "parent": ("parent", "evaluation"),
        "pruned": ("child", "pruned"),
        "distilled": ("child", "evaluation"),
    }
    return mapping(summary, *path[stage]) if stage in path else {}


def data_name(spec: str) -> str:
    """The short name of a data set: `builtin:stdlib` -> `stdlib`, `some/folder/wiki.txt` -> `wiki.txt`."""
    return spec.removeprefix("builtin:").rstrip("/").rsplit("/", 1)[-1] or spec


def _costs(summary: Mapping[str, Any], found: tuple[str, ...]) -> Iterator[Row]:
    before, after = mapping(summary, "parent", "cost"), mapping(summary, "child", "cost")

    def row(label: str, key: str, show: Callable[[float | None], str]) -> Row:
        return Row(label, (number(before, key), *[number(after, key)] * (len(found) - 1)), show)

    yield row("parameters", "params", human.count)
    if any(number(cost, "active_params") != number(cost, "params") for cost in (before, after)):
        yield row("active parameters", "active_params", human.count)
    yield row("weights", "weight_bytes", human.size)
    yield row(f"KV cache{_at(before or after)}", "kv_bytes", human.size)
    if number(before, "state_bytes") or number(after, "state_bytes"):
        yield row("state", "state_bytes", human.size)
    yield row("compute per token", "flops_per_token", human.flops)


def _at(cost: Mapping[str, Any]) -> str:
    context, batch = number(cost, "context"), number(cost, "batch")
    if not context:
        return ""
    return f" at {context:,.0f}" + (f" x {batch:,.0f}" if batch and batch > 1 else "")


def _perplexities(summary: Mapping[str, Any], found: tuple[str, ...]) -> Iterator[Row]:
    measured = {stage: evaluation(summary, stage) for stage in found}
    for data in dict.fromkeys(name for figures in measured.values() for name in figures):
        values = tuple(number(measured[stage], data, "perplexity") for stage in found)
        yield Row(f"perplexity, {data_name(data)}", values, human.figure)


def _speeds(summary: Mapping[str, Any], found: tuple[str, ...]) -> Iterator[Row]:
    for label in ("prefill", "decode"):
        before, after = (number(summary, who, "speed", f"{label}_tokens_per_s") for who in ("parent", "child"))
        values = (before, *[None] * (len(found) - 2), after) if len(found) > 1 else (before,)
        yield Row(f"{label}, tokens/s", values, human.figure, more_is_better=True)
