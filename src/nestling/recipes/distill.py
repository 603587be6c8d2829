"""`nestling distill`: retrain a student from its teacher, into one resumable run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nestling import hub, processes
from nestling.distill import DistillSettings, distill
from nestling.errors import NestlingError
from nestling.recipes.progress import console
from nestling.recipes.run import Run
from nestling.recipes.settings import ModelSettings
from nestling.recipes.source import Source, load
from nestling.train import documented


@documented
@dataclass
class DistillVerb(ModelSettings):
    """Settings of `distill`.

    Args:
        student: Folder of the model to train, as `nestling prune` wrote it.
        teacher: Model to learn from: hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        data: Training text: hub dataset, local file or folder, or builtin:stdlib.
        out: Run folder; metrics, checkpoints and the trained model go there.
        distill: Settings of the distillation.
        overwrite: Start anew even if the run folder holds a run.
    """

    student: str
    teacher: str | None = None
    data: str = "builtin:stdlib"
    out: str = "runs/distill"
    distill: DistillSettings = field(default_factory=DistillSettings)
    overwrite: bool = False


def distill_model(settings: DistillVerb) -> dict[str, Any]:
    """Train the student, or go on with it; returns where the model is."""
    if settings.teacher is None:
        raise NestlingError("distill needs a model to learn from: give --teacher, such as the model that was pruned")
    teacher = Source.open(settings, "teacher")
    student, tokenizer = load(settings, settings.student)
    run = Run("distill", settings, settings.out, settings.overwrite)
    target = run.path("model")
    if not run.has("model"):
        child = distill(student, teacher.model, settings.data, teacher.tokenizer, settings.distill, run_dir=run.folder)
        processes.first(lambda: str(hub.save(child, target, tokenizer or teacher.tokenizer)))
    console.print(f"model: {target}")
    return {"model": str(target), "tokens": settings.distill.tokens}
