"""The picture of the model: every axis of every layer as a strip of its units, and what was cut from it.

A strip shows the kept units first, then the cut ones, each part from most to least important. Long strips are drawn
as at most `CELLS` cells, coloured by the mean score of the units in them; the cut is drawn to the unit. Scores of
one axis share one scale over all layers, logarithmic if they spread over more than a factor of four. Knows
configs' field names only as words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nestling.report import human
from nestling.report.colour import LEVELS
from nestling.report.run import finite, get, items, mapping, number, words
from nestling.report.svg import element, short

CELLS = 56
SEPARATE = 16

NAMES = {
    "hidden_size": "hidden channels",
    "intermediate_size": "FFN neurons",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV groups",
    "num_hidden_layers": "layers",
    "num_experts": "experts",
    "num_local_experts": "experts",
    "n_routed_experts": "experts",
    "moe_intermediate_size": "neurons per expert",
    "mamba_num_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head channels",
    "ssm_state_size": "Mamba state",
}


@dataclass(frozen=True)
class Strip:
    """One axis in one layer: its units, how many were kept, and the scores in the order in which they are drawn."""

    units: int
    kept: int
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def cut(self) -> int:
        return self.units - self.kept


@dataclass(frozen=True)
class AxisPicture:
    """An axis and its strips: one per layer of the parent, or a single one if it runs through the model."""

    name: str
    whole_model: bool
    strips: tuple[Strip, ...]
    scale: Scale

    @property
    def per_layer(self) -> str:
        """`1,152 of 1,536`, or ranges where layers differ; dropped layers do not count."""
        left = [strip for strip in self.strips if strip.kept] or self.strips
        return f"{sizes([strip.kept for strip in left])} of {sizes([strip.units for strip in left])}"

    @property
    def shrunk(self) -> bool:
        """Whether some layer lost a part of its units, not all of them."""
        return any(strip.cut and strip.kept for strip in self.strips)

    @property
    def weight(self) -> float:
        """Width of the axis's column beside the others'."""
        widest = max((strip.units for strip in self.strips), default=1)
        return min(5.0, max(1.0, math.log2(max(widest, 2)) - 5))


@dataclass(frozen=True)
class Scale:
    """Which colour level a score has: from the 2nd to the 98th percentile, so that outliers do not wash it out."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, scores: np.ndarray) -> Scale:
        if not len(scores):
            return cls(0.0, 1.0, False)
        low, high = (float(edge) for edge in np.quantile(scores, (0.02, 0.98)))
        return cls(low, high, logarithmic=0 < low * 4 < high)

    def level(self, score: float) -> int:
        """0 for the least important to `LEVELS` - 1."""
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        value = math.log(max(score, 1e-300)) if self.logarithmic else score
        share = (value - low) / (high - low) if high > low else 1.0
        return round(min(1.0, max(0.0, share)) * (LEVELS - 1))


def name_of(field: str) -> str:
    """What people call the units that a config field counts."""
    return NAMES.get(field, field.removeprefix("num_").replace("_", " "))


def axes(summary: Mapping[str, Any]) -> list[AxisPicture]:
    """The axes of a run's summary, whole-model ones first; axes without sizes are left out."""
    found = [axis for axis in (_axis(entry) for entry in items(summary, "axes")) if axis is not None]
    return sorted(found, key=lambda axis: not axis.whole_model)


def strip_svg(strip: Strip, scale: Scale) -> str:
    """The cells of a strip, one path per colour; the drawing is stretched to whatever room it gets."""
    paths: dict[int, list[str]] = {}
    gap = 0.1 if len(strip.scores) <= SEPARATE else 0.0
    for start, stop, level in _runs(strip.scores, scale, merge=not gap):
        width = short(float(stop - start - gap))
        paths.setdefault(level, []).append(f"M{start} 0h{width}v1h-{width}z")
    total = float(max(len(strip.scores), 1) - gap)
    marks = "".join(element("path", class_=f"k{level}", d="".join(cells)) for level, cells in paths.items())
    return element("svg", marks, viewBox=f"0 0 {short(total)} 1", preserveAspectRatio="none", aria_hidden="true")


def describe(shape: Mapping[str, Any]) -> str:
    """A shape in words: `26 layers · 1,152 FFN neurons`; a list of sizes becomes its range."""
    return " · ".join(f"{sizes(value)} {name_of(field)}" for field, value in shape.items())


def sizes(value: Any) -> str:
    """A size, or the range of a list of sizes: `1,152`, `896–1,536`."""
    found = [size for size in map(number, items(value) or [value]) if size is not None]
    if not found:
        return human.NOTHING
    low, high = human.count(min(found)), human.count(max(found))
    return low if low == high else f"{low}–{high}"


def layers(summary: Mapping[str, Any]) -> tuple[int, set[int], list[float]]:
    """(number of the parent's layers, the kept ones, their importance if known)."""
    said = mapping(summary, "layers")
    importance = [finite(score) or 0.0 for score in items(said, "importance")]
    lengths = [len(items(axis, "parent")) for axis in items(summary, "axes")]
    total = int(finite(said, "parent") or max([len(importance), *lengths]))
    kept = {int(layer) for layer in items(said, "kept") if finite(layer) is not None}
    return (
        total,
        kept if "kept" in said else set(range(total)),
        importance if len(importance) == total else [],
    )


def _axis(entry: Any) -> AxisPicture | None:
    whole_model = words(entry, "scope") == "model"
    parent, child = (_sizes(entry, key) for key in ("parent", "child"))
    if not parent:
        return None
    scores, kept = (_per_layer(get(entry, key), whole_model) for key in ("importance", "kept"))
    strips = tuple(
        _strip(units, _nth(child, layer, units), _nth(scores, layer, []), _nth(kept, layer, None))
        for layer, units in enumerate(parent)
    )
    scale = Scale.of(np.concatenate([strip.scores for strip in strips]))
    return AxisPicture(name_of(words(entry, "field")), whole_model, strips, scale)


def _sizes(entry: Any, key: str) -> list[int]:
    value = get(entry, key)
    return [int(finite(size) or 0) for size in (value if isinstance(value, list) else [value]) if size is not None]


def _per_layer(value: Any, whole_model: bool) -> list[Any]:
    found = items(value)
    return [found] if whole_model and found and not isinstance(found[0], list) else found


def _nth(values: Sequence[Any], position: int, otherwise: Any) -> Any:
    return values[position] if position < len(values) else otherwise


def _strip(units: int, size: int, scores: Any, kept: Any) -> Strip:
    """Without a list of the kept units, the most important ones were kept."""
    size = min(max(size, 0), units)
    values = np.array([finite(score) or 0.0 for score in items(scores)], dtype=np.float64)
    chosen = [unit for unit in items(kept) if isinstance(unit, int) and 0 <= unit < len(values)]
    cut = np.ones(len(values), dtype=bool)
    cut[chosen] = False
    return Strip(units, size, values[np.lexsort((-values, cut))])


def _runs(scores: np.ndarray, scale: Scale, merge: bool) -> list[tuple[int, int, int]]:
    """(start, stop, level) of each stretch of one colour, in units."""
    runs: list[tuple[int, int, int]] = []
    cells = min(CELLS, len(scores))
    for cell in range(cells):
        start, stop = cell * len(scores) // cells, (cell + 1) * len(scores) // cells
        level = scale.level(float(scores[start:stop].mean()))
        if merge and runs and runs[-1][2] == level:
            start = runs.pop()[0]
        runs.append((start, stop, level))
    return runs
