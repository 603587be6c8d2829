"""What a pruned query head leaves behind: Minitron's residual-information merge (arXiv 2407.14679, section 2.2).

With the heads of a KV group in order of rank 1..L and K of them kept, head i takes what is left of head 2K-i+1, for
i in [2K-L+1, K]: the weakest kept head pairs with the strongest pruned one and each pruned head is used once (the
printed range starts one too early). `paper`: h_i <- h_i + (h_i - h_j). `average`: h_i <- (h_i + h_j) / 2. Only the
query projections change; groups keep to themselves, since keys and values are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nestling.anatomy import Anatomy, Axis, TensorSpec
from nestling.errors import NestlingError, ShapeError
from nestling.ranking.ranking import Ranking
from nestling.surgery.choose import Selection

MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "paper": lambda kept, pruned: 2 * kept - pruned,
    "average": lambda kept, pruned: (kept + pruned) / 2,
}


def merge_heads(
    weights: Mapping[str, Tensor], anatomy: Anatomy, ranking: Ranking, selection: Selection, merge: str
) -> dict[str, Tensor]:
    """The query projections of the parent after merging, ready to be cut.

    Raises `NestlingError` for an unknown merge, `ShapeError` when fewer than half of a group's heads are kept.
    """
    check_merge(merge)
    result = {}
    for axis in anatomy.axes.values():
        if axis.merges and axis.field in ranking.scores:
            for spec in _producers(anatomy, axis, selection.form.layers):
                result[spec.name] = _merged(weights[spec.name], spec, axis, ranking, selection, MERGES[merge])
    return result


def check_merge(merge: str) -> None:
    """Raises `NestlingError` for a merge that does not exist."""
    if merge != "none" and merge not in MERGES:
        raise NestlingError(f"merge='{merge}' is not known: choose none, {' or '.join(MERGES)}")


def pairs(heads: list[int], kept: int) -> list[tuple[int, int]]:
    """(kept head, pruned head it takes up) for the heads of one group, best first. Raises `ShapeError` below half."""
    total = len(heads)
    if 2 * kept < total:
        raise ShapeError(
            f"keeping {kept} of {total} heads of a group leaves heads that none can merge: keep at least half"
        )
    return [(heads[i - 1], heads[2 * kept - i]) for i in range(2 * kept - total + 1, kept + 1)]


def _producers(anatomy: Anatomy, axis: Axis, layers: tuple[int, ...]) -> Iterator[TensorSpec]:
    """Matrices whose rows make the axis's units, and their biases."""
    rows = [spec for spec in anatomy.tensors.values() if spec.layer in layers and axis.letter in spec.layout[0].letters]
    makers = {spec.module for spec in rows if len(spec.layout) > 1}
    return (spec for spec in rows if spec.module in makers)


def _merged(
    tensor: Tensor,
    spec: TensorSpec,
    axis: Axis,
    ranking: Ranking,
    selection: Selection,
    rule: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    anatomy, layer = selection.anatomy, spec.layer
    assert layer is not None
    choice = selection.choices[selection.form.layers.index(layer)][axis.letter]
    order = ranking.order(axis.field, anatomy.home(axis, layer)).tolist()
    size = anatomy.sizes(layer)[axis.letter]
    owner = spec.layout[0].owner((*axis.within, axis.letter), anatomy.sizes(layer)).to(tensor.device)
    merged = tensor.clone()
    for group in range(anatomy.units(axis, layer) // size):
        heads = [unit for unit in order if unit // size == group]
        for kept, pruned in pairs(heads, choice.count):
            rows, partner = (torch.nonzero(owner == unit).flatten() for unit in (kept, pruned))
            merged[rows] = rule(tensor[rows], tensor[partner])
    return merged
