"""Iterative importance: cut a little, score again what stays, until the target is reached.

Minitron, arXiv 2407.14679, section 2.3: in round i of T units are scored on a model of the size d - i (d - d_t) / T and
cut to the next. Nothing is really cut here: the parent is masked, so scores keep the parent's numbers and one ranking
comes out. Units of later rounds rank above those that went before. (The paper finds no gain after retraining.) Layers
have the same in `greedy_layers` of `rank`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.errors import ShapeError
from nestling.ranking.rank import rank
from nestling.ranking.ranking import Ranking, Scores
from nestling.ranking.sweep import Batch
from nestling.shape import Shape, fit
from nestling.surgery.choose import Selection, choose, flat_units
from nestling.surgery.mask import masked


def rank_iteratively(
    model: PreTrainedModel, batches: Iterable[Batch], shape: Mapping[str, Any], rounds: int, **how: Any
) -> Ranking:
    """The ranking by which `shape` is cut in so many rounds; with one round it sorts as `rank` does.

    shape: one size for each axis. how: what `rank` takes. Raises `ShapeError` for a size per layer, or rounds below 1.
    """
    if rounds < 1 or not all(isinstance(size, int) for size in shape.values()):
        raise ShapeError(f"rounds={rounds} towards {dict(shape)}: give at least 1 round, and one size for each axis")
    anatomy, kept = Anatomy.of(model), list(batches)
    found = rank(model, kept, **how)
    scores = {field: _placed(values, 0) for field, values in found.scores.items()}
    scores[anatomy.depth_field] = found.scores[anatomy.depth_field]
    for number in range(1, rounds):
        ranking = Ranking(scores)
        between = _between(anatomy, shape, number / rounds)
        selection = choose(anatomy, ranking, between)
        with masked(model, between, ranking):
            fresh = rank(model, kept, **how)
        for field in between:
            scores[field] = _raised(scores[field], fresh.scores[field], selection, field, number)
    return Ranking(scores, {**found.info, "rounds": rounds})


def _placed(scores: Scores, number: int) -> Scores:
    """Each unit's place among its like, from `number` for the least important to below `number + 1`."""
    if not isinstance(scores, Tensor):
        return tuple(_placed(layer, number) for layer in scores)  # type: ignore[misc]
    places = torch.empty(len(scores), dtype=torch.float64)
    # Sorted as `Ranking` does: of equals the earlier unit is the more important.
    order = torch.sort(scores.double(), descending=True, stable=True).indices.flip(0)
    places[order] = torch.arange(len(scores), dtype=torch.float64) / max(1, len(scores))
    return places + number


def _raised(before: Scores, fresh: Scores, selection: Selection, field: str, number: int) -> Scores:
    """The scores with those of units that are still there replaced by their places in this round."""
    axis = selection.anatomy.axis(field)

    def one(old: Tensor, new: Tensor, layer: int) -> Tensor:
        units = flat_units(selection, axis, layer)
        result = old.clone()
        result[units] = _placed(new[units], number)  # type: ignore[assignment]
        return result

    if isinstance(before, Tensor) and isinstance(fresh, Tensor):
        return one(before, fresh, selection.form.layers[0])
    there = [layer for layer, scores in enumerate(before) if len(scores)]
    return tuple(one(before[i], fresh[i], i) if i in there else before[i] for i in range(len(before)))


def _between(anatomy: Anatomy, shape: Mapping[str, Any], part: float) -> Shape:
    """The legal sizes nearest to that part of the way from the model to the shape; layers are left alone."""
    sizes: dict[str, int] = {}
    axes = {anatomy.axis(field).field: size for field, size in shape.items() if field != anatomy.depth_field}
    # Groups before what is within them, the residual stream last: its size is judged with the heads beside it.
    for field in sorted(
        axes, key=lambda field: (anatomy.axis(field).scope == "model", len(anatomy.axis(field).within))
    ):
        target, full = axes[field], int(getattr(anatomy.config, field))
        wanted = full - part * (full - target)
        legal = [size for size in range(target, full + 1) if _is_legal(anatomy, {**sizes, field: size})]
        sizes[field] = min(legal or [target], key=lambda size: abs(size - wanted))
    return Shape(**sizes)


def _is_legal(anatomy: Anatomy, shape: Mapping[str, int]) -> bool:
    try:
        fit(anatomy, shape)
    except ShapeError:
        return False
    return True
