"""`nestling prune` and `nestling search`: a budget or a shape, and the model cut to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nestling import hub
from nestling.anatomy import Anatomy
from nestling.cost import Cost, cost
from nestling.errors import CheckpointError, TargetError
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import write_atomically
from nestling.recipes.source import Source, listed
from nestling.report.human import count, figure, quotient, ratio
from nestling.search import Budget, Candidate, candidates, describe, pick
from nestling.shape import Shape
from nestling.surgery import prune


@dataclass
class SearchSettings:
    """Settings of `search`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G.
        data: Calibration text: hub dataset, local file or folder, or builtin:stdlib.
        ranking: A ranking that `nestling rank` wrote; made anew unless given.
        out: File to write the best shape to.
        axes: Config fields that may be cut, with commas between; all of them unless given.
        finalists: Candidates that are really cut and scored.
        tokens: Calibration tokens.
        context: Tokens per row.
        cost_context: Tokens per sequence at which KV cache and FLOPs are counted.
        seed: The one seed of every random choice.
        dtype: Of the weights: auto, float32, bfloat16 or float16.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoint run code of its own.
    """

    model: str
    to: str = "0.75x"
    data: str = "builtin:stdlib"
    ranking: str | None = None
    out: str = "shape.json"
    axes: str | list[str] = ""
    finalists: int = 4
    tokens: int = 4096
    context: int = 256
    cost_context: int = 4096
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False


@dataclass
class PruneSettings:
    """Settings of `prune`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits; the shape is searched for.
        shape: Take this shape instead (FIELD=NUMBER,... or a JSON file).
        data: Calibration text: hub dataset, local file or folder, or builtin:stdlib.
        ranking: A ranking that `nestling rank` wrote; made anew unless given.
        out: Folder to write the model to.
        merge: What becomes of pruned query heads: none, paper or average.
        axes: Config fields that may be cut, with commas between; all of them unless given.
        finalists: Candidates that are really cut and scored.
        tokens: Calibration tokens.
        context: Tokens per row.
        cost_context: Tokens per sequence at which KV cache and FLOPs are counted.
        seed: The one seed of every random choice.
        dtype: Of the weights: auto, float32, bfloat16 or float16.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoint run code of its own.
        overwrite: Replace the output folder.
    """

    model: str
    to: str | None = None
    shape: str | None = None
    data: str = "builtin:stdlib"
    ranking: str | None = None
    out: str = "pruned"
    merge: str = "none"
    axes: str | list[str] = ""
    finalists: int = 4
    tokens: int = 8192
    context: int = 256
    cost_context: int = 4096
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


def search(settings: SearchSettings) -> dict[str, Any]:
    """Rank candidate shapes for a budget and write the best; returns them all."""
    source = Source.open(settings)
    found = candidates(
        Anatomy.of(source.model), Budget.parse(settings.to), settings.cost_context, tuple(listed(settings.axes))
    )
    tried = _tried(source, settings, found)
    console.print(_table(tried, cost(source.model, context=settings.cost_context)))
    write_atomically(Path(settings.out), tried[0].shape.save)
    console.print(f"best shape: {settings.out}")
    return {"shape": tried[0].shape.to_dict(), "candidates": [candidate.to_dict() for candidate in tried]}


def prune_model(settings: PruneSettings) -> dict[str, Any]:
    """Cut a model and save it; returns its shape and cost."""
    if (settings.to is None) == (settings.shape is None):
        raise TargetError("prune takes either --to or --shape: say --to 0.5x, or --shape intermediate_size=1152")
    if Path(settings.out).exists() and not settings.overwrite:
        raise CheckpointError(f"'{settings.out}' exists: name another folder with --out, or give --overwrite")
    source = Source.open(settings)
    if settings.shape is not None:
        shape = Shape.parse(settings.shape)
        found = [(shape, cost(source.model, shape, settings.cost_context))]
    else:
        budget = Budget.parse(settings.to or "")
        found = candidates(Anatomy.of(source.model), budget, settings.cost_context, tuple(listed(settings.axes)))
    ranking = _ranking(source, settings)
    shape = _tried(source, settings, found, ranking)[0].shape
    child = prune(source.model, ranking, shape, settings.merge)
    hub.save(child, settings.out, source.tokenizer, overwrite=settings.overwrite)
    console.print(f"{describe(shape)}\nmodel: {settings.out} ({count(child.num_parameters())} parameters)")
    return {
        "model": settings.out,
        "shape": shape.to_dict(),
        "cost": cost(child, context=settings.cost_context).to_dict(),
    }


def _ranking(source: Source, settings: SearchSettings | PruneSettings) -> Ranking:
    if settings.ranking is not None:
        return Ranking.load(settings.ranking)
    batches = source.batches(settings.data, settings.tokens, settings.context, seed=settings.seed)
    with bar("ranking, tokens", settings.tokens) as advance:
        return rank(source.model, batches, progress=advance)


def _tried(
    source: Source,
    settings: SearchSettings | PruneSettings,
    found: list[tuple[Shape, Cost]],
    ranking: Ranking | None = None,
) -> list[Candidate]:
    if len(found) == 1:
        return [Candidate(*found[0], expected=0.0)]
    ranking = ranking or _ranking(source, settings)
    few = source.batches(
        settings.data, max(settings.context, settings.tokens // 4), settings.context, seed=settings.seed
    )
    return pick(
        source.model, ranking, found, few, settings.finalists, progress=lambda text: console.print(f"    {text}")
    )


def _table(tried: list[Candidate], parent: Cost) -> Table:
    table = Table(title="candidates, best first", title_justify="left", box=None, pad_edge=False)
    table.add_column("loss", justify="right")
    table.add_column("params", justify="right")
    table.add_column("", justify="right")
    table.add_column("shape", overflow="fold")
    for candidate in tried:
        share = ratio(quotient(candidate.cost.params, parent.params))
        table.add_row(figure(candidate.loss), count(candidate.cost.params), share, describe(candidate.shape))
    return table
