"""`nestling search`: candidate shapes for a budget, ranked, in one resumable folder with a shape file and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.table import Table

from nestling import processes
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.distill import DistillSettings
from nestling.ranking import Ranking
from nestling.recipes.child import Origin, Parent
from nestling.recipes.progress import Stages, console
from nestling.recipes.run import KeptFigures, Run, check_place
from nestling.recipes.settings import FORMER_TOKENS, ShapeSettings
from nestling.recipes.shapes import checked
from nestling.recipes.summary import heading
from nestling.report import write_report
from nestling.report.human import count, figure, quotient, ratio, size
from nestling.runs import write_atomically
from nestling.search import Candidate, Pricing, describe
from nestling.shape import Shape
from nestling.train import documented


@documented
@dataclass
class SearchSettings(ShapeSettings):
    """Settings of `search`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G,latency=0.7x.
        ranking: A ranking that `nestling rank` wrote; made anew unless given.
        out: Folder for the search; the best shape is shape.json in it. A name that ends in .json is the shape's file,
            and the folder is called so without the ending.
        repair: Score shapes as `prune` makes them with --repair.
        distill: Settings of the short distillation, if --trial_tokens asks for it.
        overwrite: Start anew even if the folder holds a search.
    """

    FORMER: ClassVar[dict[str, str]] = FORMER_TOKENS

    model: str
    to: str = "0.75x"
    ranking: str | None = None
    out: str = "runs/search"
    repair: bool = True
    calibration_tokens: int = field(default=4096, kw_only=True)
    distill: DistillSettings = field(default_factory=DistillSettings)
    overwrite: bool = False


def search(settings: SearchSettings) -> dict[str, Any]:
    """Rank candidate shapes for a budget, or go on with it; writes the best shape and returns them all."""
    parent = Parent(settings, settings.calibration_tokens)
    target = checked(parent.model, settings, settings.to)
    given = Ranking.load(settings.ranking) if settings.ranking else None
    file = Path(settings.out)
    folder = file.with_suffix("") if file.suffix == ".json" else file
    check_place(folder / "shape.json")
    run = parent.run = Run("search", settings, folder, settings.overwrite)
    origin, stages = Origin(parent, parent.model, run, given), Stages(2)
    with stages("rank every axis on calibration text" if given is None else "take the given ranking"):
        origin.ranking  # noqa: B018  made now, used by the search
    with stages(f"search a shape for {target}"):
        found = origin.search(target)
    summary = run.values("summary.json", lambda: _summary(parent, origin, settings, found))
    shape = file if file.suffix == ".json" else run.path("shape.json")
    write_atomically(shape, found[0].shape.save)
    report = processes.first(lambda: str(write_report(run.folder)))
    console.print(_table(found, summary["parent"]["cost"]["params"]))
    console.print(f"best shape: {shape}\nreport: {report}")
    return {"shape": found[0].shape.to_dict(), "file": str(shape), "candidates": [one.to_dict() for one in found]}


def _summary(parent: Parent, origin: Origin, settings: SearchSettings, found: list[Candidate]) -> dict[str, Any]:
    """What the report shows of a search."""
    whole = cost(parent.model, context=settings.cost_context, batch=settings.cost_batch)
    return heading(settings, settings.to, parent.model) | {
        "data": {"train": settings.data, "calibration_tokens": settings.calibration_tokens},
        "parent": {"name": str(settings.model), "cost": whole.to_dict()},
        "shape": found[0].shape.to_dict(),
        "candidates": [one.to_dict() for one in found],
        "measured": list(_on_the_way(parent, origin, settings, {str(one.shape.to_dict()) for one in found})),
    }


def _on_the_way(parent: Parent, origin: Origin, settings: SearchSettings, known: set[str]) -> Iterator[dict[str, Any]]:
    """Uniform shapes that were cut and scored before the candidates, with their parameters: for the picture."""
    pricing = Pricing(Anatomy.of(parent.model), ranking=origin.ranking)
    for name, loss in KeptFigures(parent.run.path("losses.json")).items():
        if "(" in name or " with " in name:
            continue
        shape = Shape() if name == describe({}) else Shape.parse(name)
        if str(shape.to_dict()) not in known:
            yield {"shape": shape.to_dict(), "params": pricing.cost(shape).params, "loss": loss}


def _table(found: list[Candidate], whole: int) -> Table:
    """The candidates, best first, with what was measured of any of them. whole: the parent's parameters."""
    table = Table(title="candidates, best first", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    trained = any(one.trained_loss is not None for one in found)
    timed = any(one.cost.latency_ms is not None for one in found)
    for name in ("loss", *(["trained"] if trained else []), "params", "", "memory", *(["ms"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for one in found:
        cells = [figure(one.loss), *([figure(one.trained_loss)] if trained else [])]
        cells += [count(one.cost.params), ratio(quotient(one.cost.params, whole)), size(one.cost.memory_bytes)]
        lines = [f"{field}={value}" for field, value in one.shape.items()] or [describe(one.shape)]
        lines += [f"trained on {count(one.trained_tokens)} tokens"] if one.trained_tokens else []
        table.add_row(*cells, *([figure(one.cost.latency_ms)] if timed else []), "\n".join(lines))
    return table
