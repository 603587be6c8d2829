"""From a ranking and a shape to the units that stay: the one selection that `reorder`, `masked` and `prune` share.

Units are chosen best first, inside the groups that they may not leave; groups are chosen first, so that a kept
query head always sits in a kept KV group. No tensor is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor

from nestling.anatomy import Anatomy, Axis, TensorSpec
from nestling.anatomy.notation import Choice, kept_elements
from nestling.errors import ShapeError
from nestling.ranking.ranking import Ranking
from nestling.shape import Form, fit


@dataclass(frozen=True)
class Selection:
    """What stays of a model: the form, and per kept layer the chosen units of every letter."""

    anatomy: Anatomy
    form: Form
    choices: tuple[dict[str, Choice], ...]

    def keeps(self, spec: TensorSpec) -> bool:
        """Whether anything of a tensor stays: the tensors of dropped layers, and those that are for them, do not."""
        return all(layer is None or layer in self.form.layers for layer in (spec.layer, spec.use))

    def copies(self, spec: TensorSpec) -> bool:
        """Whether a tensor that stays is one that an earlier kept layer shares."""
        sharing, layer = self.anatomy.sharing, spec.layer
        return layer is not None and spec.block == sharing.block and sharing.is_copy(layer, self.form.layers)

    def index(self, spec: TensorSpec) -> tuple[LongTensor | None, ...]:
        """For each dimension of a tensor the elements that stay; None where all do. The layer must be a kept one.

        `[n]`, or `[first, n]` where they differ between the kept elements of the first dimension, as neurons do between
        experts.
        """
        layer = self.form.layers[0] if spec.layer is None else spec.layer
        choices = self.choices[self.form.layers.index(layer)]
        sizes = self.anatomy.sizes(spec.layer)
        return kept_elements(spec.layout, choices, sizes)


def choose(anatomy: Anatomy, ranking: Ranking, shape: Mapping[str, Any], ascending: bool = True) -> Selection:
    """The units that stay for a shape.

    ascending: keep units in the parent's order (a cut to the same size then changes no bit); otherwise best first.
    Raises `ShapeError` for a shape that cannot be cut, or a ranking that was made on another model.
    """
    check_ranking(anatomy, ranking)
    layers = None
    if anatomy.depth_field in shape:
        layers = kept_layers(anatomy, ranking, shape[anatomy.depth_field])
    form = fit(anatomy, shape, layers)
    return Selection(
        anatomy, form, tuple(_choices(anatomy, ranking, form, i, ascending) for i in range(len(form.layers)))
    )


def kept_layers(anatomy: Anatomy, ranking: Ranking, count: Any) -> list[int] | None:
    """The `count` most important layers, ascending; None leaves a senseless count to `fit`.

    Among them is always one of each kind that the architecture cannot do without (`Architecture.keeps`).
    """
    if not isinstance(count, int) or not 1 <= count <= anatomy.num_layers:
        return None
    return sorted(anatomy.by_importance(ranking.order(anatomy.depth_field).tolist())[:count])


def prefix_ranking(anatomy: Anatomy, depth: Tensor | None = None) -> Ranking:
    """The ranking of a model that is sorted already: earlier units are more important.

    depth: scores of the layers `[num_layers]`; they cannot be sorted in place, so their order must be known.
    """
    scores: dict[str, Any] = {}
    for axis in anatomy.axes.values():
        per_layer = tuple(
            -torch.arange(
                anatomy.units(axis, layer) if anatomy.has(axis, layer) or axis.scope == "model" else 0
            ).float()
            for layer in range(anatomy.num_layers)
        )
        scores[axis.field] = per_layer[0] if axis.scope == "model" else per_layer
    if depth is not None:
        scores[anatomy.depth_field] = depth
    return Ranking(scores, {"metric": "sorted"})


def check_ranking(anatomy: Anatomy, ranking: Ranking) -> None:
    """Raises `ShapeError` when a ranking's units are not this model's."""
    for field, scores in ranking.scores.items():
        if field == anatomy.depth_field:
            sizes, expected = [len(scores)], [anatomy.num_layers]
        else:
            axis = anatomy.axis(field)
            layers = [0] if axis.scope == "model" else range(anatomy.num_layers)
            expected = [anatomy.units(axis, i) if axis.scope == "model" or anatomy.has(axis, i) else 0 for i in layers]
            sizes = [len(scores)] if isinstance(scores, Tensor) else [len(layer) for layer in scores]
        if sizes != expected:
            raise ShapeError(
                f"the ranking scores {field}={sizes[:3]} units but the model has {expected[:3]}: rank this model anew"
            )


def flat_units(selection: Selection, axis: Axis, layer: int) -> Tensor:
    """The kept units of an axis in a kept layer, counted through all groups as scores are `[kept]`."""
    choices = selection.choices[selection.form.layers.index(layer)]
    return _flat((*axis.within, axis.letter), choices, selection.anatomy.sizes(layer)).flatten()


def _choices(anatomy: Anatomy, ranking: Ranking, form: Form, position: int, ascending: bool) -> dict[str, Choice]:
    layer, sizes = form.layers[position], form.sizes[position]
    choices: dict[str, Choice] = {}
    for axis in sorted(anatomy.axes.values(), key=lambda axis: len(axis.within)):
        if axis.field not in ranking.scores:
            _require_whole(anatomy, axis, layer, sizes)
        elif axis.scope == "model" or anatomy.has(axis, layer):
            order = ranking.order(axis.field, None if axis.scope == "model" else anatomy.home(axis, layer))
            choices[axis.letter] = _choose_units(anatomy, axis, order, choices, sizes[axis.letter], layer, ascending)
    return choices


def _require_whole(anatomy: Anatomy, axis: Axis, layer: int, sizes: Mapping[str, int]) -> None:
    if sizes[axis.letter] != anatomy.sizes(layer)[axis.letter]:
        raise ShapeError(f"the ranking does not score {axis.field}, which this shape cuts: rank it or leave it whole")


def _choose_units(
    anatomy: Anatomy,
    axis: Axis,
    order: LongTensor,
    choices: Mapping[str, Choice],
    count: int,
    layer: int,
    ascending: bool,
) -> Choice:
    """The first `count` units of `order` in each kept group, as positions inside that group."""
    size = anatomy.sizes(layer)[axis.letter]
    if not axis.within:
        units = order[:count]
        return Choice(units.sort().values if ascending else units)
    groups = _flat(axis.within, choices, anatomy.sizes(layer))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    in_group = rank.view(-1, size)[groups.flatten()].argsort(dim=-1)[:, :count]
    units = in_group.sort(dim=-1).values if ascending else in_group
    return Choice(units.view(*groups.shape, count), axis.within)


def _flat(letters: tuple[str, ...], choices: Mapping[str, Choice], sizes: Mapping[str, int]) -> Tensor:
    """Numbers of the kept outer units, counted through all their groups: `[kept of each letter]`."""
    flat = torch.zeros((), dtype=torch.long)
    for letter in letters:
        choice = choices.get(letter) or Choice(torch.arange(sizes[letter]))
        flat = flat[..., None] * sizes[letter] + choice.units
    return flat.view(*flat.shape) if math.prod(flat.shape) else flat
