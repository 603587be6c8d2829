"""`nestling distill`: retrain a student from its teacher, into one resumable run folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nestling.distill import Cache, DistillSettings, distill
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
        teacher_cache: Folder in which the teacher's likeliest tokens (distill.top_k of them) are kept, for any number
            of students; computed if they are not there. Once it is whole, the teacher is not loaded.
        overwrite: Start anew even if the run folder holds a run.
    """

    student: str
    teacher: str | None = None
    data: str = "builtin:stdlib"
    out: str = "runs/distill"
    distill: DistillSettings = field(default_factory=DistillSettings)
    teacher_cache: str | None = None
    overwrite: bool = False


def distill_model(settings: DistillVerb) -> dict[str, Any]:
    """Train the student, or go on with it; returns where the model is."""
    if settings.teacher is None:
        raise NestlingError("distill needs a model to learn from: give --teacher, such as the model that was pruned")
    # Whole models that are to be sharded may not fit on one device.
    # A teacher of which all processes need a whole copy of their own is none of these.
    where = replace(settings, device=settings.device or "cpu") if settings.distill.fsdp else settings
    once = settings.distill.fsdp and settings.distill.correction == "none" and settings.teacher_cache is None
    student, tokenizer = load(where, settings.student, once)
    teacher = None
    if tokenizer is None or not _served(settings):
        source = Source.open(where, "teacher", once)
        teacher, tokenizer = source.model, tokenizer or source.tokenizer
    run = Run("distill", settings, settings.out, settings.overwrite)
    how = (settings.data, tokenizer, settings.distill, run.folder)
    target = run.model("model", lambda: distill(student, teacher, *how, cache=settings.teacher_cache), tokenizer)
    console.print(f"model: {target}")
    return {"model": str(target), "tokens": settings.distill.sized().all_tokens()}


def _served(settings: DistillVerb) -> bool:
    """Whether the cache is whole and of this teacher, so that the teacher itself is not needed."""
    cache = Cache.open(settings.teacher_cache) if settings.teacher_cache else None
    return cache is not None and cache.whole and cache.made_for.get("name") == settings.teacher
