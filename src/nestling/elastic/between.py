"""A shape for a budget that no member was trained for: on the way from the next smaller member to the next larger.

Every size, of every layer, goes the same part of the way; the part is the one at which the budget is met, and single
units close what rounding leaves. So the shape lies between its neighbours on every axis where whole layers allow it,
and its units are ones that both of them, or the larger alone, learned with. (The released code of arXiv 2511.16664
interpolates the router's input instead, which promises neither.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestling.anatomy import Anatomy
from nestling.elastic.bill import Bill
from nestling.elastic.harden import fill
from nestling.elastic.space import Space
from nestling.elastic.target import Target
from nestling.errors import TargetError
from nestling.shape import Shape


def between(anatomy: Anatomy, order: Sequence[int], known: Sequence[Shape], budget: str, context: int = 4096) -> Shape:
    """The shape for a budget between those known; the parent's own is known too.

    order: layers, most important first. Raises `TargetError` below the smallest member, or for what is no budget.
    """
    per_layer = [field for field, axis in anatomy.axes.items() if axis.scope == "layer"]
    lists = {field for shape in known for field in per_layer if not isinstance(shape.get(field, 0), int)}
    space = Space(anatomy, order, sorted(lists), floor=-1)
    target = Target.of(budget, Bill(anatomy, context))
    shapes = sorted(
        [space.largest(), *(space.sizes_of(shape) for shape in known)], key=lambda sizes: target.of_sizes(space, sizes)
    )
    costs = [target.of_sizes(space, sizes) for sizes in shapes]
    if costs[0] > 1.01:
        raise TargetError(f"{budget} is below the smallest member: train the family for it")
    upper = next(i for i, value in enumerate(costs) if value >= 1 or i == len(costs) - 1)
    small, large = shapes[max(0, upper - 1)], shapes[upper]
    problem = TargetError(f"no shape between the members meets {budget}")
    for least in (_min(small, large), space.smallest()):  # fewer layers may ask for sizes below both neighbours'
        for chosen in _on_the_way(space, target, small, large):
            try:
                fill(space, target, chosen, at_most=_max(small, large), at_least=least)
                return space.shape(chosen)
            except TargetError as error:
                problem = error
    raise problem


def _on_the_way(
    space: Space, target: Target, small: dict[str, Tensor], large: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sizes the same part of the way on every axis: the last that keep the budget, and the first that do not."""

    def at(part: float) -> dict[str, Tensor]:
        return {name: (small[name] + part * (large[name] - small[name])).round().long() for name in small}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if target.of_sizes(space, at(middle)) <= 1 else (low, middle)
    return at(low), at(high)


def _max(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.maximum(one[name], other[name]) for name in one}


def _min(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.minimum(one[name], other[name]) for name in one}
