"""`nestling rank`: score every axis of a model on calibration text and keep the ranking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table
from transformers import PreTrainedModel

from nestling import evaluate
from nestling.anatomy import Anatomy
from nestling.errors import NestlingError
from nestling.evaluate.pairs import read_pairs
from nestling.ranking import Ranking, rank
from nestling.ranking.rank import check_greedy
from nestling.recipes.progress import bar, console
from nestling.recipes.run import check_place
from nestling.recipes.settings import FORMER_TOKENS, CalibrationSettings, at_least, check_metrics
from nestling.recipes.source import Source, in_batches
from nestling.runs import write_atomically
from nestling.shape import Shape
from nestling.surgery.iterate import rank_iteratively
from nestling.train import documented


@documented
@dataclass
class RankSettings(CalibrationSettings):
    """Settings of `rank`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        out: File to write the ranking to.
        batch_size: Rows per batch; up to eight unless given.
        metric: Importance of width units: contribution, relative or activation; what suits each axis unless given.
        over_batch: Aggregation over rows: mean, l2 or var; the metric's own unless given.
        over_sequence: Aggregation inside a row: mean, l2 or var; the metric's own unless given.
        layers: Importance of layers: block_influence, perplexity, kl or output_error.
        greedy_layers: Remove so many layers one after another, scoring anew each time.
        layer_block: Rank layers so that the least missed block of so many neighbours goes first; the last layer stays.
        layer_task: Score layers by accuracy instead: a file or folder of minimal pairs, or tasks of lm-eval.
        rounds: Score width units so many times, each time on what would be left on the way to `to_shape`.
        to_shape: Shape that the rounds lead to: FIELD=NUMBER,... or a JSON file.
    """

    FORMER: ClassVar[dict[str, str]] = FORMER_TOKENS

    model: str
    out: str = "ranking.safetensors"
    batch_size: int | None = None
    metric: str | None = None
    over_batch: str | None = None
    over_sequence: str | None = None
    layers: str = "block_influence"
    greedy_layers: int = 0
    layer_block: int = 0
    layer_task: str | None = None
    rounds: int = 1
    to_shape: str | None = None


def rank_model(settings: RankSettings) -> dict[str, Any]:
    """Rank a model and write the ranking; returns where it is and what it covers."""
    at_least("batch_size", 1 if settings.batch_size is None else settings.batch_size, 1)
    for name, least in (("greedy_layers", 0), ("layer_block", 0), ("rounds", 1)):
        at_least(name, getattr(settings, name), least)
    check_metrics(settings.metric, settings.layers, 0 if settings.layer_task else settings.greedy_layers)
    if settings.layer_block and settings.greedy_layers:
        raise NestlingError("layer_block and greedy_layers are two ways to rank layers: give one of them")
    check_place(Path(settings.out))
    if settings.rounds > 1 and settings.to_shape is None:
        raise NestlingError("rounds lead to a shape: say which with --to_shape intermediate_size=1024")
    target = Shape.parse(settings.to_shape) if settings.to_shape else None
    source = Source.open(settings)
    check_greedy(settings.greedy_layers, Anatomy.of(source.model).num_layers)
    rows = source.calibration(settings, settings.calibration_tokens)
    with bar("tokens", rows.numel() * settings.rounds) as advance:
        how = {
            "metric": settings.metric,
            "over_batch": settings.over_batch,
            "over_sequence": settings.over_sequence,
            "layers": settings.layers,
            "greedy_layers": settings.greedy_layers,
            "layer_block": settings.layer_block,
            "task": _task(settings, source),
            "progress": advance,
        }
        batches = in_batches(rows, settings.batch_size)
        if target is not None:
            ranking = rank_iteratively(source.model, batches, target, settings.rounds, **how)
        else:
            ranking = rank(source.model, batches, **how)  # type: ignore[arg-type]
    write_atomically(Path(settings.out), ranking.save)
    console.print(_overview(Anatomy.of(source.model), ranking))
    console.print(f"ranking: {settings.out}")
    return {"ranking": settings.out, "axes": list(ranking.scores), **ranking.info}


def _task(settings: RankSettings, source: Source) -> Callable[[PreTrainedModel], float] | None:
    """Accuracy on what `layer_task` names: minimal pairs if it is a path, else the mean over tasks of lm-eval."""
    what = settings.layer_task
    if what is None:
        return None
    if Path(what).exists() or what.endswith(".jsonl"):
        read_pairs(what)
        return lambda model: evaluate.minimal_pairs(model, source.tokenizer, what).accuracy

    def accuracy(model: PreTrainedModel) -> float:
        found = evaluate.harness(model, source.tokenizer, what)
        return sum(values["acc,none"] for values in found.values()) / len(found)

    return accuracy


def _overview(anatomy: Anatomy, ranking: Ranking) -> Table:
    """Most and least important units of every axis, in the first layer where it has layers."""
    table = Table(title="ranking", title_justify="left", box=None, pad_edge=False)
    for column in ("axis", "most important", "least important"):
        table.add_column(column)
    for field in ranking.scores:
        order = ranking.order(field).tolist()
        where = "" if field == anatomy.depth_field or anatomy.axis(field).scope == "model" else " (layer 0)"
        table.add_row(field + where, " ".join(map(str, order[:4])), " ".join(map(str, order[-4:])))
    return table
