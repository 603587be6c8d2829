"""The whole job: rank, search, prune, distill, evaluate, report, in one resumable run folder.

Each stage keeps its result in the folder (calibration.safetensors, ranking.safetensors, candidates.json, pruned/,
model/, evaluation-*.json, speed.json, samples.json), so an interrupted job continues where it was. The stages are in
`child`. Paper: Minitron, arXiv 2407.14679, figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nestling.recipes.child import Child, ChildSettings, Origin, Parent
from nestling.recipes.progress import Stages, console
from nestling.recipes.run import Run
from nestling.recipes.shapes import checked
from nestling.recipes.summary import reported
from nestling.report import comparison
from nestling.search import describe
from nestling.train import documented


@documented
@dataclass
class CompressSettings(ChildSettings):
    """Settings of `compress`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G.
        out: Run folder; everything the job makes goes there.
        shape: Take this shape (FIELD=NUMBER,... or a JSON file) instead of searching for one.
    """

    model: str
    to: str = "0.75x"
    out: str = "runs/compress"
    shape: str | None = None


def compress(settings: CompressSettings) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that the report shows.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    parent = Parent(settings, settings.calibration_tokens)
    target = checked(parent.model, settings, settings.to, settings.shape)
    run = parent.run = Run("compress", settings, settings.out, settings.overwrite)
    origin = Origin(parent, parent.model, run)
    child = Child(parent, origin, run, settings.shape or settings.to)
    stages = Stages(6)
    with stages("rank every axis on calibration text"):
        origin.ranking  # noqa: B018  made now, used by the stages that follow
    with stages("take the given shape" if settings.shape else f"search a shape for {target}"):
        console.print(f"    {describe(child.search(target))}")
    with stages("prune"):
        child.prune()
    with stages("distill from the parent"):
        child.distill()
        parent.taught()
    with stages("evaluate parent and child"):
        results = child.evaluate()
    with stages("write the report"):
        summary, report = reported(child, results)
    console.print(comparison(summary))
    console.print(f"report: {report}\nmodel:  {run.path('model')}")
    return summary
