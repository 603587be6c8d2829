"""`nestling prune` and `nestling search`: a budget or a shape, and the model cut to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from nestling import hub
from nestling.cost import Cost, cost
from nestling.errors import CheckpointError, TargetError
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import write_atomically
from nestling.recipes.settings import ShapeSettings
from nestling.recipes.shapes import feasible, tried
from nestling.recipes.source import Source, in_batches
from nestling.report.human import count, figure, quotient, ratio
from nestling.search import Candidate, describe
from nestling.surgery import prune
from nestling.surgery.repair import Repair
from nestling.train import documented


@documented
@dataclass
class SearchSettings(ShapeSettings):
    """Settings of `search`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G.
        ranking: A ranking that `nestling rank` wrote; made anew unless given.
        out: File to write the best shape to.
        repair: Score shapes as `prune` makes them with --repair.
        tokens: Calibration tokens.
    """

    model: str
    to: str = "0.75x"
    ranking: str | None = None
    out: str = "shape.json"
    repair: bool = True
    tokens: int = 4096


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
        tokens: Calibration tokens.
        overwrite: Replace the output folder.
    """

    model: str
    to: str | None = None
    shape: str | None = None
    ranking: str | None = None
    out: str = "pruned"
    merge: str = "none"
    repair: bool = True
    tokens: int = 8192
    overwrite: bool = False


def search(settings: SearchSettings) -> dict[str, Any]:
    """Rank candidate shapes for a budget and write the best; returns them all."""
    source = Source.open(settings)
    found = feasible(source.model, settings, settings.to)
    text = source.calibration(settings, settings.tokens)
    repair = Repair(source.model, in_batches(text)) if settings.repair else None
    scored = tried(source.model, settings, found, _ranking(source, settings, text), text, repair)
    console.print(_table(scored, cost(source.model, context=settings.cost_context)))
    write_atomically(Path(settings.out), scored[0].shape.save)
    console.print(f"best shape: {settings.out}")
    return {"shape": scored[0].shape.to_dict(), "candidates": [candidate.to_dict() for candidate in scored]}


def prune_model(settings: PruneSettings) -> dict[str, Any]:
    """Cut a model and save it; returns its shape and cost."""
    if (settings.to is None) == (settings.shape is None):
        raise TargetError("prune takes either --to or --shape: say --to 0.5x, or --shape intermediate_size=1152")
    if Path(settings.out).exists() and not settings.overwrite:
        raise CheckpointError(f"'{settings.out}' exists: name another folder with --out, or give --overwrite")
    source = Source.open(settings)
    found = feasible(source.model, settings, settings.to, settings.shape)
    text = source.calibration(settings, settings.tokens)
    ranking = _ranking(source, settings, text)
    repair = Repair(source.model, in_batches(text)) if settings.repair else None
    shape = tried(source.model, settings, found, ranking, text, repair)[0].shape
    child = prune(source.model, ranking, shape, settings.merge, repair)
    hub.save(child, settings.out, source.tokenizer, overwrite=settings.overwrite)
    console.print(f"{describe(shape)}\nmodel: {settings.out} ({count(child.num_parameters())} parameters)")
    return {
        "model": settings.out,
        "shape": shape.to_dict(),
        "cost": cost(child, context=settings.cost_context).to_dict(),
    }


def _ranking(source: Source, settings: SearchSettings | PruneSettings, text: Tensor) -> Ranking:
    if settings.ranking is not None:
        return Ranking.load(settings.ranking)
    with bar("ranking, tokens", text.numel()) as advance:
        return rank(source.model, in_batches(text), progress=advance)


def _table(scored: list[Candidate], parent: Cost) -> Table:
    table = Table(title="candidates, best first", title_justify="left", box=None, pad_edge=False)
    table.add_column("loss", justify="right")
    table.add_column("params", justify="right")
    table.add_column("", justify="right")
    table.add_column("shape", overflow="fold")
    for candidate in scored:
        share = ratio(quotient(candidate.cost.params, parent.params))
        table.add_row(figure(candidate.loss), count(candidate.cost.params), share, describe(candidate.shape))
    return table
