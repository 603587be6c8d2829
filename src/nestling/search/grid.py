"""Candidate shapes for a budget: all combinations of the sizes of a `Space`, or the best of an evolution.

A space that is small enough is gone through whole. A larger one is searched by `evolve` with what a shape is expected
to lose. Nothing is run here; `pick` scores candidates.
"""

from __future__ import annotations

from collections.abc import Callable

from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.errors import TargetError
from nestling.search.evolve import evolve
from nestling.search.space import Priced, Pricing, Space, distinct
from nestling.shape import Shape

# No axis is cut below this part of the parent's unless the budget cannot be met otherwise.
FLOORS = (0.5, 0.25, 0.0)

# A shape that leaves more than a tenth of its budget unused is left out if others use theirs.
USED = 0.9

Expected = Callable[[Shape], float]


def candidates(
    anatomy: Anatomy, budget: Budget, context: int = 4096, axes: tuple[str, ...] = (), pricing: Pricing | None = None
) -> list[Priced]:
    """Shapes that keep the budget, each with its cost, largest first.

    context: tokens at which the KV cache and FLOPs are counted. axes: config fields that may change, all unless given.
    pricing: instead of `context`, everything that costs depend on. Raises `TargetError` if no shape keeps the budget.
    """
    return shapes(reachable(pricing or Pricing(anatomy, context), budget, axes))


def reachable(pricing: Pricing, budget: Budget, axes: tuple[str, ...] = ()) -> Space:
    """The space of the highest floor at which some shape keeps the budget. Raises `TargetError` if there is none."""
    for floor in FLOORS:
        space = Space(pricing, budget, axes, floor)
        if space.reachable() and (not space.enumerable or any(map(space.largest, space.combinations()))):
            return space
    raise _unreachable(budget)


def shapes(space: Space, expected: Expected | None = None, seed: int = 0) -> list[Priced]:
    """All shapes of a space that use its budget, or of a large one those that evolution finds by what they should lose.

    expected: of a shape; without it a large space is sampled at random.
    """
    if space.enumerable:
        found = [priced for sizes in space.combinations() if (priced := space.largest(sizes))]
    else:
        found = evolve(space, expected or (lambda shape: 0.0), seed)
    if not found:
        raise _unreachable(space.budget)
    used = [priced for priced in found if space.budget.used_by(priced[1], space.parent) >= USED]
    return distinct(used or found, space.pricing)


def _unreachable(budget: Budget) -> TargetError:
    return TargetError(
        f"no shape of this model keeps {budget}: the smallest sizes are still above it, ask for a larger target"
    )
