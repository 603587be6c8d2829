"""Choosing a shape: the candidates that promise most are cut and scored on calibration text, the best one wins.

What an axis loses on its own is measured at a few sizes; the losses of several axes are taken to add up, which is
enough to leave hopeless candidates out (it is a filter, not a verdict). The few that remain are really cut and their
loss is measured; a `Trial` then trains them briefly. Paper: Minitron, arXiv 2407.14679, section 2.3.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace

from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.ranking import Ranking
from nestling.search.candidate import Batch, Candidate, Losses, best_first, token_loss
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
    progress: Callable[[str], None] | None = None,
    losses: MutableMapping[str, float] | None = None,
    trial: Trial | None = None,
    seed: int = 0,
) -> list[Candidate]:
    """Candidates with their losses, best first; only the `finalists` that promise most are tried.

    among: a space, or shapes with their costs. batches: calibration text. build: makes the model of a shape, `prune`
    unless given. progress: told what is tried. losses: what was measured before, which is not measured again, and where
    each loss goes as soon as it is known. trial: trains the finalists briefly, the worse half dropping out each round.
    seed: of the evolution through a space too large to go through.
    Raises `TargetError` if no shape keeps the budget, `NestlingError` if none has a finite loss.
    """
    say = progress or (lambda text: None)
    measured = Losses(token_loss(batches), build or (lambda shape: prune(model, ranking, shape)), losses, say)
    anatomy, whole = Anatomy.of(model), measured.of(Shape(), lambda: model)
    found = shapes(among) if isinstance(among, Space) and among.enumerable else among
    curves = _sensitivity(anatomy, whole, _sizes(found), measured)

    def expected(shape: Shape) -> float:
        return sum(_interpolate(curves[field], nominal(size)) for field, size in shape.items())

    priced = shapes(found, expected, seed) if isinstance(found, Space) else found
    promising = sorted((Candidate(shape, cost, expected(shape)) for shape, cost in priced), key=lambda c: c.expected)
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


def _sensitivity(anatomy: Anatomy, whole: float, sizes: Mapping[str, list[int]], measured: Losses) -> dict[str, Curve]:
    """For each axis the loss it adds alone, at the smallest size in use and halfway there: points by rising size."""
    curves = {}
    pricing = Pricing(anatomy)
    for field, used in sizes.items():
        full = full_size(anatomy, field)
        alone = [size for size in used if size < full and allowed(pricing, pricing.capped({field: size}))]
        points = sorted({alone[0], alone[len(alone) // 2]}) if alone else []
        curve = [(size, _added(measured.of(pricing.capped({field: size})), whole)) for size in points]
        curves[field] = [*curve, (full, 0.0)]
    return curves


def _added(loss: float, whole: float) -> float:
    return max(0.0, loss - whole) if math.isfinite(loss) else HOPELESS


def _interpolate(curve: Curve, size: int) -> float:
    sizes = [point for point, _ in curve]
    right = min(len(curve) - 1, max(1, bisect.bisect_left(sizes, size)))
    if len(curve) == 1:
        return curve[0][1]
    (a, low), (b, high) = curve[right - 1], curve[right]
    return low + (high - low) * (size - a) / (b - a)
