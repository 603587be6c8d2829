"""Candidate shapes for a budget: every size on a grid that hardware likes, the FFN filling what the others leave.

For each combination of the other axes the largest `fill` size that keeps all limits is taken, so every candidate uses
its budget. Nothing is run here; `pick` scores candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from nestling.anatomy import Anatomy, Axis
from nestling.budget import LATENCY, Budget
from nestling.cost import Cost, cost_of_form
from nestling.errors import ShapeError, TargetError
from nestling.shape import Shape, fit

# No axis is cut below this part of the parent's unless the budget cannot be met otherwise.
FLOORS = (0.5, 0.25, 0.0)


def candidates(
    anatomy: Anatomy, budget: Budget, context: int = 4096, axes: tuple[str, ...] = ()
) -> list[tuple[Shape, Cost]]:
    """Shapes that keep the budget, each with its cost, largest first.

    context: tokens at which the KV cache and FLOPs are counted. axes: config fields that may change, all unless given.
    Raises `TargetError` if no shape keeps the budget.
    """
    parent = cost_of_form(anatomy, fit(anatomy, {}), context)
    budget.check(parent)
    if LATENCY in budget.limits:
        raise TargetError("latency limits cannot be searched for: limit flops_per_token, params or kv_bytes instead")
    free = axes or anatomy.fields
    for field in axes:
        if field != anatomy.depth_field:
            anatomy.axis(field)
    for floor in FLOORS:
        found = list(_filled(anatomy, budget, parent, context, free, floor))
        if found:
            distinct = {str(fit(anatomy, shape, check_config=False).values): (shape, cost) for shape, cost in found}
            return sorted(distinct.values(), key=lambda item: -item[1].params)
    raise TargetError(
        f"no shape of this model keeps {budget}: the smallest sizes are still above it, ask for a larger target"
    )


def grid(anatomy: Anatomy, axis: Axis, floor: float) -> list[int]:
    """Sizes of an axis from the parent's down to `floor` times it.

    Multiples of the largest power of two that leaves a choice; every size for heads and groups.
    """
    full = max(anatomy.value(axis, layer) for layer in range(anatomy.num_layers))
    lowest = max(1, round(full * floor))
    if axis.field not in _fillers(anatomy) and axis.scope == "layer":
        return [size for size in range(full, lowest - 1, -1) if _allowed(anatomy, {axis.field: size})]
    for step in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        sizes = [size for size in range(full - full % step, lowest - 1, -step) if size > 0]
        sizes = [size for size in sizes if size == full or _allowed(anatomy, {axis.field: size})]
        if len([size for size in sizes if size >= full / 2]) >= (9 if axis.scope == "layer" else 5) or step == 1:
            return sizes if full in sizes else [full, *sizes]
    return [full]


def _fillers(anatomy: Anatomy) -> list[str]:
    """Axes of one layer without groups and without query heads inside them, widest first: FFN neurons."""
    outer = {letter for axis in anatomy.axes.values() for letter in axis.within}
    lone = [
        axis for axis in anatomy.axes.values() if axis.scope == "layer" and not axis.within and axis.letter not in outer
    ]
    return [axis.field for axis in sorted(lone, key=lambda axis: -anatomy.value(axis, 0))]


def _allowed(anatomy: Anatomy, shape: Mapping[str, int]) -> bool:
    try:
        fit(anatomy, shape)
    except ShapeError:
        return False
    return True


def _filled(
    anatomy: Anatomy, budget: Budget, parent: Cost, context: int, free: tuple[str, ...], floor: float
) -> Iterator[tuple[Shape, Cost]]:
    fill = next((field for field in _fillers(anatomy) if field in free), None)
    options: dict[str, list[int]] = {
        field: grid(anatomy, anatomy.axes[field], floor) for field in anatomy.axes if field in free and field != fill
    }
    if anatomy.depth_field in free:
        lowest = max(1, round(anatomy.num_layers * max(floor, 0.1)))
        options[anatomy.depth_field] = list(range(anatomy.num_layers, lowest - 1, -1))
    sizes = grid(anatomy, anatomy.axes[fill], floor / 2) if fill else []
    if not _reachable(anatomy, budget, parent, context, options | ({fill: sizes} if fill else {})):
        return
    for values in itertools.product(*options.values()):
        rest = {name: value for name, value in zip(options, values, strict=True) if value != _full(anatomy, name)}
        found = _largest(anatomy, budget, parent, context, rest, fill, sizes)
        if found is not None:
            yield found


def _reachable(anatomy: Anatomy, budget: Budget, parent: Cost, context: int, options: Mapping[str, list[int]]) -> bool:
    """Whether the smallest size of everything keeps the budget; if not, no combination does."""
    smallest = {name: min(values) for name, values in options.items()}
    try:
        form = fit(anatomy, smallest, check_config=False)
    except ShapeError:  # the smallest sizes do not go together: look at each combination
        return True
    return budget.met_by(cost_of_form(anatomy, form, context), parent)


def _full(anatomy: Anatomy, field: str) -> int:
    return anatomy.num_layers if field == anatomy.depth_field else anatomy.value(anatomy.axes[field], 0)


def _largest(
    anatomy: Anatomy,
    budget: Budget,
    parent: Cost,
    context: int,
    rest: dict[str, int],
    fill: str | None,
    sizes: list[int],
) -> tuple[Shape, Cost] | None:
    """The shape with the largest filling size that keeps the budget; None if none does or the rest is not allowed."""
    if not _allowed(anatomy, rest):
        return None

    def at(index: int) -> tuple[Shape, Cost]:
        shape = Shape(**rest) if fill is None else Shape(**rest, **{fill: sizes[index]})
        return shape, cost_of_form(anatomy, fit(anatomy, shape, check_config=False), context)

    low, high = 0, max(0, len(sizes) - 1)
    if not budget.met_by(at(high)[1], parent):
        return None
    while low < high:  # sizes fall with the index: find the first that fits
        middle = (low + high) // 2
        low, high = (low, middle) if budget.met_by(at(middle)[1], parent) else (middle + 1, high)
    return at(low)
