"""What can be chosen in a family: for every axis a list of sizes, one choice for all layers or one for each.

A `Knob` is an axis with its sizes; a row of it is one decision. Sizes are counted as letters count them (query heads
of one KV group), so that decisions are independent of each other. `Space.shape` turns chosen sizes into the config
fields that a `Shape` has. Depth is a knob like the others: how many of the layers stay, the most important ones.
Paper: Nemotron Elastic, arXiv 2511.16664, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.anatomy import Anatomy, Axis
from nestling.elastic.bill import Bill, Sizes
from nestling.errors import ShapeError
from nestling.shape import Shape, fit

# Parts of the parent's size on offer, and the smallest of them; tried in turn until the smallest budget is in reach.
STEPS = 8
FLOORS = ((0.25, 0.5, 0.5), (0.125, 0.25, 0.25), (0.0, 0.0, 0.0))  # of a layer's axis, of the whole model's, of depth
MOST_DEPTHS = 12

# For each knob one number per choice `[rows, choices]`, or per row `[rows]`.
PerChoice = Mapping[str, Tensor]
PerRow = Mapping[str, Tensor]


@dataclass(frozen=True)
class Knob:
    """An axis and its sizes.

    field: the config field. letter: its letter, None for depth. rows: the layers that each row rules. sizes:
    `[rows, choices]`, float64, falling; the first is the parent's.
    """

    field: str
    letter: str | None
    rows: tuple[tuple[int, ...], ...]
    sizes: Tensor


class Space:
    """All knobs of a model, by config field.

    order: layers, most important first. per_layer: fields with a decision for each layer; the others have one for all.
    floor: which of `FLOORS`. axes: fields that may change, all of them unless given.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        order: Sequence[int],
        per_layer: Sequence[str] = (),
        floor: int = 0,
        axes: Sequence[str] = (),
    ):
        self.anatomy = anatomy
        self.rank = torch.empty(anatomy.num_layers, dtype=torch.long)
        self.rank[torch.as_tensor(order)] = torch.arange(anatomy.num_layers)
        self.knobs = {knob.field: knob for knob in self._knobs(per_layer, FLOORS[floor], axes)}
        self._row = {field: self._row_of_layer(knob) for field, knob in self.knobs.items()}
        self._full, _ = Bill(anatomy).whole()

    def spread(self, field: str, per_row: Tensor) -> Tensor:
        """A knob's values per row `[rows, ...]` as values per layer `[num_layers, ...]`."""
        return per_row[self._row[field].clamp(min=0)]

    def expected(self, chances: PerChoice) -> tuple[Sizes, Tensor]:
        """E[size] of every letter in every layer, and the chance of each layer to stay, for `Bill`."""
        return self._for_bill({field: (chances[field] * knob.sizes).sum(-1) for field, knob in self.knobs.items()}), (
            self.gates(chances[self.anatomy.depth_field])
            if self.anatomy.depth_field in self.knobs
            else torch.ones(self.anatomy.num_layers, dtype=torch.float64)
        )

    def gates(self, chances: Tensor) -> Tensor:
        """The chance of each layer to stay `[num_layers]`, from those of the numbers of layers `[1, choices]`."""
        stays = self.rank[:, None] < self.knobs[self.anatomy.depth_field].sizes[0]
        return (stays * chances[0]).sum(-1)

    def exactly(self, chosen: PerRow) -> tuple[Sizes, Tensor]:
        """As `expected`, for sizes that are chosen `[rows]`; they need not be on the lists."""
        sizes = self._for_bill({field: values.double() for field, values in chosen.items()})
        depth = chosen.get(self.anatomy.depth_field)
        count = self.anatomy.num_layers if depth is None else int(depth[0])
        return sizes, (self.rank < count).double()

    def shape(self, chosen: PerRow) -> Shape:
        """The shape with these sizes `[rows]`."""
        depth = self.anatomy.depth_field
        kept = self.kept(chosen)
        fields: dict[str, int | list[int]] = {depth: len(kept)} if depth in chosen else {}
        for field in self.knobs:
            if field != depth:
                values = [self._value(field, chosen, layer) for layer in kept]
                known = [value for value in values if value is not None]
                filled = [max(known) if value is None else value for value in values] if known else []
                if filled:
                    fields[field] = filled[0] if len(set(filled)) == 1 else filled
        return Shape(**fields)

    def sizes_of(self, shape: Mapping[str, int | Sequence[int]]) -> dict[str, Tensor]:
        """The sizes `[rows]` of a shape; for layers that it does not have, the smallest in it."""
        depth, chosen = self.anatomy.depth_field, {}
        order = self.rank.argsort().tolist()
        kept = sorted(order[: int(shape.get(depth, self.anatomy.num_layers))])  # type: ignore[arg-type]
        form = fit(self.anatomy, shape, kept, check_config=False)
        for field, knob in self.knobs.items():
            if knob.letter is None:
                chosen[field] = torch.tensor([len(kept)])
            else:
                rows = [[kept.index(layer) for layer in row if layer in kept] for row in knob.rows]
                sizes = [[form.sizes[place][knob.letter] for place in row] for row in rows]
                least = min((min(row) for row in sizes if row), default=int(knob.sizes[0, 0]))
                chosen[field] = torch.tensor([max(row, default=least) for row in sizes])
        return chosen

    def largest(self) -> dict[str, Tensor]:
        """The parent's own sizes `[rows]`."""
        return {field: knob.sizes[:, 0].long() for field, knob in self.knobs.items()}

    def smallest(self) -> dict[str, Tensor]:
        """The smallest sizes on offer `[rows]`."""
        return {field: knob.sizes[:, -1].long() for field, knob in self.knobs.items()}

    # ---- construction

    def _knobs(self, per_layer: Sequence[str], floor: tuple[float, ...], axes: Sequence[str]) -> Iterator[Knob]:
        anatomy = self.anatomy
        for field in (*per_layer, *axes):
            if field != anatomy.depth_field:
                anatomy.axis(field)
        alike = [field for field in per_layer if field in anatomy.architecture.alike]
        if alike:
            raise ShapeError(f"{alike[0]} has one size in all layers of this architecture: leave it out of per_layer")
        for field, axis in anatomy.axes.items():
            layers = [layer for layer in range(anatomy.num_layers) if axis.scope == "model" or anatomy.has(axis, layer)]
            apart = field in per_layer and axis.scope == "layer"
            rows = tuple((layer,) for layer in layers) if apart else (tuple(layers),)
            sizes = [self._ladder(axis, row, floor) for row in rows]
            if (not axes or field in axes) and len(sizes[0]) > 1 and len({len(line) for line in sizes}) == 1:
                yield Knob(field, axis.letter, rows, torch.tensor(sizes, dtype=torch.float64))
        most, least = anatomy.num_layers, max(1, math.ceil(anatomy.num_layers * floor[2]))
        if (not axes or anatomy.depth_field in axes) and most > least:
            step = max(1, -(-(most - least) // MOST_DEPTHS))
            depths = torch.tensor([list(range(most, least - 1, -step))], dtype=torch.float64)
            yield Knob(anatomy.depth_field, None, (tuple(range(most)),), depths)

    def _ladder(self, axis: Axis, row: tuple[int, ...], floor: tuple[float, ...]) -> list[int]:
        """Falling sizes of an axis that the config class takes; only the parent's where the layers differ in it."""
        anatomy = self.anatomy
        full = {anatomy.sizes(layer)[axis.letter] for layer in row}
        top = max(full)
        if len(full) > 1:
            return [top]
        least = max(1, math.ceil(top * floor[1 if axis.scope == "model" else 0]))
        if axis.active:
            least = max(least, int(getattr(anatomy.config, axis.active)))
        wanted = {max(least, _rounded(top * step / STEPS, top)) for step in range(1, STEPS + 1)} | {top}
        return [size for size in sorted(wanted, reverse=True) if size == top or self.allowed({axis.field: size})]

    def allowed(self, letter_sizes: Mapping[str, int]) -> bool:
        """Whether the config class takes these letter sizes, in all layers alike."""
        try:
            fit(self.anatomy, {field: self._counted(field, size) for field, size in letter_sizes.items()})
        except ShapeError:
            return False
        return True

    def _counted(self, field: str, size: int) -> int:
        axis, sizes = self.anatomy.axis(field), self.anatomy.sizes(None)
        return size * (math.prod(sizes[letter] for letter in axis.within) if axis.counts_all else 1)

    def _row_of_layer(self, knob: Knob) -> Tensor:
        rows = torch.full((self.anatomy.num_layers,), -1)
        for number, layers in enumerate(knob.rows):
            rows[list(layers)] = number
        return rows

    def _for_bill(self, per_row: Mapping[str, Tensor]) -> Sizes:
        sizes = dict(self._full)
        for field, values in per_row.items():
            letter = self.knobs[field].letter
            if letter is not None:
                sizes[letter] = torch.where(self._row[field] >= 0, self.spread(field, values), sizes[letter])
        return sizes

    def kept(self, chosen: PerRow) -> list[int]:
        """The layers that stay, ascending."""
        depth = chosen.get(self.anatomy.depth_field)
        count = self.anatomy.num_layers if depth is None else int(depth[0])
        return torch.nonzero(self.rank < count).flatten().tolist()

    def _value(self, field: str, chosen: PerRow, layer: int) -> int | None:
        """What the config field says in a layer; None where the layer lacks the axis."""
        axis = self.anatomy.axis(field)
        row = int(self._row[field][layer])
        if row < 0:
            return None
        value = int(chosen[field][row])
        for letter in axis.within if axis.counts_all else ():
            outer = next((knob for knob in self.knobs.values() if knob.letter == letter), None)
            if outer is None or int(self._row[outer.field][layer]) < 0:
                value *= self.anatomy.sizes(layer)[letter]
            else:
                value *= int(chosen[outer.field][self._row[outer.field][layer]])
        return value


def _rounded(size: float, full: int) -> int:
    """A whole size; a multiple of 8 where there are many units."""
    grain = 8 if full >= 128 and full % 8 == 0 else 1
    return max(1, round(size / grain) * grain)
