"""`nestling prune`: a budget or a shape, and the model cut to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from nestling import hub, processes
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.errors import TargetError
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import check_folder
from nestling.recipes.settings import FORMER_TOKENS, ShapeSettings
from nestling.recipes.shapes import Ground, checked
from nestling.recipes.source import Source, in_batches
from nestling.report.human import count
from nestling.search import describe
from nestling.surgery import prune
from nestling.surgery.choose import check_ranking
from nestling.surgery.kernels import kernel_word
from nestling.surgery.merge import check_merge
from nestling.surgery.repair import Repair
from nestling.train import documented


@documented
@dataclass
class PruneSettings(ShapeSettings):
    """Settings of `prune`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits; the shape is searched for.
        shape: Take this shape instead (FIELD=NUMBER,... or a JSON file).
        ranking: A ranking that `nestling rank` wrote; made anew unless given.
        out: Folder to write the model to.
        merge: What becomes of pruned query heads: none, paper or average.
        repair: Refit the matrices that read pruned units by least squares on the calibration text.
        overwrite: Replace the output folder.
    """

    FORMER: ClassVar[dict[str, str]] = FORMER_TOKENS

    model: str
    to: str | None = None
    shape: str | None = None
    ranking: str | None = None
    out: str = "pruned"
    merge: str = "none"
    repair: bool = True
    overwrite: bool = False


def prune_model(settings: PruneSettings) -> dict[str, Any]:
    """Cut a model and save it; returns its shape and cost."""
    if (settings.to is None) == (settings.shape is None):
        raise TargetError("prune takes either --to or --shape: say --to 0.5x, or --shape intermediate_size=1152")
    check_folder(settings)
    check_merge(settings.merge)
    given = Ranking.load(settings.ranking) if settings.ranking else None
    source = Source.open(settings)
    if given is not None:
        check_ranking(Anatomy.of(source.model), given)
    target = checked(source.model, settings, settings.to, settings.shape)
    text = source.calibration(settings, settings.calibration_tokens)
    ranking = given or _ranking(source, text)
    repair = Repair(source.model, in_batches(text)) if settings.repair else None
    shape = Ground(source.model, settings, ranking, text, repair).candidates(target)[0].shape
    child = prune(source.model, ranking, shape, settings.merge, repair)
    processes.first(lambda: str(hub.save(child, settings.out, source.tokenizer, overwrite=settings.overwrite)))
    console.print(describe(shape))
    if word := kernel_word(Anatomy.of(source.model), shape):
        console.print(word)
    console.print(f"model: {settings.out} ({count(child.num_parameters())} parameters)")
    return {
        "model": settings.out,
        "shape": shape.to_dict(),
        "cost": cost(child, context=settings.cost_context, batch=settings.cost_batch).to_dict(),
    }


def _ranking(source: Source, text: Tensor) -> Ranking:
    with bar("ranking, tokens", text.numel()) as advance:
        return rank(source.model, in_batches(text), progress=advance)
