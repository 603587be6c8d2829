"""From `--to` or `--shape` to the shape that is taken, the same way for `search`, `prune` and `compress`."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.cost import Cost, cost
from nestling.ranking import Ranking
from nestling.recipes.progress import console
from nestling.recipes.settings import ShapeSettings, listed
from nestling.recipes.source import in_batches
from nestling.search import Budget, Candidate, candidates, pick
from nestling.shape import Shape
from nestling.surgery import choose, prune
from nestling.surgery.repair import Repair

Priced = list[tuple[Shape, Cost]]


def feasible(model: PreTrainedModel, settings: ShapeSettings, to: str | None, shape: str | None = None) -> Priced:
    """Shapes to choose from, each with its cost: the one that was given, or all that keep the budget."""
    if shape:
        given = Shape.parse(shape)
        return [(given, cost(model, given, settings.cost_context))]
    return candidates(Anatomy.of(model), Budget.parse(to or ""), settings.cost_context, tuple(listed(settings.axes)))


def tried(
    model: PreTrainedModel,
    settings: ShapeSettings,
    found: Priced,
    ranking: Ranking,
    text: Tensor,
    repair: Repair | None = None,
) -> list[Candidate]:
    """The shapes scored on a quarter of the calibration text `[rows, context]`, best first, cut as `prune` would.

    A single one is taken as it is.
    """
    if len(found) == 1:
        return [Candidate(*found[0], expected=0.0)]
    if repair is not None:
        anatomy = Anatomy.of(model)
        depths = {depth for shape, _ in found if (depth := shape.get(anatomy.depth_field)) is not None}
        repair.measure(choose(anatomy, ranking, {anatomy.depth_field: depth}) for depth in sorted(depths))
    return pick(
        model,
        ranking,
        found,
        in_batches(text[: -(-len(text) // 4)]),
        settings.finalists,
        build=lambda shape: prune(model, ranking, shape, repair=repair),
        progress=lambda what: console.print(f"    {what}"),
    )
