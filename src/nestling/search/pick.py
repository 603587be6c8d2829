"""Choosing a shape: the candidates that promise most are cut and scored on calibration text, the best one wins.

What an axis loses on its own is measured at a few sizes; the losses of several axes are taken to add up, which is
enough to leave hopeless candidates out (it is a filter, not a verdict). The few that remain are really cut and their
loss is measured; a `Trial` then trains them briefly. Paper: Minitron, arXiv 2407.14679, section 2.3.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace

from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.ranking import Ranking
from nestling.search.candidate import Batch, Candidate, Losses, Say, best_first, describe, token_loss
from nestling.search.grid import shapes
from nestling.search.halving import Trial, halve
from nestling.search.space import Priced, Pricing, Space, allowed, full_size, nominal
from nestling.shape import Shape
from nestling.surgery import prune

HOPELESS = 1e6  # nats: what a cut is taken to lose whose loss is no number


def pick(
    model: PreTrainedModel,
    ranking: Ranking,
    among: Space | list[Priced],
    batches: Iterable[Batch],
    finalists: int = 6,
    build: Callable[[Shape], PreTrainedModel] | None = None,
    progress: Say | None = None,
    losses: MutableMapping[str, float] | None = None,
    trial: Trial | None = None,
    seed: int = 0,
) -> list[Candidate]:
    """Candidates with their losses, best first; only the `finalists` that promise most are tried.

    among: a space, or shapes with their costs. batches: calibration text. build: makes the model of a shape, `prune`
    unless given. progress: told what is tried, and how many are left with it at most. losses: what was measured before,
    which is not measured again, and where each loss goes as soon as it is known. trial: trains the finalists briefly,
    the worse half dropping out each round. seed: of the evolution through a space too large to go through.
    Raises `TargetError` if no shape keeps the budget, `NestlingError` if none has a finite loss.
    """
    say = progress or (lambda what, left: None)
    measured = Losses(token_loss(batches), build or (lambda shape: prune(model, ranking, shape)), losses, say)
    anatomy = Anatomy.of(model)
    found = shapes(among) if isinstance(among, Space) and among.enumerable else among
    alone = _alone(anatomy, _sizes(found))
    measured.plan((describe(shape) for shape in (Shape(), *_cuts_of(alone))), more=finalists)
    whole = measured.of(Shape(), lambda: model)
    curves = _sensitivity(anatomy, whole, alone, measured)

    def expected(shape: Shape) -> float:
        return sum(_interpolate(curves[field], nominal(size)) for field, size in shape.items())

    priced = shapes(found, expected, seed) if isinstance(found, Space) else found
    promising = sorted((Candidate(shape, cost, expected(shape)) for shape, cost in priced), key=lambda c: c.expected)
    measured.plan(describe(one.shape) for one in promising[:finalists])
    tried = best_first(replace(one, loss=measured.of(one.shape)) for one in promising[:finalists])
    return halve(tried, trial, measured) if trial and len(tried) > 1 else tried


Curve = list[tuple[int, float]]


def _sizes(among: Space | list[Priced]) -> dict[str, list[int]]:
    """The sizes in use of every field that is cut, rising."""
    if isinstance(among, Space):
        used = among.options | ({among.fill: among.fill_sizes} if among.fill else {})
        return {field: sorted(sizes) for field, sizes in sorted(used.items())}
    cut = sorted({field for shape, _ in among for field in shape})
    return {field: sorted({nominal(shape[field]) for shape, _ in among if field in shape}) for field in cut}


def _alone(anatomy: Anatomy, sizes: Mapping[str, list[int]]) -> dict[str, dict[int, Shape]]:
    """For each axis its cuts alone, to the smallest size in use and halfway there, by rising size."""
    pricing = Pricing(anatomy)
    found = {}
    for field, used in sizes.items():
        full = full_size(anatomy, field)
        cuts = {size: pricing.capped({field: size}) for size in used if size < full}
        cuts = {size: shape for size, shape in cuts.items() if allowed(pricing, shape)}
        points = sorted(cuts)
        found[field] = {size: cuts[size] for size in sorted({points[0], points[len(points) // 2]})} if cuts else {}
    return found


def _cuts_of(alone: Mapping[str, Mapping[int, Shape]]) -> Iterator[Shape]:
    return (shape for cuts in alone.values() for shape in cuts.values())


def _sensitivity(
    anatomy: Anatomy, whole: float, alone: Mapping[str, Mapping[int, Shape]], measured: Losses
) -> dict[str, Curve]:
    """For each axis the loss that its cuts alone add: points by rising size, the last one of nothing cut."""
    return {
        field: [
            *((size, _added(measured.of(shape), whole)) for size, shape in cuts.items()),
            (full_size(anatomy, field), 0.0),
        ]
        for field, cuts in alone.items()
    }


def _added(loss: float, whole: float) -> float:
    return max(0.0, loss - whole) if math.isfinite(loss) else HOPELESS


def _interpolate(curve: Curve, size: int) -> float:
    sizes = [point for point, _ in curve]
    right = min(len(curve) - 1, max(1, bisect.bisect_left(sizes, size)))
    if len(curve) == 1:
        return curve[0][1]
    (a, low), (b, high) = curve[right - 1], curve[right]
    return low + (high - low) * (size - a) / (b - a)
