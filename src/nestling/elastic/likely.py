"""Chances of one forward pass as masks: each line of a mask is made once, however many tensors are seen through it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestling.anatomy.notation import Dimension
from nestling.elastic.space import PerChoice, Space


class Likely:
    """The chances `[rows, choices]` of every knob, in the dtype and on the device of `like`."""

    def __init__(self, space: Space, chances: PerChoice, like: Tensor):
        self.space = space
        self._chances = {field: chances[field].to(like) for field in space.knobs}
        self._units: dict[str, Tensor] = {}
        self._lines: dict[tuple[object, ...], Tensor] = {}

    def choices(self, letter: str, layer: int | None) -> tuple[list[int], Tensor]:
        """A letter's sizes in a layer, falling, and their chances `[choices]`."""
        field, row = self.space.row(letter, layer)
        return self.space.knobs[field].sizes[row].long().tolist(), self._chances[field][row]

    def units(self, letter: str, layer: int | None) -> Tensor:
        """The mask of one letter's units `[units]`: the chance that at least so many are kept."""
        field, row = self.space.row(letter, layer)
        if field not in self._units:
            kept, chances = self.space.kept_units(field), self._chances[field]
            self._units[field] = torch.einsum("rcu,rc->ru", kept.to(chances), chances)
        return self._units[field][row, : int(self.space.knobs[field].sizes[row, 0])]

    def along(self, dimension: Dimension, layer: int | None, letters: frozenset[str]) -> Tensor:
        """The mask of a dimension's elements, from those of some of its letters."""
        rows = tuple(self.space.row(letter, layer) for letter in sorted(letters))
        sizes = self.space.anatomy.sizes(layer)
        key = (dimension, rows, tuple(sizes.get(letter) for letter in sorted(dimension.letters)))
        if key not in self._lines:
            units = {letter: self.units(letter, layer) for letter in letters}
            self._lines[key] = _along(dimension, units, sizes)
        return self._lines[key]


def _along(dimension: Dimension, units: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    like, parts = next(iter(units.values())), []
    for part in dimension.parts:
        line = like.new_ones(())
        for letter in part:
            size = int(letter) if letter.isdigit() else sizes[letter]
            own = units.get(letter)
            line = line[..., None] * (like.new_ones(size) if own is None else own)
        parts.append(line.flatten())
    return dimension.joined(parts, sizes)
