"""Units that are made of units: Mamba heads scored by the channels of theirs that stay.

Minitron-SSM, arXiv 2504.11409, section 3.1, with s `[heads, channels]` the scores of the channels head by head:

    D_top = the k channels with the largest || s[:, d] ||_2          f_h = || s[h, D_top] ||_2

The paper gives all heads one order of channels. Channels never mix before the output, so each head may as well have its
own (`shared=False`), which keeps more. Heads are then ranked inside their groups, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nestling.anatomy import Anatomy, Axis
from nestling.errors import NestlingError
from nestling.ranking.ranking import Ranking

OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda scores: torch.linalg.vector_norm(scores, dim=-1),
    "sum": lambda scores: scores.sum(-1),
}


def nested(
    anatomy: Anatomy, ranking: Ranking, keep: int | None = None, shared: bool = True, over: str = "l2"
) -> Ranking:
    """The ranking with every axis of compound units (heads) scored by its inner units (channels) that stay.

    keep: inner units that stay in each; all unless given, which suits a ranking for many budgets. shared: one order of
    inner units for all outer ones, as in the paper; otherwise the scores are left as they are, an order for each.
    over: how inner scores become one, `l2`, or `sum` for scores that are squares (FLAP).
    Raises `NestlingError` for a model without such axes, or a ranking that does not score them.
    """
    if over not in OVER:
        raise NestlingError(f"over='{over}' is not known: choose {' or '.join(OVER)}")
    pairs = list(_pairs(anatomy))
    if not pairs:
        raise NestlingError(f"a {anatomy.architecture.model_type} model has no units that are made of ranked units")
    scores: dict[str, Any] = dict(ranking.scores)
    for outer, inner in pairs:
        if inner.field not in scores:
            raise NestlingError(f"the ranking does not score {inner.field}, by which {outer.field} is to be scored")
        layers = [
            _nested(values, anatomy.sizes(layer)[inner.letter], keep, shared, OVER[over])
            for layer, values in enumerate(scores[inner.field])
        ]
        scores[outer.field] = tuple(outer_scores for outer_scores, _ in layers)
        scores[inner.field] = tuple(inner_scores for _, inner_scores in layers)
    return replace(ranking, scores=scores, info=dict(ranking.info) | {"nested": keep or True, "shared": shared})


def _nested(
    values: Tensor, size: int, keep: int | None, shared: bool, over: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Scores of the outer and inner units of one layer; both empty where it has none."""
    if not len(values):
        return values, values
    by_outer = values.view(-1, size)
    order = by_outer.expand_as(by_outer)
    if shared:
        order = over(by_outer.T).expand_as(by_outer)
    kept = order.argsort(dim=-1, descending=True, stable=True)[:, : keep or size]
    return over(by_outer.gather(-1, kept)), order.reshape(-1)


def _pairs(anatomy: Anatomy) -> Iterator[tuple[Axis, Axis]]:
    """Axes whose units are made of another axis's: (heads, channels)."""
    for inner in anatomy.axes.values():
        for outer in anatomy.axes.values():
            if inner.within == (*outer.within, outer.letter) and not inner.counts_all:
                yield outer, inner
