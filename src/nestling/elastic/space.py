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
import torch.nn.functional as F
from torch import Tensor

from nestling.anatomy import Anatomy, Axis
from nestling.elastic.bill import Sizes, letters_of, whole
from nestling.errors import ShapeError
from nestling.shape import Shape, allows, fit

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
        if not self.knobs:
            raise ShapeError("nothing in this model has another size on offer: allow more axes")
        self._row = {field: self._row_of_layer(knob) for field, knob in self.knobs.items()}
        self._rows = {field: row.tolist() for field, row in self._row.items()}
        self._fields = {knob.letter: field for field, knob in self.knobs.items() if knob.letter is not None}
        self._letters: dict[int | None, frozenset[str]] = {None: frozenset(self._fields)}
        for layer in range(anatomy.num_layers):
            self._letters[layer] = frozenset(k for k, field in self._fields.items() if self._rows[field][layer] >= 0)
        self._kept: dict[str, Tensor] = {}
        self._full, self._gates = whole(anatomy)
        self._lay_out()

    def letters_of(self, layer: int | None) -> frozenset[str]:
        """Letters that may shrink in a layer; all of them for what is outside the layers."""
        return self._letters[layer]

    def row(self, letter: str, layer: int | None) -> tuple[str, int]:
        """The knob of a letter, and its row that rules a layer; the first one outside the layers."""
        field = self._fields[letter]
        return field, self._rows[field][layer or 0]

    def kept_units(self, field: str) -> Tensor:
        """Which units each choice keeps, the first ones: `[rows, choices, units]`."""
        if field not in self._kept:
            sizes = self.knobs[field].sizes
            self._kept[field] = torch.arange(int(sizes.max())) < sizes[..., None]
        return self._kept[field]

    def spread(self, field: str, per_row: Tensor) -> Tensor:
        """A knob's values per row `[rows, ...]` as values per layer `[num_layers, ...]`."""
        return per_row[self._row[field].clamp(min=0)]

    def pack(self, values: PerChoice) -> Tensor:
        """Values of every choice `[rows, choices]` of each knob as one matrix `[all rows, most choices]`.

        What no knob has is minus infinity.
        """
        most = self.flat_sizes.shape[1]
        padded = [F.pad(values[f], (0, most - values[f].shape[1]), value=-torch.inf) for f in self.knobs]
        return torch.cat(padded).double()

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """The reverse of `pack`."""
        parts = flat.split([len(knob.rows) for knob in self.knobs.values()])
        return {f: part[:, : knob.sizes.shape[1]] for (f, knob), part in zip(self.knobs.items(), parts, strict=True)}

    def expected_flat(self, chances: Tensor) -> tuple[Sizes, Tensor]:
        """As `expected`, for packed chances, 0 where a knob has no choice."""
        sizes = self._for_bill((chances * self.flat_sizes).sum(-1))
        return sizes, self._gates if self._stays is None else self._stays @ chances[self._depth_row]

    def expected(self, chances: PerChoice) -> tuple[Sizes, Tensor]:
        """E[size] of every letter in every layer, and the chance of each layer to stay, for `Bill`."""
        return self.expected_flat(self.pack(chances).clamp(min=0))

    def gates(self, chances: Tensor) -> Tensor:
        """The chance of each layer to stay `[num_layers]`, from those of the numbers of layers `[1, choices]`."""
        stays = self.rank[:, None] < self.knobs[self.anatomy.depth_field].sizes[0]
        return (stays * chances[0]).sum(-1)

    def exactly(self, chosen: PerRow) -> tuple[Sizes, Tensor]:
        """As `expected`, for sizes that are chosen `[rows]`; they need not be on the lists."""
        return self.exactly_flat(self.flat(chosen))

    def exactly_flat(self, flat: Tensor) -> tuple[Sizes, Tensor]:
        """As `exactly`, for the sizes of all rows in one tensor `[..., all rows]`, of many shapes at once."""
        whole = torch.full(flat.shape[:-1], self.anatomy.num_layers)
        count = whole if self._stays is None else flat[..., self._depth_row]
        return self._for_bill(flat.double()), (self.rank < count[..., None]).double()

    def flat(self, chosen: PerRow) -> Tensor:
        """Sizes `[rows]` of all knobs as one line `[all rows]`."""
        return torch.cat([chosen[field] for field in self.knobs])

    def by_knob(self, flat: Tensor) -> dict[str, Tensor]:
        """The reverse of `flat`."""
        return dict(zip(self.knobs, flat.split([len(knob.rows) for knob in self.knobs.values()]), strict=True))

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

    def drawn(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sizes `[rows]` drawn evenly from those on offer."""
        chosen = {}
        for field, knob in self.knobs.items():
            rows, count = knob.sizes.shape
            picked = torch.randint(0, count, (rows, 1), generator=generator)
            chosen[field] = knob.sizes.gather(1, picked).flatten().long()
        return chosen

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
        return allows(self.anatomy, {field: self._counted(field, size) for field, size in letter_sizes.items()})

    def _counted(self, field: str, size: int) -> int:
        axis, sizes = self.anatomy.axis(field), self.anatomy.sizes(None)
        return size * (math.prod(sizes[letter] for letter in axis.within) if axis.counts_all else 1)

    def _row_of_layer(self, knob: Knob) -> Tensor:
        rows = torch.full((self.anatomy.num_layers,), -1)
        for number, layers in enumerate(knob.rows):
            rows[list(layers)] = number
        return rows

    def _lay_out(self) -> None:
        """Where packed rows go: the row of every letter in every layer, -1 where it has none."""
        most, start = max(knob.sizes.shape[1] for knob in self.knobs.values()), 0
        self.flat_sizes = torch.cat([F.pad(k.sizes, (0, most - k.sizes.shape[1])) for k in self.knobs.values()])
        self._source = torch.full(self._full.shape, -1)
        self._stays: Tensor | None = None
        letters = letters_of(self.anatomy)
        for field, knob in self.knobs.items():
            if knob.letter is None:
                self._depth_row = start
                stays = (self.rank[:, None] < knob.sizes[0]).double()
                self._stays = F.pad(stays, (0, most - stays.shape[1]))
            else:
                rows = self._row[field]
                self._source[letters.index(knob.letter)] = torch.where(rows >= 0, rows + start, -1)
            start += len(knob.rows)

    def _for_bill(self, flat: Tensor) -> Sizes:
        """Sizes of all rows `[..., all rows]` by letter and layer; the parent's where nothing may be chosen."""
        return torch.where(self._source >= 0, flat[..., self._source.clamp(min=0)], self._full)

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
