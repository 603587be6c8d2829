"""From `--to` or `--shape` to the shape that is taken, the same way for `search`, `prune` and `compress`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.cost import Cost, cost
from nestling.ranking import Ranking
from nestling.recipes.progress import bar, console
from nestling.recipes.settings import ShapeSettings, listed
from nestling.recipes.source import in_batches
from nestling.search import Budget, Candidate, candidates, pick
from nestling.shape import Shape
from nestling.surgery import Selection, choose, prune
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
    if repair is not None:
        with bar("what the rest can take over, tokens", text.numel()) as advance:
            repair.measure(_cuts(Anatomy.of(model), ranking, found), advance)
    if len(found) == 1:
        return [Candidate(*found[0], expected=0.0)]
    return pick(
        model,
        ranking,
        found,
        in_batches(text[: -(-len(text) // 4)]),
        settings.finalists,
        build=lambda shape: prune(model, ranking, shape, repair=repair),
        progress=lambda what: console.print(f"    {what}"),
    )


def _cuts(anatomy: Anatomy, ranking: Ranking, found: Priced) -> Iterator[Selection]:
    """Cuts that need all that any of the shapes needs: one of each depth, and one that is narrower than the parent."""
    depth = anatomy.depth_field
    for layers in sorted({shape[depth] for shape, _ in found if depth in shape}):
        yield choose(anatomy, ranking, {depth: layers})
    narrow = next((shape for shape, _ in found if shape.keys() - {depth}), None)
    if narrow is not None:
        yield choose(anatomy, ranking, {field: size for field, size in narrow.items() if field != depth})
