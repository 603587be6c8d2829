"""From `--to` or `--shape` to the shape that is taken, the same way for `search`, `prune`, `compress` and `family`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.cost import Cost
from nestling.ranking import Ranking
from nestling.recipes.progress import bar, tries
from nestling.recipes.settings import ShapeSettings, listed
from nestling.recipes.source import in_batches
from nestling.search import Budget, Candidate, Pricing, Space, Trial, latency, pick, reachable
from nestling.search.parts import Work
from nestling.search.timing import PROBES
from nestling.shape import Shape
from nestling.surgery import choose, prune
from nestling.surgery.repair import Repair

# A budget or a shape that was found to be possible.
Target = Budget | Shape


def checked(model: PreTrainedModel, settings: ShapeSettings, to: str | None, shape: str | None = None) -> Target:
    """What `--to` or `--shape` says. Raises a `NestlingError` if it is not possible, before any long work.

    Blocks are timed for a limit of latency, once all others are known to be possible.
    """
    pricing = _pricing(model, settings, timed=False)
    if shape is not None:
        given = Shape.parse(shape)
        pricing.cost(given)
        return given
    budget, axes = Budget.parse(to or ""), tuple(listed(settings.axes))
    reachable(pricing, budget, axes)
    if budget.timed:
        reachable(_pricing(model, settings, timed=True), budget, axes)
    return budget


@dataclass
class Ground:
    """What shapes of one model are judged on.

    text: calibration text `[rows, context]`. repair: with which children are cut. losses: what was measured before, and
    where it is kept. trial: short training of the finalists.
    """

    model: PreTrainedModel
    settings: ShapeSettings
    ranking: Ranking
    text: Tensor
    repair: Repair | None = None
    losses: MutableMapping[str, float] | None = None
    trial: Trial | None = None

    def pricing(self, timed: bool) -> Pricing:
        """How shapes are priced; `timed` measures blocks on this machine, unless that was done before."""
        return _pricing(self.model, self.settings, timed, self.ranking)

    def candidates(self, target: Target) -> list[Candidate]:
        """Shapes for a budget, scored on a quarter of the calibration text and best first; a given one as it is."""
        settings, anatomy = self.settings, Anatomy.of(self.model)
        if isinstance(target, Shape):
            self._measure([target])
            return [Candidate(target, self.pricing(False).cost(target), expected=0.0)]
        space = reachable(self.pricing(target.timed), target, tuple(listed(settings.axes)))
        self._measure(_cuts(anatomy, space))
        return pick(
            self.model,
            self.ranking,
            space,
            in_batches(self.text[: -(-len(self.text) // 4)]),
            settings.finalists,
            build=lambda shape: prune(self.model, self.ranking, shape, repair=self.repair),
            progress=tries(),
            losses=self.losses,
            trial=self.trial,
            seed=settings.seed,
        )

    def _measure(self, cuts: Iterable[Shape]) -> None:
        """Let the repair measure what these cuts need in one pass, rather than one pass for each."""
        if self.repair is not None:
            anatomy = Anatomy.of(self.model)
            with bar("repair, tokens", self.text.numel()) as advance:
                self.repair.measure((choose(anatomy, self.ranking, shape) for shape in cuts), advance)


def _cuts(anatomy: Anatomy, space: Space) -> Iterator[Shape]:
    """Cuts that need all that any shape of the space needs: one of each depth, and one that is narrower."""
    pricing = Pricing(anatomy)
    for depth in space.options.get(anatomy.depth_field, ()):
        yield pricing.capped({anatomy.depth_field: depth})
    narrow = [(name, sizes[-1]) for name, sizes in space.options.items() if name != anatomy.depth_field]
    narrow += [(space.fill, space.fill_sizes[-1])] if space.fill else []
    for name, size in narrow[:1]:
        yield pricing.capped({name: size})


def parent_cost(model: PreTrainedModel, settings: ShapeSettings, timed: bool) -> Cost:
    """What a model costs whole, with its latency if that is asked for."""
    return _pricing(model, settings, timed).cost({}, check_config=False)


def _pricing(model: PreTrainedModel, settings: ShapeSettings, timed: bool, ranking: Ranking | None = None) -> Pricing:
    """How shapes of a model are priced, with their latency if that is asked for."""
    anatomy = Anatomy.of(model)
    table = measured(model, settings) if timed else None
    time = (lambda form: table.milliseconds(anatomy, form)) if table else None
    return Pricing(anatomy, settings.cost_context, settings.cost_batch, ranking, time)


def measured(model: PreTrainedModel, settings: ShapeSettings) -> latency.Table:
    """Times of this model's blocks on this machine, measured now or before."""
    work = Work(settings.cost_batch, settings.latency_context)
    anatomy = Anatomy.of(model)
    with bar("timing blocks, models", PROBES) as advance:
        return latency.table(anatomy, model.device, model.dtype, work, advance)
