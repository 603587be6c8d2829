"""The before/after comparison as data: which stages a run went through and one row per figure.

The page, the card and the terminal show the same rows. Costs are counted, so they hold for the child before and
after distillation; perplexity is measured at every stage; speed is measured once, on the child as it was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nestling.report import human
from nestling.report.run import items, mapping, number, words


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
    """Stages (`parent`, then some of `pruned`, `distilled`, `child`, or a family's members; or `model`) and the rows.

    paired: whether the last stage is what became of the parent, so that a ratio says something.
    """

    stages: tuple[str, ...]
    rows: tuple[Row, ...]
    paired: bool


def compare(summary: Mapping[str, Any]) -> Comparison:
    """The comparison that a summary holds; rows without any figure are left out."""
    found = {stage: figures(summary, stage) for stage in stages(summary)}
    every = [*_costs(found), *_perplexities(found), *_speeds(found)]
    rows = tuple(row for row in every if any(value is not None for value in row.values))
    return Comparison(tuple(found), rows, len(found) > 1 and not items(summary, "members"))


def stages(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """What the run went through, or the members that it made, as far as the summary tells; `model` for a lone one."""
    if mapping(summary, "cost") and not mapping(summary, "parent"):
        return ("model",)
    members = [words(member, "name") for member in items(summary, "members")]
    if members:
        return ("parent", *members)
    child = mapping(summary, "child")
    after = [name for name, key in (("pruned", "pruned"), ("distilled", "evaluation")) if mapping(child, key)]
    if not after and child:
        after = ["child"]
    return ("parent", *after)


def figures(summary: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """`cost`, `evaluation` and `speed` of a stage; speed is that of a model that is finished."""
    if stage == "model":
        return dict(summary)
    for member in items(summary, "members"):
        if words(member, "name") == stage:
            return mapping(member)
    if stage == "parent":
        return mapping(summary, "parent")
    child = mapping(summary, "child")
    if stage == "pruned":
        last = not mapping(child, "evaluation")
        return {
            "cost": child.get("cost"),
            "evaluation": child.get("pruned"),
            "speed": child.get("speed") if last else None,
        }
    return child


def evaluation(summary: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """{data: figures} as measured at a stage."""
    return mapping(figures(summary, stage), "evaluation")


def data_name(spec: str) -> str:
    """The short name of a data set: `builtin:stdlib` -> `stdlib`, `some/folder/wiki.txt` -> `wiki.txt`."""
    return spec.removeprefix("builtin:").rstrip("/").rsplit("/", 1)[-1] or spec


def _costs(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    costs = [mapping(stage, "cost") for stage in found.values()]

    def row(label: str, key: str, show: Callable[[float | None], str]) -> Row:
        return Row(label, tuple(number(cost, key) for cost in costs), show)

    yield row("parameters", "params", human.count)
    if any(number(cost, "active_params") != number(cost, "params") for cost in costs):
        yield row("active parameters", "active_params", human.count)
    yield row("weights", "weight_bytes", human.size)
    yield row(f"KV cache{_at(next(filter(None, costs), {}))}", "kv_bytes", human.size)
    if any(number(cost, "state_bytes") for cost in costs):
        yield row("state", "state_bytes", human.size)
    yield row("compute per token", "flops_per_token", human.flops)


def _at(cost: Mapping[str, Any]) -> str:
    context, batch = number(cost, "context"), number(cost, "batch")
    if not context:
        return ""
    return f" at {context:,.0f}" + (f" x {batch:,.0f}" if batch and batch > 1 else "")


def _perplexities(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    measured = [mapping(stage, "evaluation") for stage in found.values()]
    for data in dict.fromkeys(name for figures in measured for name in figures):
        values = tuple(number(figures, data, "perplexity") for figures in measured)
        yield Row(f"perplexity, {data_name(data)}", values, human.figure)


def _speeds(found: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    for label in ("prefill", "decode"):
        values = tuple(number(stage, "speed", f"{label}_tokens_per_s") for stage in found.values())
        yield Row(f"{label}, tokens/s", values, human.figure, more_is_better=True)
