"""`nestling rank`: score every axis of a model on calibration text and keep the ranking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from nestling.anatomy import Anatomy
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import check_place, write_atomically
from nestling.recipes.settings import CalibrationSettings, at_least, check_metrics
from nestling.recipes.source import Source, in_batches
from nestling.train import documented


@documented
@dataclass
class RankSettings(CalibrationSettings):
    """Settings of `rank`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        out: File to write the ranking to.
        tokens: Calibration tokens.
        batch_size: Rows per batch.
        metric: Importance of width units: contribution, relative or activation; what suits each axis unless given.
        over_batch: Aggregation over rows: mean, l2 or var; the metric's own unless given.
        over_sequence: Aggregation inside a row: mean, l2 or var; the metric's own unless given.
        layers: Importance of layers: block_influence, perplexity, kl or output_error.
        greedy_layers: Remove so many layers one after another, scoring anew each time.
    """

    model: str
    out: str = "ranking.safetensors"
    tokens: int = 8192
    batch_size: int = 8
    metric: str | None = None
    over_batch: str | None = None
    over_sequence: str | None = None
    layers: str = "block_influence"
    greedy_layers: int = 0


def rank_model(settings: RankSettings) -> dict[str, Any]:
    """Rank a model and write the ranking; returns where it is and what it covers."""
    at_least("batch_size", settings.batch_size, 1)
    check_metrics(settings.metric, settings.layers, settings.greedy_layers)
    check_place(Path(settings.out))
    source = Source.open(settings)
    rows = source.calibration(settings, settings.tokens)
    with bar("tokens", rows.numel()) as advance:
        ranking = rank(
            source.model,
            in_batches(rows, settings.batch_size),
            settings.metric,
            settings.over_batch,
            settings.over_sequence,
            settings.layers,
            settings.greedy_layers,
            advance,
        )
    write_atomically(Path(settings.out), ranking.save)
    console.print(_overview(Anatomy.of(source.model), ranking))
    console.print(f"ranking: {settings.out}")
    return {"ranking": settings.out, "axes": list(ranking.scores), **ranking.info}


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
